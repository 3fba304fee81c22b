"""The tables of docs/method.md from benchmarks/results/quality_*.json."""

from typing import Any

from benchmarks.markdown import table

Result = dict[str, Any]
METHODS = {
    "lora": "LoRA",
    "ia3": "IA3",
    "prompt": "prompt tuning",
    "prefix": "prefix tuning",
}


def span(figures: dict[str, float]) -> str:
    return f"{figures['mean']:+.1f} [{figures['low']:+.1f}, {figures['high']:+.1f}]"


def mean(figures: dict[str, float]) -> str:
    return f"{figures['mean']:.1f}"


def command(origin: str) -> str:
    """What makes the results of that name."""
    return f"`python -m benchmarks.quality {origin.removeprefix('quality_')}`"


def source(result: Result) -> str:
    versions = ", ".join(
        f"{name} {result['versions'][name]}" for name in ("transformers", "peft", "svd-engine")
    )
    where = f"{result['machine']}, {versions}, {result['date']}"
    return f"{result['model']}. {where}; `{result['command']}`"


def truthfulqa(result: Result) -> str:
    """Table 1 of the paper, at this size."""
    rows = []
    for case in result["cases"]:
        calibration, models = case["calibration"], case["models"]
        rows.append([
            f"{METHODS[case['method']]}, split {case['seed']}",
            *(mean(models[name]["average"]) for name in ("base", "adapted", "steered")),
            *(span(case["gain"][column]) for column in ("average", "MC1", "MC2", "MC3")),
            f"{calibration['strength']:+.2f}", f"{calibration['alpha']:g}",
            calibration["verdict"].partition(":")[0],
        ])  # fmt: skip
    rows.append(["mean of all", "", "", "", *(
        span(result["mean_gain"][column]) for column in ("average", "MC1", "MC2", "MC3")
    ), "", "", ""])  # fmt: skip
    head = ["", "base", "adapted", "steered", "gain", "MC1", "MC2", "MC3", "mu", "alpha", "verdict"]
    questions = result["cases"][0]["questions"]
    return (
        f"{source(result)}.\n\n{table(head, rows)}\n\nAverage of MC1, MC2 and MC3 in per cent on "
        f"{questions[1]} test questions a split; gains of steered over adapted with 95 % bootstrap "
        f"intervals over questions. mu and alpha come from {questions[0]} calibration questions."
    )


def objectives(result: Result) -> str:
    """What calibration makes small, and what that is worth."""
    methods = list(dict.fromkeys(case["method"] for case in result["cases"]))
    names = [each["objective"] for each in result["cases"][0]["objectives"]]
    rows = []
    for i, name in enumerate(names):
        cells, every = [], []
        for method in methods:
            found = [c["objectives"][i] for c in result["cases"] if c["method"] == method]
            every += found
            mus = sorted({f"{each['mu']:+.1f}" for each in found}, key=float)
            cells.append(
                f"{' '.join(mus)}: {averaged(found, 'held out')}, {averaged(found, 'test')}"
            )
        gain = span(result["objective_gain"][name])
        rows.append([name, *cells, f"{averaged(every, 'held out')}, {gain}"])
    head = ["objective", *(METHODS[method] for method in methods), "mean"]
    return (
        f"{table(head, rows)}\n\nEach cell is the mu of every split: gain of the average of MC1, "
        "MC2 and MC3 on calibration questions held out (5-fold), gain on the test, in points, "
        "averaged over splits."
    )


def averaged(found: list[Result], part: str) -> str:
    return f"{sum(each[part]['mean'] for each in found) / len(found):+.1f}"


def estimators(result: Result) -> str:
    """Every estimator's strength and what the test makes of it."""
    cases = [case for case in result["cases"] if case["seed"] == result["cases"][0]["seed"]]
    rows = [
        [name, *(
            f"{case['estimators'][name]['mu']:+.3g}: {case['estimators'][name]['figure']:.1f}"
            for case in cases
        )]
        for name in cases[0]["estimators"]
    ]  # fmt: skip
    rows.append(["un-steered", *(mean(case["models"]["adapted"]["average"]) for case in cases)])
    head = ["mu: average on the test", *(METHODS[case["method"]] for case in cases)]
    return f"{table(head, rows)}\n\nBeyond |mu| = 64 a strength is cut to 64 for the average."


def likelihood(result: Result) -> str:
    """Calibration on the likelihood: never worse than un-steered."""
    rows = []
    for case in result["cases"]:
        found = case["nll"]
        low, high = found["interval"]
        rows.append([
            f"{METHODS[case['method']]}, split {case['seed']}",
            f"{found['strength']:+.2f} [{low:+.2f}, {high:+.2f}]",
            f"{found['nll_before']:.3f}", f"{found['held_out_change']:+.4f}",
            f"{found['test_before']:.3f}", f"{found['test_change']:+.4f}",
        ])  # fmt: skip
    head = ["", "mu", "held out, mu = 0", "calibrated", "test, mu = 0", "calibrated"]
    note = "NLL of the right answers in nats a token, and what steering adds to it."
    return f"{table(head, rows)}\n\n{note}"


def commonsense(result: Result) -> str:
    """Table 2 of the paper."""
    rows = [
        [
            f"{case['task']}, {METHODS[case['method']]}",
            *(mean(case["models"][name]["accuracy"]) for name in ("base", "adapted", "steered")),
            span(case["gain"]["accuracy"]),
            f"{case['calibration']['strength']:+.2f}", f"{case['calibration']['alpha']:g}",
            case["calibration"]["verdict"].partition(":")[0],
        ]
        for case in result["cases"]
    ]  # fmt: skip
    head = ["", "base", "adapted", "steered", "gain", "mu", "alpha", "verdict"]
    case = result["cases"][0]
    return (
        f"{source(result)}.\n\n{table(head, rows)}\n\nAccuracy by likelihood in per cent on "
        f"{case['questions'][1]} test problems; {case['questions'][0]} for calibration; warm "
        f"starts of {case['steps']} steps of {case['batch_size']} answers."
    )


def ablations(result: Result) -> str:
    """The steering with one part taken out."""
    return over_methods(result, "variant", "Gain of the average of MC1, MC2 and MC3 in points.")


def alphas(result: Result) -> str:
    """Every alpha at its own strength."""
    return over_methods(
        result, "alpha", "Gain of the average of MC1, MC2 and MC3 in points, each at its own mu."
    )


def over_methods(result: Result, key: str, note: str) -> str:
    methods = list(dict.fromkeys(case["method"] for case in result["cases"]))
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
    """LoRA after warm starts of several lengths."""
    rows = [
        [
            str(case["steps"]),
            *(mean(case["models"][name]["average"]) for name in ("base", "adapted", "steered")),
            span(case["gain"]["average"]), f"{case['calibration']['strength']:+.2f}",
        ]
        for case in result["cases"]
    ]  # fmt: skip
    head = ["steps of 16 answers", "base", "adapted", "steered", "gain", "mu"]
    return f"{source(result)}.\n\n{table(head, rows)}"


def decoding(result: Result) -> str:
    """Table 5 of the paper: decoding strategies."""
    rows = [
        [
            case["strategy"],
            *(mean(case["models"][name]["accuracy"]) for name in ("adapted", "steered")),
            span(case["gain"]["accuracy"]),
            *(mean(case["models"][name]["answered"]) for name in ("adapted", "steered")),
        ]
        for case in result["cases"]
    ]  # fmt: skip
    head = ["", "adapted", "steered", "gain", "adapted answers", "steered answers"]
    return f"{source(result)}.\n\n{table(head, rows)}"


def cost(result: Result) -> str:
    """CPU seconds and memory of the commands."""
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
    ("docs/method.md", "truthfulqa", "quality_truthfulqa", truthfulqa),
    ("docs/method.md", "objectives", "quality_truthfulqa", objectives),
    ("docs/method.md", "estimators", "quality_truthfulqa", estimators),
    ("docs/method.md", "likelihood", "quality_truthfulqa", likelihood),
    ("docs/method.md", "ablations", "quality_ablations", ablations),
    ("docs/method.md", "alpha", "quality_alpha", alphas),
    ("docs/method.md", "steps", "quality_steps", steps),
    ("docs/method.md", "commonsense", "quality_commonsense", commonsense),
    ("docs/method.md", "decoding", "quality_decoding", decoding),
    ("docs/method.md", "cost", "quality_cost", cost),
)
