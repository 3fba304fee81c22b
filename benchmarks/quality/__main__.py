"""The paper's experiments at the size of one CPU: python -m benchmarks.quality truthfulqa

One command per table; each writes benchmarks/results/quality_<command>.json. Warm starts and passes
are kept in runs/quality, so a killed command continues when it is started again.
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


def about(command: str) -> dict[str, Any]:
    return {
        "command": f"python -m benchmarks.quality {command}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": records.machine(),
        "system": records.system(),
        "versions": records.installed(),
        "model": "SmolLM2-135M-Instruct",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("command", choices=[*COMMANDS, "plots"])
    parser.add_argument("--data", type=Path, default=DATA, help="truthfulqa/ and commonsense/")
    given = parser.parse_args()
    if given.command != "plots":
        experiments = import_module("benchmarks.quality.experiments")  # torch takes seconds
        result = about(given.command) | getattr(experiments, given.command)(given.data)
        path = RESULTS / f"quality_{given.command}.json"
        records.write(path, result)
        print(f"{path} is written")
    import_module("benchmarks.quality.plots").draw(RESULTS)


if __name__ == "__main__":
    main()
