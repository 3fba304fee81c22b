"""The tables of docs/method.md from benchmarks/results/quality_*.json."""

from typing import Any

from benchmarks import records
from benchmarks.tables import table

Result = dict[str, Any]
METHODS = {
    "lora": "LoRA",
    "ia3": "IA3",
    "prompt": "prompt tuning",
    "prefix": "prefix tuning",
}
MODELS = ("base", "adapted", "steered")
COLUMNS = ("average", "MC1", "MC2", "MC3")


def span(figures: dict[str, float]) -> str:
    return f"{figures['mean']:+.1f} [{figures['low']:+.1f}, {figures['high']:+.1f}]"


def mean(figures: dict[str, float]) -> str:
    return f"{figures['mean']:.1f}"


def calibrated(case: Result) -> list[str]:
    """Format the choice of a case's calibration, its strength and its verdict."""
    found = case["calibration"]
    choice = words(found["objective"], found["length_normalised"], found["direction"])
    return [choice, f"{found['strength']:+.2f}", f"{found['alpha']:g}", advice(found)]


def advice(found: Result) -> str:
    return str(found["verdict"].partition(":")[0])


def words(objective: str, per_token: bool, direction: str) -> str:
    """Name a way to calibrate."""
    name = objective + (" per token" if per_token else "")
    return name if direction == "projected" else f"{name}, without the projection"


def command(origin: str) -> str:
    """Return the command that makes the results of this name."""
    return f"`python -m benchmarks.quality {origin.removeprefix('quality_')}`"


def source(result: Result) -> str:
    versions = records.named(result["versions"], "transformers", "peft", "svd-engine")
    return f"{result['model']}. {records.source(result, result['machine'], *versions)}"


def truthfulqa(result: Result) -> str:
    """Format Table 1 of the paper, at this size: what direction="auto" gains."""
    rows = []
    for method, cases in by_method(result).items():
        means = [f"{average(cases, name):.1f}" for name in MODELS]
        gains = [span(result["method_gain"][method][column]) for column in COLUMNS]
        found = [case["calibration"] for case in cases]
        without = sum(each["direction"] == "difference" for each in found)
        used = sum(advice(each) == "use it" for each in found)
        mus = sorted(each["strength"] for each in found)
        strengths = f"{mus[0]:+.1f} to {mus[-1]:+.1f}"
        rows.append([METHODS[method], *means, *gains, strengths, str(without), str(used)])
    gains = [span(result["mean_gain"][column]) for column in COLUMNS]
    rows.append(["mean of all", "", "", "", *gains, "", "", ""])
    head = ["", *MODELS, "gain", "MC1", "MC2", "MC3", "mu", "without the projection", "use it"]
    questions = [case["questions"] for case in result["cases"]]
    tested = sum({case["fold"]: case["questions"][1] for case in result["cases"]}.values())
    return (
        f"{source(result)}.\n\n{table(head, rows)}\n\nAverage of MC1, MC2 and MC3 in per cent; "
        f"every one of {tested} questions is in the test of one fold, {seeds(result)}. Gains of "
        "steered over adapted with 95 % bootstrap intervals over questions. "
        f"{questions[0][0]} questions of the other folds calibrate; the strength is used whatever "
        f"the verdict. The last columns count, of {len(found)}, the calibrations that chose the "
        "direction without the projection and those whose verdict is to use it."
    )


def by_method(result: Result) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for case in result["cases"]:
        found.setdefault(case["method"], []).append(case)
    return found


def average(cases: list[Result], model: str) -> float:
    """Return the mean over questions, every fold with its number of them."""
    weights = [case["questions"][1] for case in cases]
    values = [case["models"][model]["average"]["mean"] for case in cases]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def seeds(result: Result) -> str:
    count = len({case["seed"] for case in result["cases"]})
    return f"with {count} warm starts by seed" if count > 1 else "with one warm start"


def gain(result: Result) -> str:
    """Format what steering gains as `auto` chooses it and as the paper does."""
    names = {
        "auto": 'as `direction="auto"` chooses it',
        "the paper's estimate": "the paper's direction and estimate of the strength",
    }
    rows = [[what, span(result["choice_gain"][name])] for name, what in names.items()]
    methods, folds = (len({case[key] for case in result["cases"]}) for key in ("method", "fold"))
    return (
        f"{table(['steered over adapted', 'points, 95 % interval'], rows)}\n\nTruthfulQA: average "
        f"of MC1, MC2 and MC3, every question in the test of one of {folds} folds, mean of "
        f"{methods} PEFT methods, {seeds(result)}. {result['model']}, {result['date']}; "
        f"`{result['command']}`."
    )


def choices(result: Result) -> str:
    """Format every way to choose, and what it is worth."""
    methods = by_method(result)
    rows = []
    for i, name in enumerate(each["name"] for each in result["cases"][0]["choices"]):
        cells, used = [], 0
        for cases in methods.values():
            found = [case["choices"][i] for case in cases]
            used += sum(advice(each["calibration"]) == "use it" for each in found)
            mus = sorted(each["mu"] for each in found)
            gain = sum(each["gain"]["mean"] for each in found) / len(found)
            cells.append(f"{gain:+.1f} ({mus[0]:+.1f} to {mus[-1]:+.1f})")
        rows.append([name, *cells, span(result["choice_gain"][name]), str(used)])
    head = ["", *(METHODS[method] for method in methods), "mean", "use it"]
    return (
        f"{table(head, rows)}\n\nEach cell is the gain of the average of MC1, MC2 and MC3 on the "
        "test in points, averaged over folds and seeds, and the range of mu; the last column "
        f"counts the verdicts, of {len(result['cases'])}, that are to use it."
    )


def estimators(result: Result) -> str:
    """Format every estimator's strength and its figure on the test."""
    cases = [case for case in result["cases"] if "estimators" in case]
    names = [name for name in cases[0]["estimators"] if all(name in c["estimators"] for c in cases)]
    rows = []
    for name in names:
        found = [case["estimators"][name] for case in cases]
        rows.append([name, *(f"{each['mu']:+.3g}: {each['figure']:.1f}" for each in found)])
    rows.append(["un-steered", *(mean(case["models"]["adapted"]["average"]) for case in cases)])
    head = ["mu: average on the test", *(METHODS[case["method"]] for case in cases)]
    return f"{table(head, rows)}\n\nBeyond |mu| = 64 a strength is cut to 64 for the average."


def likelihood(result: Result) -> str:
    """Format calibration on the likelihood."""
    rows = []
    for method, cases in by_method(result).items():
        found = [case["nll"] for case in cases]
        mus = sorted(each["strength"] for each in found)
        keys = ("nll_before", "held_out_change", "test_before", "test_change")
        cells = [sum(each[key] for each in found) / len(found) for key in keys]
        forms = ("{:.3f}", "{:+.4f}", "{:.3f}", "{:+.4f}")
        formed = [form.format(cell) for form, cell in zip(forms, cells, strict=True)]
        worst = max(each["test_change"] for each in found)
        strengths = f"{mus[0]:+.2f} to {mus[-1]:+.2f}"
        rows.append([METHODS[method], strengths, *formed, f"{worst:+.4f}"])
    head = ["", "mu", "held out, mu = 0", "calibrated", "test, mu = 0", "calibrated", "worst fold"]
    note = (
        "NLL of the right answers in nats per token, and what steering adds to it; means of folds."
    )
    return f"{table(head, rows)}\n\n{note}"


def commonsense(result: Result) -> str:
    """Format Table 2 of the paper."""
    rows = []
    for case in result["cases"]:
        what = f"{case['task']}, {METHODS[case['method']]}"
        means = [mean(case["models"][name]["accuracy"]) for name in MODELS]
        rows.append([what, *means, span(case["gain"]["accuracy"]), *calibrated(case)])
    head = ["", *MODELS, "gain", "choice", "mu", "alpha", "verdict"]
    case = result["cases"][0]
    return (
        f"{source(result)}.\n\n{table(head, rows)}\n\nAccuracy by likelihood in per cent on "
        f"{case['questions'][1]} test problems; {case['questions'][0]} for calibration; warm "
        f"starts of {case['steps']} steps of {case['batch_size']} answers."
    )


def ablations(result: Result) -> str:
    """Format the steering with one part taken out."""
    return over_methods(result, "variant", "Gain of the average of MC1, MC2 and MC3 in points.")


def alphas(result: Result) -> str:
    """Format every alpha at its own strength."""
    return over_methods(
        result, "alpha", "Gain of the average of MC1, MC2 and MC3 in points, each at its own mu."
    )


def over_methods(result: Result, key: str, note: str) -> str:
    methods = list(by_method(result))
    values = list(dict.fromkeys(case[key] for case in result["cases"]))
    found = {(case[key], case["method"]): case for case in result["cases"]}
    rows = []
    for value in values:
        cases = [found[value, method] for method in methods]
        gains = [case["gain"]["average"] for case in cases]
        cells = [f"{c['mu']:+.3g}: {span(g)}" for c, g in zip(cases, gains, strict=True)]
        rows.append([str(value), *cells, f"{sum(g['mean'] for g in gains) / len(gains):+.1f}"])
    head = [f"{key}; mu: gain", *(METHODS[method] for method in methods), "mean"]
    return f"{source(result)}.\n\n{table(head, rows)}\n\n{note}"


def steps(result: Result) -> str:
    """Format LoRA after warm starts of several lengths."""
    rows = []
    for case in result["cases"]:
        means = [mean(case["models"][name]["average"]) for name in MODELS]
        mu = f"{case['calibration']['strength']:+.2f}"
        rows.append([str(case["steps"]), *means, span(case["gain"]["average"]), mu])
    head = ["steps of 16 answers", *MODELS, "gain", "mu"]
    return f"{source(result)}.\n\n{table(head, rows)}"


def decoding(result: Result) -> str:
    """Format Table 5 of the paper: decoding strategies."""
    rows = []
    for case in result["cases"]:
        models = [case["models"][name] for name in ("adapted", "steered")]
        accuracy, answered = (
            [mean(model[metric]) for model in models] for metric in ("accuracy", "answered")
        )
        rows.append([case["strategy"], *accuracy, span(case["gain"]["accuracy"]), *answered])
    head = ["", "adapted", "steered", "gain", "adapted answers", "steered answers"]
    return f"{source(result)}.\n\n{table(head, rows)}"


def cost(result: Result) -> str:
    """Format CPU seconds and memory of the commands."""
    rows = [
        [case["what"], f"{case['seconds']:.0f}", f"{case['peak_bytes'] / 1e9:.2f}"]
        for case in result["cases"]
    ]
    over = result["overhead"]
    return (
        f"{source(result)}.\n\n{table(['', 'CPU seconds', 'peak memory, GB'], rows)}\n\n"
        f"Calibration on {over['tokens']:,} answer tokens takes {over['calibrate']:.1f} s, "
        f"{100 * (over['ratio'] - 1):+.1f} % over the forward passes alone."
    )


# (document, figures, where they come from, their table)
TABLES = (
    ("README.md", "gain", "quality_truthfulqa", gain),
    ("docs/method.md", "truthfulqa", "quality_truthfulqa", truthfulqa),
    ("docs/method.md", "choices", "quality_truthfulqa", choices),
    ("docs/method.md", "estimators", "quality_truthfulqa", estimators),
    ("docs/method.md", "likelihood", "quality_truthfulqa", likelihood),
    ("docs/method.md", "ablations", "quality_ablations", ablations),
    ("docs/method.md", "alpha", "quality_alpha", alphas),
    ("docs/method.md", "steps", "quality_steps", steps),
    ("docs/method.md", "commonsense", "quality_commonsense", commonsense),
    ("docs/method.md", "decoding", "quality_decoding", decoding),
    ("docs/method.md", "cost", "quality_cost", cost),
)
