"""The snippets of the documentation run and say the truth; its links lead somewhere."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svd_engine import SteeredEngine, SteeringConfig, loading
from tests.tiny import tiny_base, tiny_peft

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def test_operators():
    names = {}
    for snippet in snippets("docs/operators.md"):
        exec(snippet, names)
    assert names["nats"].shape == (64,)


def test_the_engine_decodes(words, capsys):
    engine = SteeredEngine(tiny_peft(), words, SteeringConfig(-2.0))
    plain = dict(plain_model=tiny_base("llama"), tokenizer=words)
    names = dict(engine=engine, prompts=["w005", "w017 w040"], **plain)
    for snippet in snippets("docs/engine.md"):
        exec(snippet, names)
    assert len(names["best"]) == 4 and capsys.readouterr().out


def test_the_engine_takes_requests_beside_each_other(words, capsys):
    engine = SteeredEngine(tiny_peft(), words, SteeringConfig(-2.0))
    exec(*snippets("docs/serving.md"), dict(engine=engine, prompts=["w005", "w017 w040"]))
    engine.close()
    assert capsys.readouterr().out


def test_the_three_loops_agree():
    names = {}
    for snippet in snippets("docs/own-loop.md"):
        exec(snippet, names)
    model, ids = tiny_peft(), torch.tensor([[5, 17, 40]])
    plain = names["decode_plain"](model, ids, 10, -4.0)
    assert plain.shape == (1, 13)
    assert torch.equal(names["decode_with_operator"](model, ids, 10, -4.0), plain)
    assert torch.equal(names["decode_with_engine"](model, ids, 10, -4.0), plain)


def test_the_readme_runs_on_its_operators():
    names = {}
    exec(snippets("README.md")[1], names)
    assert names["token"].shape == names["logprob"].shape == (4,)


def test_the_readme_runs_after_the_demo(tiny_folder, tmp_path, monkeypatch, capsys):
    """A tiny model, adapter and examples stand in for those that `make demo` leaves."""
    demo = tmp_path / "runs" / "demo"
    shutil.copytree(tiny_folder / "base", tmp_path / "smollm2")
    shutil.copytree(tiny_folder / "adapter", demo / "adapter")
    SteeringConfig(-1.0, base_model="smollm2").save_pretrained(demo / "adapter")
    examples = [
        dict(prompt=f"w{i:03} w017", completion="w033 w005", rejected=["w101", "w200 w004"])
        for i in range(5, 11)
    ]
    (demo / "calibration.jsonl").write_text("\n".join(map(json.dumps, examples)) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "SMOLLM2", None)  # so that "smollm2" is the folder here
    names = {}
    exec(snippets("README.md")[0], names)
    assert names["report"].examples == len(examples)
    assert names["engine"].steering.ranking == SteeringConfig(strength=-4.0, alpha=0.1)
    assert names["completion"].text in capsys.readouterr().out


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "images" / "quality_curves.svg").is_file()


def anchors(page):
    """The ids that GitHub and mkdocs give to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link
