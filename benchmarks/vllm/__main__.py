"""python -m benchmarks.vllm ADAPTER: a batch steered, with vLLM's own LoRA, and of the base.

The three engines are alive at once and take turns; it prints ratios of times, medians of rounds.
Needs a strength beside the adapter, and vLLM: make test-vllm sets up .venv/vllm.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

PROMPT = 32  # tokens


def engines(adapter: str, base: str | None, dtype: str, share: float) -> dict[str, Callable]:
    """Return functions of (batch, new tokens) that decode with each engine."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from svd_engine.integrations.vllm import engine_args

    common: dict[str, Any] = dict(
        dtype=dtype, max_model_len=512, gpu_memory_utilization=share, enable_prefix_caching=False
    )
    steered = engine_args(base, adapter, **common)
    plain = {"model": steered["model"], **common}
    made = {
        "steered": (LLM(**steered), None),
        "lora": (LLM(**plain, enable_lora=True, max_lora_rank=64), LoRARequest("a", 1, adapter)),
        "base": (LLM(**plain), None),
    }

    def decode(llm: LLM, lora: LoRARequest | None, batch: int, new: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        prompts = [
            {"prompt_token_ids": [10 + (row * 7 + place) % 90 for place in range(PROMPT)]}
            for row in range(batch)
        ]
        llm.generate(prompts, params, lora_request=lora, use_tqdm=False)

    return {
        name: lambda batch, new, llm=llm, lora=lora: decode(llm, lora, batch, new)
        for name, (llm, lora) in made.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm", description=__doc__)
    parser.add_argument("adapter")
    parser.add_argument("--base")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.2, help="of the memory, for each engine")
    options = parser.parse_args()
    decode = engines(options.adapter, options.base, options.dtype, options.share)
    print("| batch | steered / LoRA | steered / base |\n| ---: | ---: | ---: |")
    for batch in options.batches:
        times: dict[str, list[float]] = {name: [] for name in decode}
        for round_ in range(options.rounds + 1):
            for name, run in decode.items():
                start = time.perf_counter()
                run(batch, options.new_tokens)
                if round_:  # the first one warms up
                    times[name].append(time.perf_counter() - start)
        over = {
            name: [a / b for a, b in zip(times["steered"], times[name], strict=True)]
            for name in ("lora", "base")
        }
        cells = (f"{statistics.median(x):.2f} [{min(x):.2f}, {max(x):.2f}]" for x in over.values())
        print(f"| {batch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
