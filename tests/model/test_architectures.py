"""The architectures of transformers: decoded exactly, or refused by name."""

import pytest

from svd_engine.ops import cpu
from tests import limits
from tests.model import architecture_cases as cases

SAMPLE = {
    "gpt_oss": "paired", "deepseek_v3": "two passes", "olmo3": "paired", "mpt": "paired",
    "phimoe": "refused", "bamba": "refused", "bart": "refused", "bloom": "refused",
}  # fmt: skip


def check(found):
    assert found.error < 1e-5
    assert found.wrong_tokens == 0


@pytest.mark.parametrize("architecture", SAMPLE)
def test_a_sample(architecture):
    found = cases.found(architecture)
    assert found.outcome == SAMPLE[architecture]
    check(found)


@pytest.mark.slow
def test_every_architecture_and_its_row_of_the_page():
    found = limits.found_architectures()
    for row in found:
        check(row)
    if not limits.is_documented_transformers():
        pytest.skip("docs/limits.md was made with another transformers")
    assert limits.table("architectures") == limits.architectures().splitlines()
    if cpu.unavailable() is None:
        assert limits.table("steps") == limits.steps().splitlines()
    assert len(found) > 100
