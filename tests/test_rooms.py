"""The floors of svd_engine: which rooms a room may import, and who may import PEFT."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "svd_engine"
BELOW_ENGINE = {
    "calibration", "generation", "model", "ops", "kernels", "data", "utils", "steering_config",
    "loading", "hub",
}  # fmt: skip
MAY_IMPORT = {
    "kernels": {"torch", "triton"},
    "utils": set(),
    "data": {"utils"},
    "ops": {"kernels"},
    "model": {"ops"},
    "steering_config": {"hub", "ops", "utils"},
    "hub": set(),
    "loading": {"hub", "model", "steering_config", "utils"},
    "generation": {"model", "ops", "kernels", "data", "utils", "steering_config"},
    "calibration": {"generation", "model", "ops", "kernels", "data", "utils", "steering_config"},
    "training": {"model", "data", "utils"},
    "engine": BELOW_ENGINE,
    "integrations": BELOW_ENGINE | {"engine"},
    "evaluate": BELOW_ENGINE | {"engine"},
    "explain": BELOW_ENGINE | {"engine"},
    "serve": {"engine", "generation", "steering_config"},
    "cli": BELOW_ENGINE | {"engine", "evaluate", "explain", "serve", "training", "integrations"},
    "__main__": {"cli"},
}
KNOW_PEFT = {"model", "training", "integrations"}


def imports(node: ast.AST) -> Iterator[str]:
    """Yield the dotted name of every absolute import, except those for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and not child.level:
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imports(child)


def test_every_room_has_a_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    assert rooms | {path.stem for path in PACKAGE.glob("*.py")} == {*MAY_IMPORT, "__init__"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_floors_below(room):
    files = list((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    names = {name for file in files for name in imports(ast.parse(file.read_text()))}
    top = {name.split(".")[0] for name in names}
    if room == "kernels":
        assert top - sys.stdlib_module_names <= MAY_IMPORT[room]
    assert "peft" not in top or room in KNOW_PEFT
    ours = {name.split(".")[1] for name in names if name.startswith("svd_engine.")}
    faces = {"SteeredEngine": "engine", "SteeringConfig": "steering_config"}
    ours = {faces.get(name, name) for name in ours} - {"__version__", room}
    assert room == "kernels" or ours <= MAY_IMPORT[room]
