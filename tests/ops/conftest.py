"""The compilers of test_cubin.py work for minutes: they start first and are asked last."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest


def _compiles(item: pytest.Item) -> bool:
    return item.path.name == "test_cubin.py"


def pytest_collection_modifyitems(items):
    items.sort(key=_compiles)


@pytest.fixture(scope="session", autouse=True)
def compilers(request, tmp_path_factory):
    """A process for each target that is asked for, and the file in which it writes what it saw."""
    asked = [item for item in request.session.items if _compiles(item)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    folder = tmp_path_factory.mktemp("cubin")
    started = {}
    for item in asked if find_spec("triton") else ():
        target = item.callspec.params["target"]
        with open(folder / f"{target}.json", "wb") as file:
            command = ["nice", sys.executable, "-W", "ignore", item.path, str(target)]
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        started[target] = process, folder / f"{target}.json"
    yield started
    for process, _ in started.values():
        process.kill()
