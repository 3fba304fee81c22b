"""The tables of what takes fewer steps: guesses, and prompts that are not read again."""

from statistics import geometric_mean
from typing import Any

from benchmarks.engine.tables import DTYPES, source
from benchmarks.tables import number, table


def speculation(result: dict[str, Any]) -> str:
    """Format what a step of several tokens costs, and what look-up gains on texts."""
    steps = {case["dtype"]: case["contenders"] for case in result["cases"] if "texts" not in case}
    texts = {
        (case["texts"], case["dtype"]): case["contenders"]
        for case in result["cases"]
        if "texts" in case
    }
    new = list(steps[DTYPES[0]])
    rows = [
        [dtype, number(steps[dtype]["1"]["median"] * 1e3)]
        + [f"{steps[dtype][n]['ratio']:.2f}" for n in new[1:]]
        for dtype in DTYPES
    ]
    costs = table(["a step of", "1 token, ms", *(f"{n} tokens, ratio" for n in new[1:])], rows)
    cells = []
    for kind in dict.fromkeys(kind for kind, _ in texts):
        for name in texts[kind, DTYPES[0]]:
            found = [texts[kind, dtype][name] for dtype in DTYPES]
            if min(x["tokens"] for x in found) > 1:
                each = [(f"{x['per step']:.2f}", f"{x['speedup']:.2f}x") for x in found]
                cells.append([name, *each[0], *each[1]])
        means = [
            geometric_mean(x["speedup"] for x in texts[kind, d].values() if x["tokens"] > 1)
            for d in DTYPES
        ]
        cells.append([f"**{kind}, mean**", "", f"**{means[0]:.2f}x**", "", f"**{means[1]:.2f}x**"])
    head = ["text", *(cell for d in DTYPES for cell in (f"{d}, tokens per step", "speed"))]
    return (
        "CPU time of one thread, batch 1, against the same engine without guesses, in turns; texts "
        "are greedy, of up to 48 tokens, the prompt's reading included. "
        f"{source(result, 'transformers', 'peft')}.\n\n"
        f"{costs}\n\n{table(head, cells)}"
    )


def prefix(result: dict[str, Any]) -> str:
    """Format when a prompt has its first token, and the second turn of a chat."""
    alone, turn = sorted(result["cases"], key=lambda case: "new_tokens" in case)
    seconds = {
        name: number(found["median"])
        for case in (alone, turn)
        for name, found in case["contenders"].items()
    }
    read = turn["contenders"]
    sooner = read["read anew"]["median"] / read["read on"]["median"]
    return (
        f"A prompt of {alone['tokens']} tokens has its first token after {seconds['steered']} s if "
        f"both models read it, and after {seconds['adapted']} s if the adapted model reads it "
        f"alone: {alone['ratio']:.2f} times the time. The second turn of a chat, a prompt of "
        f"{turn['tokens']} tokens of which {turn['new_tokens']} are a new question, has it after "
        f"{seconds['read on']} s, and after {seconds['read anew']} s where it is read anew: "
        f"{sooner:.0f} times sooner. The cache then holds {turn['kept_bytes'] / 1e6:.0f} MB. CPU "
        f"time of one thread in {turn['dtype']}. {source(result, 'transformers', 'peft')}."
    )


def levers(result: dict[str, Any]) -> str:
    """Format what each lever gains on one request, alone and together."""
    (case,) = result["cases"]
    rows = [
        [name, number(found["median"]), f"{found['speedup']:.2f}x"]
        for name, found in case["contenders"].items()
    ]
    return (
        f"Seconds of a request: {case['tokens']} new tokens, which repeat the end of the prompt, "
        f"after {case['prompt']}, of which an earlier request began with {case['before']}. Weights "
        "are float32 where not said otherwise; CPU time of one thread, in turns. "
        f"{source(result, 'transformers', 'peft')}.\n\n"
        f"{table(['levers', 's', 'speed'], rows)}"
    )


TABLES = (
    ("docs/performance.md", "speculation", "cpu_speculation", speculation),
    ("docs/performance.md", "prefix", "cpu_prefix", prefix),
    ("docs/performance.md", "levers", "cpu_levers", levers),
)
