"""The results of `benchmarks.gpu` as tables: Markdown for the docs, and on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import records
from benchmarks.tables import number, table

Cell = str
Part = Mapping[str, Any]  # a section's result, a case or another part of the JSON


class Table(NamedTuple):
    title: str
    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]


def percent(value: Any) -> Cell:
    return f"{100 * value:.0f} %" if isinstance(value, int | float) else "-"


def short(text: Any, most: int = 90) -> Cell:
    line = " ".join(str(text).split()).replace("|", "/")
    return line if len(line) <= most else line[: most - 3] + "..."


def tables(result: Part) -> list[Table]:
    entries = result.get("sections", {})
    made = [_sections(entries)]
    builders = {
        "correctness": _correctness,
        "graph": _graph,
        "latency": _latency,
        "operators": _operators,
        "linear": _linear,
        "engine": _engine,
        "step": _step,
        "tiles": _tiles,
        "sanitizer": _sanitizer,
    }
    for begins, build in builders.items():
        found = {
            name: entry["result"]
            for name, entry in entries.items()
            if name.startswith(begins) and (entry.get("result") or {}).keys() - {"skipped"}
        }
        try:
            made += build(found) if found else []
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            made.append(Table(begins, ["no table"], [[short(repr(error))]]))
    return [each for each in made if each.rows]


def _sections(entries: Part) -> Table:
    rows = []
    for name, entry in entries.items():
        inner = entry.get("result") or {}
        why = entry.get("error") or entry.get("skipped") or inner.get("skipped") or ""
        if isinstance(why, list):
            why = f"{len(why)} points left out"
        rows.append([name, entry["status"], number(entry.get("seconds")), short(why, 300)])
    return Table("Sections", ["section", "", "s", ""], rows)


def _correctness(found: Part) -> list[Table]:
    made, rows, wrong = [], [], []
    for part in found.values():
        backend, failures = part["backend"], part["failures"]
        operators = dict.fromkeys(key for row in part["cases"] for key in row if key != "case")
        for name in operators:
            said = [row[name] for row in part["cases"] if name in row]
            failed = [f for f in failures if f["operator"] == name]
            wrong += [[backend, name, f["case"], short(f["what"], 200)] for f in failed]
            worst = part["worst"].get(name, {})
            right = f"{len(said) - len(failed)} of {len(said)}"
            errors = [f"{worst.get(key, 0):.2g}" for key in ("error", "tolerance")]
            rows.append([backend, name, right, *errors, short(worst.get("case", "-"), 60)])
        rows += [[backend, name, "absent", "-", "-", "-"] for name in part["absent"]]
        late = part.get("skipped: time", [])
        if late:
            wrong.append([backend, "all", f"{len(late)} cases", "left out: time"])
    head = ["backend", "operator", "cases right", "error", "tolerance", "where it is nearest to it"]
    made.append(Table("Correctness against float64", head, rows))
    made.append(Table("Not right", ["backend", "operator", "case", "what"], wrong))
    return made


def _graph(found: Part) -> list[Table]:
    result = found["graph"]
    tries = dict.fromkeys(name for part in result.values() for name in part)
    rows = [[name, *(short(part.get(name, "-")) for part in result.values())] for name in tries]
    return [Table("CUDA graphs and streams", ["", *result], rows)]


def _latency(found: Part) -> list[Table]:
    result = found["latency"]
    cases = result["in a graph"]
    base = {case["dtype"]: case for case in cases if case["name"] == "two softmaxes"}
    rows = []
    for case in cases:
        hot, cold = case.get("hot_us"), case.get("cold_us")
        before = base.get(case["dtype"], {})
        ratio = before["hot_us"] / hot if hot and before.get("hot_us") else None
        said = f"{number(ratio)}x" if ratio else short(case.get("error", "-"))
        rows.append([case["name"], case["backend"], case["dtype"], number(hot), number(cold), said])
    head = ["", "backend", "dtype", "us, L2 hot", "us, L2 cold", "two softmaxes / this, hot"]
    title = f"One row, V = {result['vocab']}, inside a CUDA graph"
    host = [
        [case["name"], case["backend"], number(case.get("us") or case.get("error"))]
        for case in result["host"]
    ]
    return [
        Table(title, head, rows),
        Table("Host time of one eager call", ["", "backend", "us"], host),
    ]


def _operators(found: Part) -> list[Table]:
    result = found["operators"]
    made = []
    shapes = dict.fromkeys(_shape(case) for case in result["cases"])
    for vocab, dtype, kind in shapes:
        cases = [c for c in result["cases"] if _shape(c) == (vocab, dtype, kind)]
        counts = sorted({case["n"] for case in cases})
        rows = []
        for name, backend in dict.fromkeys((c["name"], c["backend"]) for c in cases):
            at = {c["n"]: c for c in cases if (c["name"], c["backend"]) == (name, backend)}
            rows.append([name, backend, *(_point(at.get(n)) for n in counts)])
        head = ["", "backend", *(f"N = {n}" for n in counts)]
        title = (
            f"V = {vocab}, {dtype}, {kind} rows: us with the L2 cold (hot), share of copy "
            f"bandwidth ({number(result['copy GB/s'])} GB/s)"
        )
        made.append(Table(title, head, rows))
    return made


def _shape(case: Part) -> tuple[int, str, str]:
    return case["vocab"], case["dtype"], case.get("rows", "random")


def _point(case: Part | None) -> Cell:
    if case is None:
        return "-"
    if why := case.get("error") or case.get("skipped"):
        return short(why, 60)
    hot = f" ({number(case['hot_us'])})" if "hot_us" in case else ""
    share = f", {percent(case['of copy'])}" if "of copy" in case else ""
    return f"{number(case['cold_us'])}{hot}{share}"


def _linear(found: Part) -> list[Table]:
    result = found["linear"]
    cases, made = result["cases"], []
    counts = sorted({case["rows"] for case in cases})
    for model in dict.fromkeys(case["model"] for case in cases):
        rows = []
        at = {
            (case["matrix"], case["shape"], case["contender"], case["rows"]): case
            for case in cases
            if case["model"] == model
        }
        for *matrix, contender in dict.fromkeys(key[:3] for key in at):
            both = (contender, contender.replace("ours", "torch"))
            cells = [_beside(*(at.get((*matrix, name, n)) for name in both)) for n in counts]
            rows.append([*matrix, contender, *cells])
        title = (
            f"Linear layers of {model}, bfloat16, L2 cold: us, share of copy bandwidth "
            f"({number(result['copy GB/s'])} GB/s), torch / this; ours is {result['ours']}"
        )
        made.append(Table(title, ["", "shape", "", *(f"M = {n}" for n in counts)], rows))
    checked = result["checked"]
    wrong = [[c["model"], c["matrix"], short(c["error"], 200)] for c in checked if "error" in c]
    return [*made, Table("Linear layers that were not right", ["model", "", "what"], wrong)]


def _beside(case: Part | None, rival: Part | None) -> Cell:
    if case is None:
        return "-"
    share = f", {percent(case['of copy'])}" if "of copy" in case else ""
    faster = f", {number(rival['us'] / case['us'])}x" if rival and rival is not case else ""
    return f"{number(case['us'])}{share}{faster}"


def _engine(found: Part) -> list[Table]:
    result = found["engine"]
    rows = []
    for case in result["cases"]:
        why = case.get("error") or case.get("skipped")
        model = case["model"] + (f" ({case['weights']} weights)" if "weights" in case else "")
        about = [str(case.get(key, "-")) for key in ("batch", "context", "contender")]
        time = short(why, 80) if why else number(case.get("ms"))
        share = percent(case.get("of weight bandwidth"))
        rows.append([model, *about, time, number(case.get("ratio")), share])
    head = ["model", "batch", "context", "", "ms per token", "over steered", "of weight bandwidth"]
    equal = [[what, short(said, 200)] for what, said in result.get("tokens equal", {}).items()]
    return [
        Table("The engine, bfloat16", head, rows),
        Table("PairedRunner, sequential and single decoding draw the same tokens", ["", ""], equal),
    ]


def _step(found: Part) -> list[Table]:
    result = found["step"]
    checked = []
    for check in result["checks"]:
        bits = [str(check.get(key, "-")) for key in ("alone = in a batch", "replayed = not")]
        error = check.get("error", "-")
        error = f"{error:.2g}" if isinstance(error, float) else short(error)
        checked.append([check["model"], check["dtype"], check.get("step", "-"), error, *bits])
    times = [
        [
            case["model"],
            *(str(case[key]) for key in ("batch", "context")),
            *(_milliseconds(case.get(key)) for key in ("steered", "adapted", "walk")),
            percent(case.get("of bandwidth")),
        ]
        for case in result["cases"]
    ]
    kernels = [
        [
            part["model"],
            short(name, 40),
            str(each["calls"]),
            number(each["us each"]),
            number(each["us"]),
        ]
        for part in result["models"]
        for name, each in part.get("kernels", {}).items()
        if isinstance(each, dict)
    ]
    head = ["model", "batch", "context", "steered", "adapted", "walk", "of copy bandwidth"]
    return [
        Table(
            "The step of kernels against the model's modules",
            ["model", "dtype", "step", "error", "alone = in a batch", "replayed = not"],
            checked,
        ),
        Table("The step of kernels, bfloat16: ms per token", head, times),
        Table(
            "Kernels of a step of one sequence, context 1024",
            ["model", "kernel", "calls", "us each", "us"],
            kernels,
        ),
    ]


def _milliseconds(value: Any) -> Cell:
    return number(value) if isinstance(value, int | float) else short(value or "-", 60)


def _tiles(found: Part) -> list[Table]:
    result = found["tiles"]
    cases, chosen = result["cases"], result["chosen"]
    splits = dict.fromkeys((case["tile"], case["warps"]) for case in cases)
    rows = []
    for name, vocab, n in dict.fromkeys((c["name"], c["vocab"], c["n"]) for c in cases):
        at = {
            (c["tile"], c["warps"]): c
            for c in cases
            if (c["name"], c["vocab"], c["n"]) == (name, vocab, n)
        }
        rows.append([name, str(vocab), str(n), *(_point(at.get(split)) for split in splits)])
    title = (
        f"Other splits, bfloat16: us with the L2 cold (hot); launch.py has tiles of "
        f"{chosen['tile']} and {chosen['warps']} warps"
    )
    head = ["", "V", "N", *(f"{tile}, {warps} warps" for tile, warps in splits)]
    return [Table(title, head, rows)]


def _sanitizer(found: Part) -> list[Table]:
    rows = [
        [tool, short(said["summary"] if isinstance(said, dict) else said)]
        for tool, said in found["sanitizer"].items()
    ]
    return [Table("compute-sanitizer", ["tool", "summary"], rows)]


def source(result: Part) -> str:
    """Say in one line which device, versions and command the results are from."""
    machine = result.get("sections", {}).get("machine", {}).get("result") or {}
    versions = records.named(machine, "torch", "triton", "transformers")
    driver = [f"driver {machine['driver_version']}"] if "driver_version" in machine else []
    return f"{records.source(result, result['device'], *driver, *versions)}."


def markdown(result: Part) -> str:
    """Format every table with its title, under one line on the source."""
    parts = [f"### {made.title}\n\n{table(made.head, made.rows)}" for made in tables(result)]
    return "\n\n".join([source(result), *parts]) + "\n"


def show(result: Part) -> None:
    """Print the tables; as Markdown if rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table as Grid
        from rich.text import Text
    except ImportError:
        print(markdown(result))
        return
    console = Console()
    if not console.is_terminal:
        console.width = 170
    for made in tables(result):
        grid = Grid(title=Text(made.title), title_justify="left", header_style="bold")
        for i, name in enumerate(made.head):
            grid.add_column(Text(name), justify="right" if i > 2 else "left")
        for row in made.rows:
            grid.add_row(*(Text(cell) for cell in row))
        console.print(grid)
    console.print(Text(source(result)))
