"""The snippets of the documentation run and say the truth; its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_peft

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def test_operators():
    names = {}
    for snippet in snippets("docs/operators.md"):
        exec(snippet, names)
    assert names["nats"].shape == (64,)


def test_the_three_loops_agree():
    names = {}
    for snippet in snippets("docs/own-loop.md"):
        exec(snippet, names)
    model, ids = tiny_peft(), torch.tensor([[5, 17, 40]])
    plain = names["decode_plain"](model, ids, 10, -4.0)
    assert plain.shape == (1, 13)
    assert torch.equal(names["decode_with_operator"](model, ids, 10, -4.0), plain)
    assert torch.equal(names["decode_with_engine"](model, ids, 10, -4.0), plain)


def test_the_readme_names_what_exists():
    import svd_engine

    first, second = snippets("README.md")
    names = re.findall(r"from svd_engine import (.*)", first)[0].split(", ")
    assert all(hasattr(svd_engine, name) for name in names)
    for method in re.findall(r"engine\.(\w+)", first):
        assert hasattr(svd_engine.SteeredEngine, method)
    logits = torch.randn(2, 50)
    exec(second, dict(adapted_logits=logits, base_logits=logits))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
