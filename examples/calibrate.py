"""Fit the strength to examples and write it beside the adapter.

Each line of the data is JSON with `prompt`, `completion` and `rejected`, a list of wrong answers.
Run `make demo` first, or give your own adapter, data and base.
"""

import argparse
import json

from svd_engine import SteeredEngine

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("adapter", nargs="?", default="runs/demo/adapter")
parser.add_argument("data", nargs="?", default="runs/demo/calibration.jsonl")
parser.add_argument("base", nargs="?", default="smollm2", help='folder, Hub name or "smollm2"')
arguments = parser.parse_args()

with open(arguments.data, encoding="utf-8") as lines:
    examples = [json.loads(line) for line in lines]
engine = SteeredEngine.from_pretrained(arguments.base, arguments.adapter)
report = engine.calibrate(examples, alpha=[0.03, 0.1, 0.3])

low, high = report.interval
print(f"strength {report.strength:+.2f} [{low:+.2f}, {high:+.2f}], alpha {report.alpha:g}")
print(f"loss on held-out folds {report.loss_before:.4f} -> {report.loss_after:.4f}")
print(report.verdict)  # unless the gain is clear of 0, the engine's strength is now 0
print("written to", engine.steering.save_pretrained(arguments.adapter))
