"""The tables of the engine on the CPU: a token, whole requests, the first token."""

from typing import Any

from benchmarks import records
from benchmarks.tables import number, table

DTYPES = ("float32", "bfloat16")
CONTENDERS = {
    "steered": "**steered**, one paired batch",
    "adapted": "the same engine, adapted model alone",
    "sequential": 'steered, two passes (`pairing="sequential"`)',
    "generate, merged": "Hugging Face `generate`, merged, un-steered",
    "generate, PEFT": "Hugging Face `generate`, PEFT, un-steered",
    "naive": "naive: PEFT on, PEFT off, eager steering",
}
SUMMARY = {
    "steered": "**steered**: base and adapted model in one batch",
    "adapted": "not steered: the adapted model alone, same engine",
    "generate, merged": "not steered: Hugging Face `generate`, adapter merged",
    "naive": "steered naively: two PEFT passes, the formula in PyTorch",
}


def source(result: dict[str, Any], *packages: str) -> str:
    versions = records.named(result["versions"], *packages)
    return records.source(result, result["machine"], *versions, result["system"])


def decoding(result: dict[str, Any]) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Return the contenders of each case of decoding alone, by adapter, batch and dtype."""
    return {
        (case["adapter"], case["batch"], case["dtype"]): case["contenders"]
        for case in result["cases"]
        if "request" not in case["name"]
    }


def summary(result: dict[str, Any]) -> str:
    """Format the README's rows of `engine`, ms per token."""
    measured = decoding(result)
    rows = [
        [words, *(number(measured["LoRA", 1, d][name]["median"] * 1e3) for d in DTYPES)]
        for name, words in SUMMARY.items()
    ]
    return (
        f"{table(['ms per token', *DTYPES], rows)}\n\nSmolLM2-135M-Instruct with a LoRA on all "
        f"linear layers, batch 1. {source(result)}."
    )


def engine(result: dict[str, Any]) -> str:
    """Format milliseconds per token of every contender."""
    measured = decoding(result)
    first = result["cases"][0]
    rows = []
    for name, words in CONTENDERS.items():
        times = [measured["LoRA", 1, dtype][name] for dtype in DTYPES]
        cells = [(number(time["median"] * 1e3), f"{time['ratio']:.2f}") for time in times]
        rows.append([words, *cells[0], *cells[1]])
    head = ["", *(cell for dtype in DTYPES for cell in (f"{dtype}, ms/token", "ratio"))]
    batches = [
        f"{number(case['8 prompts']['tokens/s'])} tokens/s in {dtype}, against "
        f"{number(case['steered']['tokens/s'])} for one prompt"
        for dtype in DTYPES
        for case in [measured["LoRA", 8, dtype]]
    ]
    prefix = [
        f"{number(case['steered']['median'] * 1e3)} ms in {dtype}, "
        f"{1 / case['adapted']['ratio']:.2f} times the adapted model alone and "
        f"1/{case['naive']['ratio']:.1f} of the naive loop"
        for dtype in DTYPES
        for case in [measured["prefix", 1, dtype]]
    ]
    return (
        f"SmolLM2-135M-Instruct with a LoRA (r = 8, all linear layers), batch 1, "
        f"{first['prompt_tokens']} prompt tokens, {first['new_tokens']} new ones, prefill not "
        f"counted. {source(result, 'transformers', 'peft', 'svd-engine')}."
        f"\n\n{table(head, rows)}\n\n"
        f"Medians of {first['contenders']['steered']['rounds']} rounds in which the contenders "
        "take turns; a ratio is the median of the time over the steered time of the same round. "
        f"Steered, a batch of 8 prompts of different lengths: {'; '.join(batches)}. With prefix "
        f"tuning of 20 virtual tokens a steered token takes {'; '.join(prefix)}."
    )


def requests(result: dict[str, Any]) -> str:
    """Format seconds of whole requests by shape."""
    cases = [case for case in result["cases"] if "request" in case["name"]]
    rows = [
        [f"{case['prompt_tokens']} + {case['new_tokens']}, {case['dtype']}"]
        + [number(case["contenders"][name]["median"]) for name in CONTENDERS]
        for case in cases
    ]
    head = ["prompt + new tokens", *(words.replace("*", "") for words in CONTENDERS.values())]
    memory = [
        f"{case['weight_bytes'] / 1e6:.0f} MB of weights, each once, and "
        f"{case['cache_bytes'] / 1e6:.1f} MB of KV cache for both models in {case['dtype']}"
        for case in result["cases"]
        if "weight_bytes" in case and case["adapter"] == "LoRA"
    ]
    return (
        f"Seconds per request, prefill included. {source(result, 'transformers', 'peft')}.\n\n"
        f"{table(head, rows)}\n\nThe engine holds {'; '.join(memory)} "
        f"({result['cases'][0]['prompt_tokens'] + result['cases'][0]['new_tokens']} positions)."
    )


def start(result: dict[str, Any]) -> str:
    """Format seconds of a fresh process, part by part."""
    rows = []
    for case in result["cases"]:
        seconds = case["seconds"]
        until = sum(seconds[part] for part in ("import", "load", "first token"))
        cells = [number(x) for x in (*seconds.values(), until)]
        rows.append([f"{case['base']}, {case['dtype']}", *cells])
    head = [
        "SmolLM2-135M from",
        "import",
        "load",
        "first token",
        "the same again",
        "all to the first",
    ]
    return (
        f"Seconds; medians of {result['cases'][0]['rounds']} processes, files in the page cache. "
        f"{source(result, 'transformers', 'peft')}.\n\n{table(head, rows)}"
    )


MODELS = {
    ("SmolLM2-135M", "float32"): "SmolLM2-135M, float32",
    ("SmolLM2-135M", "bfloat16"): "SmolLM2-135M, bfloat16",
    ("Qwen2.5-0.5B", "bfloat16"): "Qwen2.5-0.5B's sizes, bfloat16",
}
PARTS = ("linear", "attention", "rest")


def steps_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the contenders of each model, by the model's words."""
    cases = {(case["model"], case["dtype"]): case["contenders"] for case in result["cases"]}
    return {words: cases[key] for key, words in MODELS.items() if key in cases}


def beside(result: dict[str, Any]) -> str:
    """Format the README's rows of `step`, ms per step: the limit and llama.cpp."""
    measured = {
        case["dtype"]: case["contenders"]
        for case in result["cases"]
        if case["model"] == "SmolLM2-135M"
    }
    wanted = {
        "steered": "**a steered step**: base and adapted model in one batch",
        "adapted": "not steered: the adapted model alone, same engine",
        "llama.cpp": "not steered: llama.cpp, the same weights",
        "read": "reading the weights once",
    }
    rows = [
        [words, *(milliseconds(measured[dtype].get(name)) for dtype in DTYPES)]
        for name, words in wanted.items()
    ]
    return (
        f"{table(['ms per step', *DTYPES], rows)}\n\nSmolLM2-135M-Instruct with a LoRA on all "
        "linear layers, batch 1, a context of 128. A step goes from embeddings to logits; "
        f"llama.cpp's includes its choice of the token. {source(result)}."
    )


def milliseconds(contender: dict[str, Any] | None) -> str:
    return "-" if contender is None else number(contender["median"] * 1e3)


def steps(result: dict[str, Any]) -> str:
    """Format milliseconds of a step and of its parts, and what it is held against."""
    measured = steps_of(result)
    names = list(dict.fromkeys(name for case in measured.values() for name in case))
    rows = []
    for name in names:
        cells = []
        for case in measured.values():
            found = case.get(name)
            cells.append(milliseconds(found))
            if found and PARTS[0] in found:
                cells[-1] += f" ({' + '.join(number(found[part] * 1e3) for part in PARTS)})"
            cells.append("-" if found is None else f"{found['ratio']:.2f}")
        rows.append([STEPS.get(name, name), *cells])
    head = ["", *(cell for words in measured for cell in (f"{words}, ms", "ratio"))]
    return (
        "Milliseconds of a native step (linear layers + attention + the rest): medians of "
        f"{next(iter(measured.values()))['steered']['rounds']} rounds in which the contenders take "
        "turns; a ratio is the median of the time over the steered time of the same round. LoRA "
        "(r = 8, all linear layers), batch 1 and a context of 128 where nothing else is said. "
        "llama.cpp's figure is of 16 tokens in a row and includes their choice. "
        f"{source(result, 'transformers', 'peft')}.\n\n{table(head, rows)}"
    )


STEPS = {
    "read": "reading the weights once (`torch.sum`, in order)",
    "steered": "**steered**",
    "adapted": "the adapted model alone",
    "8 new": "8 new tokens in one row",
    "llama.cpp": "llama.cpp, un-steered",
}


# (document, figures, where they come from, their table)
def weights(result: dict[str, Any]) -> str:
    """Format milliseconds of a step over codes, beside llama.cpp."""
    (case,) = result["cases"]
    rows = []
    for kind, size in case["held"].items():
        ours, llama = (case["contenders"].get(f"{kind}, {who}") for who in ("steered", "llama.cpp"))
        ratio = "-" if llama is None else f"{ours['median'] / llama['median']:.2f}"
        rows.append([kind, number(size / 1e6), milliseconds(ours), milliseconds(llama), ratio])
    head = ["weights", "MB held", "steered, ms", "llama.cpp, un-steered, ms", "ratio"]
    return (
        f"Milliseconds per step, medians of {case['rounds']} rounds in which the contenders take "
        "turns. SmolLM2-135M with a LoRA on all linear layers, batch 1; llama.cpp's weights are "
        f"bfloat16, Q8_0 and Q4_0. {source(result)}.\n\n{table(head, rows)}"
    )


TABLES = (
    ("README.md", "summary", "cpu_engine", summary),
    ("README.md", "step", "cpu_step", beside),
    ("docs/performance.md", "engine", "cpu_engine", engine),
    ("docs/performance.md", "steps", "cpu_step", steps),
    ("docs/performance.md", "weights", "cpu_weights", weights),
    ("docs/performance.md", "requests", "cpu_engine", requests),
    ("docs/performance.md", "start", "cpu_start", start),
)
