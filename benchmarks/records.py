"""Results as JSON: what a figure needs to be believed, and the one way to write it.

Importing this module imports neither torch nor transformers.
"""

import json
import math
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import svd_engine
from svd_engine.utils.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DIGITS = 4  # significant digits of a measured number


def machine() -> str:
    """Describe what runs the CPU kernels: processor, threads, instruction set, torch."""
    import cpuinfo
    import torch

    from svd_engine.ops import cpu

    name, threads = cpuinfo.get_cpu_info().get("brand_raw", "CPU"), torch.get_num_threads()
    return f"{name}, {threads} threads, {cpu.capability()}, torch {torch.__version__}"


def system() -> str:
    return f"{platform.system()} {platform.machine()}"


def versions(*packages: str) -> dict[str, str | None]:
    """Map each package to its installed version, None if it is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def installed() -> dict[str, str | None]:
    """Return the versions that a CPU figure depends on."""
    return versions("torch", "transformers", "peft") | {"svd-engine": svd_engine.__version__}


def named(known: Mapping[str, Any], *packages: str) -> list[str]:
    """List "package version" for the packages whose version is known."""
    return [f"{name} {known[name]}" for name in packages if known.get(name)]


def source(result: Mapping[str, Any], *where: str) -> str:
    """Say in one line where, when and by which command a result was measured."""
    note = f" ({result['note']})" if "note" in result else ""
    return f"{', '.join([*where, result['date']])}; `{result['command']}`{note}"


def plain(value: Any) -> Any:
    """Convert to what JSON can hold: string keys, lists, finite floats of `DIGITS` digits.

    Strings lose the folders of this computer.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value.replace(str(ROOT), ".").replace(f"{sys.prefix}/lib/", "")
    return value


def to_json(value: Any, indent: str = "") -> str:
    """Format as JSON with one line per list element, so that a new run is a readable diff.

    List elements are made plain.
    """
    inner = indent + "  "
    if isinstance(value, dict) and value:
        parts = [f"{json.dumps(key)}: {to_json(x, inner)}" for key, x in value.items()]
        left, right = "{}"
    elif isinstance(value, list) and value:
        parts = [json.dumps(plain(x)) for x in value]
        left, right = "[]"
    else:
        return json.dumps(value)
    return f"{left}\n" + ",\n".join(inner + part for part in parts) + f"\n{indent}{right}"


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result whole or not at all."""
    write_text(path, to_json(result) + "\n")


def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result
