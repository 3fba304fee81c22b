"""What it saves that a base may wait: python -m benchmarks.engine.lazy_base ADAPTER

Merges the adapter into a copy of SmolLM2-135M, pairs both checkpoints, and decodes questions of
TruthfulQA one at a time, with and without waiting in turns. Writes results/lazy_base.json.
"""

import argparse
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import records
from benchmarks.records import RESULTS, ROOT
from svd_engine import SteeredEngine, SteeringConfig, loading
from svd_engine.evaluate import truthfulqa, truthfulqa_files
from svd_engine.generation import lazy_base

QUESTIONS = ROOT.parent / "shared/data/truthfulqa/mc_task.json"
NEW = 40  # tokens per question


def measure(adapter: Path, count: int, dtype: str) -> dict[str, Any]:
    """Return milliseconds per token of both ways, and the share of the base's passes left out."""
    base, tokenizer = loading.load_base(loading.SMOLLM2, dtype=dtype)
    copy, _ = loading.load_base(loading.SMOLLM2, dtype=dtype)
    adapted: Any = loading.load_adapter(copy, adapter).merge_and_unload()
    steering = SteeringConfig.from_pretrained(adapter)
    engine = SteeredEngine.from_checkpoints(adapted, base, tokenizer, steering=steering)
    made: list[Any] = []

    def kept(*arguments: Any) -> Any:
        made.append(decoder(*arguments))
        return made[-1]

    decoder, ways = (
        lazy_base.decoder,
        {"waits": kept, "reads": lambda pair, otherwise, *_: otherwise},
    )
    ms: dict[str, list[float]] = {name: [] for name in ways}
    for question in truthfulqa.test(truthfulqa_files.read(QUESTIONS))[:count]:
        texts = set()
        for name, way in ways.items():
            with mock.patch.object(lazy_base, "decoder", way):
                start = time.perf_counter()
                (got,) = engine.generate(messages=[{"role": "user", "content": question.question}],
                                         max_new_tokens=NEW)  # fmt: skip
            after_first = time.perf_counter() - start - got.seconds_to_first_token
            ms[name].append(1e3 * after_first / max(1, len(got.token_ids) - 1))
            texts.add(tuple(got.token_ids))
        assert len(texts) == 1, "a base that waits has changed a token"
    steps, passes = (sum(getattr(x, key) for x in made) for key in ("steps", "base_passes"))
    medians = {name: statistics.median(times) for name, times in ms.items()}
    ratio = statistics.median(a / b for a, b in zip(ms["reads"], ms["waits"], strict=True))
    return {
        "alpha": steering.alpha, "strength": steering.strength, "ms": medians,
        "reads / waits": ratio, "steps": steps, "passes of the base": passes,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--count", type=int, default=40, help="questions")
    given = parser.parse_args()
    result = {
        "command": "python -m benchmarks.engine.lazy_base ADAPTER",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": records.machine(),
        "versions": records.installed(),
        **{dtype: measure(given.adapter, given.count, dtype) for dtype in ("float32", "bfloat16")},
    }
    records.write(RESULTS / "lazy_base.json", result)
    print(records.to_json(result))


if __name__ == "__main__":
    main()
