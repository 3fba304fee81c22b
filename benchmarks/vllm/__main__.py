"""Steered decoding in vLLM against vLLM's own LoRA, its bare base, and the engine without vLLM.

The four are alive at once, each in processes of its own, and take turns; needs a strength beside
the adapter, and vLLM: make test-vllm sets up .venv/vllm. Writes benchmarks/results/cpu_vllm.json.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import records

PROMPT = 32  # tokens
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
Decode = Callable[[list[list[int]], int], None]


def vllm_contenders(folder: Path, dtype: str, share: float) -> dict[str, Decode]:
    """Engines of vLLM over an exported folder."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    common: dict[str, Any] = dict(
        dtype=dtype, max_model_len=512, gpu_memory_utilization=share, enable_prefix_caching=False,
        enforce_eager=True, disable_log_stats=True,
    )  # fmt: skip
    config = records.read(folder / "config.json")
    steered = config["architectures"][0]
    plain = common | {"hf_overrides": {"architectures": [steered.removeprefix("Steered")]}}
    rank = records.read(folder / "adapter" / "adapter_config.json")["r"]
    lora = {"enable_lora": True, "max_lora_rank": max(8, rank)}
    made = {
        "steered": (LLM(str(folder), **common), None),
        "lora": (LLM(str(folder), **plain, **lora), LoRARequest("a", 1, str(folder / "adapter"))),
        "base": (LLM(str(folder), **plain), None),
    }

    def decode(llm: LLM, lora: LoRARequest | None, prompts: list[list[int]], new: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        llm.generate(given, params, lora_request=lora, use_tqdm=False)

    return {name: partial(decode, *each) for name, each in made.items()}


def engine_contender(base: str, adapter: str, dtype: str) -> Decode:
    import torch

    from svd_engine import SteeredEngine

    engine = SteeredEngine.from_pretrained(base, adapter, dtype=getattr(torch, dtype))

    def decode(prompts: list[list[int]], new: int) -> None:
        engine.generate(prompts, max_new_tokens=new, eos_token_id=[])

    return decode


def measure(contenders: dict[str, Decode], batch: int, new: int, rounds: int) -> dict[str, Any]:
    """Times of whole calls, in turns, and their ratios to the steered one's of the same turn."""
    prompts = [
        [10 + (row * 7 + place) % 90 for place in range(PROMPT)] for row in range(batch)
    ]  # no two rows alike
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, decode in contenders.items():
            start = time.perf_counter()
            decode(prompts, new)
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    found: dict[str, Any] = {"batch": batch, "new_tokens": new, "rounds": rounds}
    for name, each in times.items():
        ratios = [a / b for a, b in zip(times["steered"], each, strict=True)]
        found[name] = {
            "median": statistics.median(each), "ratio": statistics.median(ratios),
            "ratios": [min(ratios), max(ratios)],
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm", description=__doc__)
    parser.add_argument("adapter", nargs="?", default="runs/demo/adapter", help="make demo's")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each contender")
    parser.add_argument("--share", type=float, default=0.1, help="of the memory, for each vLLM")
    options = parser.parse_args()
    told = [word for word in sys.argv[1:] if word != options.adapter]
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(options.threads))
    from svd_engine import Steering, hub, loading
    from svd_engine.integrations.vllm.export import export_folder

    adapter = hub.adapter_folder(options.adapter)
    base, steering = loading.base_of(adapter, None), Steering.from_pretrained(adapter)
    with tempfile.TemporaryDirectory() as temporary:
        folder = export_folder(Path(temporary) / "served", base, adapter, steering)
        contenders = vllm_contenders(folder, options.dtype, options.share)
        contenders["engine"] = engine_contender(base, str(adapter), options.dtype)
        cases = []
        for batch in options.batches:
            cases.append(measure(contenders, batch, options.new_tokens, options.rounds))
            print(records.plain(cases[-1]), flush=True)
    result = {
        "command": " ".join(["python -m benchmarks.vllm", *told]), "date": date.today().isoformat(),
        "machine": records.machine(), "system": records.system(),
        "versions": records.installed() | records.versions("vllm-cpu", "vllm"),
        "dtype": options.dtype, "cases": cases,
    }  # fmt: skip
    records.write(records.RESULTS / "cpu_vllm.json", result)


if __name__ == "__main__":
    main()
