"""The list of mutants keeps up with the code."""

import shlex
from pathlib import Path

import pytest

from tests import kernel_mutants
from tests.mutants import BY_FILE, Mutant, mutants

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "mutant",
    mutants(BY_FILE, kernel_mutants.BY_FILE),
    ids=lambda mutant: f"{mutant.file}: {mutant.text}",
)
def test_its_text_occurs_once(mutant: Mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.text) == 1
    assert mutant.broken != mutant.text
    assert (ROOT / shlex.split(mutant.tests)[0]).is_file()
