"""The published tables say what the JSON says, and the JSON does not say whose computer it was."""

import json

import pytest

from benchmarks import records, report, run
from benchmarks.engine import fewer_steps
from benchmarks.engine import tables as engine_tables
from benchmarks.kernels import tables as operator_tables
from benchmarks.quality import tables as quality_tables
from benchmarks.vllm import tables as vllm_tables

ABOUT = {
    "machine": "Some CPU, 2 threads",
    "system": "Linux x86_64",
    "date": "2026-01-31",
    "command": "make bench",
    "versions": {"transformers": "5.1", "peft": "0.2", "svd-engine": "0.3"},
}
README = """# Title
<!-- figures:summary -->
stale
<!-- /figures -->
between
<!-- figures:step -->
<!-- /figures -->
<!-- figures:gain -->
<!-- /figures -->
end
"""
PERFORMANCE = """<!-- figures:operators -->
<!-- /figures -->
<!-- figures:engine -->
<!-- /figures -->
<!-- figures:steps -->
<!-- /figures -->
<!-- figures:weights -->
<!-- /figures -->
<!-- figures:requests -->
<!-- /figures -->
<!-- figures:start -->
<!-- /figures -->
<!-- figures:speculation -->
<!-- /figures -->
<!-- figures:prefix -->
<!-- /figures -->
<!-- figures:levers -->
<!-- /figures -->
<!-- figures:gpu -->
<!-- /figures -->
"""


def operators():
    micros = {"steer": 40, "sample": 30, "eager": 1000, "compiled": 140, "read": 25, "clone": 20}
    return ABOUT | {
        "cases": [
            {
                "params": {"dtype": dtype, "vocab": 151936, "n": n, "name": name},
                "median": n * time * 1e-6,
                "bytes": n * 2_000_000,
            }
            for dtype in ("float32", "bfloat16")
            for n in (1, 32)
            for name, time in micros.items()
        ]
    }


def engine():
    def contender(milliseconds):
        return {
            "median": milliseconds / 1e3, "ratio": milliseconds / 40, "rounds": 5, "tokens/s": 99.6
        }  # fmt: skip

    times = dict(zip(engine_tables.CONTENDERS, (40, 38, 75, 51, 58, 133), strict=True))
    times["8 prompts"] = 80
    contenders = {name: contender(time) for name, time in times.items()}
    shared = {"prompt_tokens": 32, "new_tokens": 64, "contenders": contenders}
    cases = [
        {"name": name, "adapter": adapter, "batch": batch, "dtype": dtype, **shared, **more}
        for name, adapter, batch, more in (
            ("test_token", "LoRA", 1, {"weight_bytes": 538e6, "cache_bytes": 9.5e6}),
            ("test_batch", "LoRA", 8, {}),
            ("test_token", "prefix", 1, {}),
            ("test_request", "LoRA", 1, {"prompt_tokens": 8, "new_tokens": 512}),
        )
        for dtype in ("float32", "bfloat16")
    ]
    return ABOUT | {"cases": cases}


def start():
    seconds = {"import": 3.5, "load": 7.0, "first token": 0.25, "again": 0.05}
    return ABOUT | {
        "cases": [{"base": "GGUF", "dtype": "bfloat16", "rounds": 5, "seconds": seconds}]
    }


def steps():
    parts = {"linear": 0.018, "attention": 0.001, "rest": 0.001}

    def case(model, dtype, **more):
        times = {"read": 0.019, "steered": 0.02, "batch 8": 0.03, "adapted": 0.0195} | more
        contenders = {
            name: {"median": time, "ratio": time / 0.02, "rounds": 7}
            | (parts if name in ("steered", "batch 8", "adapted") else {})
            for name, time in times.items()
        }
        return {"model": model, "dtype": dtype, "contenders": contenders}

    return ABOUT | {
        "cases": [
            case("SmolLM2-135M", "float32", **{"llama.cpp": 0.021}),
            case("SmolLM2-135M", "bfloat16"),
            case("Qwen2.5-0.5B", "bfloat16"),
        ]
    }


def test_the_tables_of_fewer_steps():
    lines = fewer_steps.speculation(
        ABOUT
        | {
            "cases": [
                {
                    "dtype": dtype,
                    "contenders": {
                        str(new): {"median": 0.01 * new, "ratio": 0.5 + 0.5 * new}
                        for new in (1, 2, 5)
                    },
                }
                for dtype in ("float32", "bfloat16")
            ]
            + [
                {"dtype": dtype, "texts": "repeating", "contenders": texts}
                for dtype in ("float32", "bfloat16")
                for texts in [
                    {
                        "list": {"tokens": 48, "per step": 4.0, "speedup": 2.0},
                        "poem": {"tokens": 48, "per step": 2.0, "speedup": 0.5},
                        "one word": {"tokens": 1, "per step": 0.0, "speedup": 9.0},
                    }
                ]
            ]
        }
    ).splitlines()
    assert "| float32 | 10.0 | 1.50 | 3.00 |" in lines
    assert "| list | 4.00 | 2.00x | 4.00 | 2.00x |" in lines
    assert "| **repeating, mean** |  | **1.00x** |  | **1.00x** |" in lines
    assert not any("one word" in line for line in lines)
    text = fewer_steps.prefix(
        ABOUT
        | {
            "cases": [
                {
                    "tokens": 512, "ratio": 1.875, "dtype": "float32",
                    "contenders": {"steered": {"median": 3.0}, "adapted": {"median": 1.6}},
                },
                {
                    "tokens": 992, "new_tokens": 16, "kept_bytes": 9e7, "dtype": "float32",
                    "contenders": {"read on": {"median": 0.2}, "read anew": {"median": 9.0}},
                }
            ]
        }
    )  # fmt: skip
    assert "after 0.20 s, and after 9.00 s where it is read anew: 45 times sooner" in text
    assert "holds 90 MB" in text
    assert "after 3.00 s if both models read it, and after 1.60 s if" in text
    assert "alone: 1.88 times the time" in text


@pytest.fixture
def root(tmp_path):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "cpu_operators.json").write_text(records.to_json(operators()))
    (results / "cpu_engine.json").write_text(records.to_json(engine()))
    (results / "cpu_start.json").write_text(records.to_json(start()))
    (results / "cpu_step.json").write_text(records.to_json(steps()))
    (tmp_path / "README.md").write_text(README)
    markers = []
    for document, name, origin, _ in report.TABLES:
        if document == "docs/method.md":
            published = records.RESULTS / f"{origin}.json"
            if published.exists():
                (results / published.name).write_text(published.read_text())
            markers.append(f"<!-- figures:{name} -->\n<!-- /figures -->\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "method.md").write_text("".join(markers))
    (tmp_path / "docs" / "performance.md").write_text(PERFORMANCE)
    for document, name in (("serving", "serving"), ("scaling", "vllm")):
        marker = f"<!-- figures:{name} -->\n<!-- /figures -->\n"
        (tmp_path / "docs" / f"{document}.md").write_text(marker)
    return tmp_path


def test_the_operators_table():
    lines = operator_tables.operators(operators()).splitlines()
    assert "| N = 1, float32 | 40.0 | 30.0 | 25.0x | 3.50x | 25.0 | 20.0 | 50.0 |" in lines
    assert "| N = 32, bfloat16 | 1,280 | 960 | 25.0x | 3.50x | 800 | 640 | 50.0 |" in lines
    for part in ("Some CPU, 2 threads", "svd-engine 0.3", "2026-01-31", "`make bench`"):
        assert part in lines[0]


def test_the_engine_table():
    lines = engine_tables.engine(engine()).splitlines()
    assert f"| {engine_tables.CONTENDERS['naive']} | 133 | 3.33 | 133 | 3.33 |" in lines
    assert f"| {engine_tables.CONTENDERS['steered']} | 40.0 | 1.00 | 40.0 | 1.00 |" in lines
    assert "32 prompt tokens, 64 new ones" in lines[0]
    prefix = "40.0 ms in float32, 1.05 times the adapted model alone and 1/3.3 of the naive loop"
    assert prefix in lines[-1]


def test_the_summary_is_rows_of_the_engine_table():
    lines = engine_tables.summary(engine()).splitlines()
    assert f"| {engine_tables.SUMMARY['steered']} | 40.0 | 40.0 |" in lines
    assert f"| {engine_tables.SUMMARY['naive']} | 133 | 133 |" in lines
    assert set(engine_tables.SUMMARY) < set(engine_tables.CONTENDERS)


def test_the_tables_of_a_step():
    lines = engine_tables.beside(steps()).splitlines()
    assert "| **a steered step**: base and adapted model in one batch | 20.0 | 20.0 |" in lines
    assert "| not steered: llama.cpp, the same weights | 21.0 | - |" in lines
    assert "| reading the weights once | 19.0 | 19.0 |" in lines
    lines = engine_tables.steps(steps()).splitlines()
    assert "medians of 7 rounds" in lines[0]
    cells = "30.0 (18.0 + 1.00 + 1.00) | 1.50"
    assert f"| batch 8 | {cells} | {cells} | {cells} |" in lines
    assert "| llama.cpp, un-steered | 21.0 | 1.05 | - | - | - | - |" in lines


def test_the_table_of_codes():
    times = {"int8, steered": 0.006, "int8, llama.cpp": 0.008, "int4, steered": 0.005}
    contenders = {key: {"median": seconds} for key, seconds in times.items()}
    case = {"held": {"int8": 135e6, "int4": 76e6}, "rounds": 7, "contenders": contenders}
    lines = engine_tables.weights(ABOUT | {"cases": [case]}).splitlines()
    assert "| int8 | 135 | 6.00 | 8.00 | 0.75 |" in lines
    assert "| int4 | 76.0 | 5.00 | - | - |" in lines


def test_the_table_of_levers():
    found = {"median": 2.0, "min": 1.9, "speedup": 2.25}
    case = {"tokens": 48, "prompt": 444, "before": 400, "contenders": {"guesses, int8": found}}
    text = fewer_steps.levers(ABOUT | {"cases": [case]})
    assert "| guesses, int8 | 2.00 | 2.25x |" in text
    assert "48 new tokens, which repeat the end of the prompt, after 444" in text


def test_the_table_of_vllm():
    other = {"median": 0.5, "ratio": 0.8, "ratios": [0.7, 0.9]}
    case = {"batch": 16, "new_tokens": 24, "rounds": 5, "steered": {"median": 0.4, "ratio": 1.0}}
    case |= dict.fromkeys(vllm_tables.CONTENDERS, other)
    text = vllm_tables.vllm(ABOUT | {"dtype": "float32", "cases": [case]})
    assert "times that of | batch 16 |" in text
    assert f"| {vllm_tables.CONTENDERS['lora']} | 0.80 [0.70, 0.90] |" in text
    assert "| seconds of a steered call | 0.40 |" in text


def test_the_gain_says_what_is_published():
    published = records.read(records.ROOT / "benchmarks/results/quality_truthfulqa.json")
    text = quality_tables.gain(published)
    for name in ("auto", "the paper's estimate"):
        assert f"| {published['choice_gain'][name]['mean']:+.1f} [" in text
    assert "one of 5 folds, mean of 4 PEFT methods" in text


def test_the_requests_table():
    lines = engine_tables.requests(engine()).splitlines()
    cells = " | ".join(f"{s / 1e3:.2f}" for s in (40, 38, 75, 51, 58, 133))
    assert f"| 8 + 512, float32 | {cells} |" in lines
    assert "538 MB of weights, each once, and 9.5 MB of KV cache" in lines[-1]


def test_the_start_table():
    lines = engine_tables.start(start()).splitlines()
    assert lines[-1] == "| GGUF, bfloat16 | 3.50 | 7.00 | 0.25 | 0.05 | 10.8 |"
    assert "medians of 5 processes" in lines[0]


def test_the_readme_is_filled_once_and_then_passes_the_check(root):
    assert "make docs" in report.main(["--check"], root)
    assert (root / "README.md").read_text() == README
    assert report.main([], root) is None
    text = (root / "README.md").read_text()
    assert "stale" not in text and "\nbetween\n" in text and text.endswith("\nend\n")
    assert report.main(["--check"], root) is None


def test_what_is_missing_is_named_in_one_line(root):
    (root / "README.md").write_text("# Title\n")
    assert report.main([], root) == (
        "README.md needs one <!-- figures:summary --> ... <!-- /figures -->; it has 0."
    )
    (root / "benchmarks" / "results" / "cpu_operators.json").unlink()
    assert "cpu_operators.json does not exist." in report.main([], root)
    (root / "README.md").unlink()
    assert report.main([], root) == "README.md does not exist."


def test_the_results_keep_the_statistics_and_drop_the_computer():
    stats = {"median": 0.123456, "min": 0.1, "iqr": 0.01, "rounds": 5, "data": [0.1] * 5}
    measured = {
        "datetime": "2026-01-31T12:00:00+00:00",
        "machine_info": {"system": "Linux", "machine": "x86_64", "node": "my-host"},
        "commit_info": {"project": "my-folder"},
        "benchmarks": [
            {"name": "test_x[1]", "fullname": "/home/me/test_x[1]", "params": {"n": 1},
             "stats": stats, "extra_info": {"machine": "Some CPU", "bytes": 8}}
        ],
    }  # fmt: skip
    text = records.to_json(run.trim(measured, "make bench", {"torch": "2.13"}))
    for private in ("my-host", "my-folder", "/home/me"):
        assert private not in text
    result = json.loads(text)
    assert result["machine"] == "Some CPU" and result["date"] == "2026-01-31"
    assert result["cases"] == [
        {"name": "test_x[1]", "params": {"n": 1}, "median": 0.1235, "min": 0.1, "iqr": 0.01,
         "rounds": 5, "bytes": 8}
    ]  # fmt: skip


@pytest.mark.parametrize("name", [path.name for path in sorted(records.RESULTS.glob("[cq]*.json"))])
def test_the_writer_lays_out_the_published_files_again(name, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "plain", lambda value: value)
    published = records.RESULTS / name
    records.write(tmp_path / name, records.read(published))
    assert (tmp_path / name).read_bytes() == published.read_bytes()


def test_a_record_is_plain():
    value = {"x": (1 / 3, float("nan")), 2: f"in {records.ROOT}/kernels", "y": None}
    assert records.plain(value) == {"x": [0.3333, "nan"], "2": "in ./kernels", "y": None}
    assert json.loads(records.to_json({"head": 1 / 3, "cases": [1 / 3], "none": []})) == {
        "head": 1 / 3, "cases": [0.3333], "none": [],
    }  # fmt: skip


def test_a_note_stands_behind_the_command():
    said = records.source(ABOUT | {"note": "in two runs"}, "a machine")
    assert said.endswith(f"`{ABOUT['command']}` (in two runs)")
