"""The paper's experiments on a small model: python -m benchmarks.quality truthfulqa

One command per table; each writes benchmarks/results/quality_<command>.json. Warm starts and passes
are kept in runs/quality, so a killed command continues when it is started again. On a CPU the
tables take hours, on a GPU (`--device cuda --jobs 10`) minutes.
"""

import argparse
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.records import RESULTS, ROOT

DATA = ROOT.parent / "shared" / "data"
COMMANDS = ("truthfulqa", "commonsense", "ablations", "alpha", "steps", "decoding", "cost")


def about(command: str, device: str) -> dict[str, Any]:
    import torch

    on_cpu = device == "cpu"
    options = "" if on_cpu else f" --device {device}"
    return {
        "command": f"python -m benchmarks.quality {command}{options}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": records.machine() if on_cpu else torch.cuda.get_device_name(device),
        "system": records.system(),
        "versions": records.installed(),
        "model": "SmolLM2-135M-Instruct",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("command", choices=[*COMMANDS, "plots"])
    parser.add_argument("--data", type=Path, default=DATA, help="truthfulqa/ and commonsense/")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time")
    given = parser.parse_args()
    if given.command != "plots":
        experiments = import_module("benchmarks.quality.experiments")  # torch takes seconds
        place = experiments.Place(given.data, given.device, given.jobs)
        measured = getattr(experiments, given.command)(place)
        result = about(given.command, given.device) | measured
        path = RESULTS / f"quality_{given.command}.json"
        records.write(path, result)
        print(f"{path} is written")
    import_module("benchmarks.quality.plots").draw(RESULTS)


if __name__ == "__main__":
    main()
