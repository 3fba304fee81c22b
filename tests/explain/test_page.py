"""The page's data against plain models in float64, and its slider in a browser."""

import base64
import json
import re
import shutil
import subprocess
from html import unescape

import numpy as np
import pytest
import torch

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.explain import collect, page, write
from tests.tiny import tiny_peft

PROMPTS = ["w005 w017", "w101", "w007 w120 w003"]
STEERING = SteeringConfig(-6.0, alpha=0.02)
CALIBRATION = {
    "curve": [[-10, 2.0], [-5, 1.5], [0, 2.5], [5, 4.0]], "strength": -6.0,
    "interval": [-8.0, -3.0], "objective": "preference",
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(words):
    return SteeredEngine(tiny_peft("llama"), words, STEERING)


@pytest.fixture(scope="module")
def explained(engine):
    return collect.collect(engine, engine.inputs.prompts(PROMPTS), 12)


@pytest.fixture(scope="module")
def written(engine, explained, words):
    return page.render(PROMPTS, explained, words, STEERING, "A <page>", CALIBRATION)


def contents(html):
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])
    ids = f"<u{data['tokenBytes']}"
    types = {"start": "<u4", "divergence": "<f4", "p": "<f4", "delta": "<f4"}
    types |= {"adaptedP": "<u2", "baseP": "<u2"}
    columns = {
        name: np.frombuffer(base64.b64decode(text), types.get(name, ids))
        for name, text in data["columns"].items()
    }
    return data, columns


@torch.no_grad()
def plain(model, ids, first):
    """p and q at each place from `first` on, in float64, from two plain passes."""
    row = torch.tensor([ids[:-1]])
    adapted = model(row).logits[0, first - 1 :].double()
    with model.disable_adapter():
        base = model(row).logits[0, first - 1 :].double()
    return adapted.softmax(-1), base.softmax(-1)


def test_every_figure_against_float64(engine, explained, written):
    data, columns = contents(written)
    place = 0
    for prompt, group in zip(PROMPTS, explained, strict=True):
        assert [answer.model for answer in group] == ["base", "adapted", "steered"]
        for answer in group:
            ids = engine.inputs.prompts([prompt])[0]
            tokens = [position.token for position in answer.positions]
            alone = engine.generate(prompt, model=answer.model, max_new_tokens=12)
            assert tokens == alone[0].token_ids
            p, q = plain(engine.model, ids + tokens, len(ids))
            for k in range(len(tokens)):
                entries = slice(*columns["start"][place : place + 2])
                support = (p[k] >= STEERING.alpha * p[k].max()).nonzero()[:, 0].tolist()
                words_ = [data["vocabulary"][i].strip() for i in columns["supportToken"][entries]]
                assert sorted(words_) == [f"w{i:03}" for i in support]
                d = p[k].log() - q[k].log()
                listed = [int(word[1:]) for word in words_]
                delta = (p[k] * ((p[k] * d).sum() - d))[listed]
                assert np.allclose(columns["p"][entries], p[k][listed], atol=1e-5)
                assert np.allclose(columns["delta"][entries], delta, atol=1e-4)
                assert columns["divergence"][place] == pytest.approx(
                    float((p[k] * d).sum()), abs=1e-4
                )
                best = q[k].sort(descending=True).values[: data["top"]] * 65535
                shown = columns["baseP"][place * data["top"] :][: data["top"]]
                assert np.allclose(shown, best, atol=2)
                place += 1
    assert place == len(columns["token"])


def test_it_is_one_file(written):
    assert "A &lt;page&gt;" in written and not re.search(r"(src|href)=|@import|url\(", written)
    assert "https://" not in written


def test_the_slider_meets_0_and_the_strength():
    for strength in (-9.6, 0.3, -0.01, 1.0, 40.0, 0.0):
        step = page._step(strength)
        assert strength / step == pytest.approx(round(strength / step), abs=1e-6)
        assert 100 * step >= 2 * abs(strength) - 1e-9


def test_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    lines = [{"prompt": "a", "completion": "b"}, {"messages": chat}, {"prompt": [1, 2]}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert write.read(path) == [{"prompts": ["a"]}, {"messages": chat[:1]}, {"prompts": [[1, 2]]}]
    for text, message in (
        ("{}", r'jsonl:1: a line is an object with "prompt" or "messages"'),
        ('{"prompt": 5}', "jsonl:1: prompt is text or token ids; got 5"),
        ('{"messages": "x"}', "jsonl:1: messages must be a list"),
        ("x", "jsonl:1: not JSON"),
        ("", "holds no prompts"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            write.read(path)


def test_the_command(run, tiny_folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS)
    )
    shutil.copytree(tiny_folder / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "calibration.json").write_text(json.dumps(CALIBRATION))
    options = [
        "explain", tmp_path / "prompts.jsonl", tmp_path / "page.html",
        "--adapter", tmp_path / "adapter", "--base", tiny_folder / "base", "--max-new-tokens", 5,
    ]  # fmt: skip
    code, _, err = run(*options)
    assert code == 2 and "no steering_config.json" in err and not (tmp_path / "page.html").exists()
    code, _, err = run(*options, "--strength", -4, "--alpha", 0)
    assert code == 2 and "alpha = 0 steers the whole vocabulary" in err
    code, out, err = run(*options, "--strength", -4, "--limit", 2)
    assert code == 0 and out.startswith("2 prompts in "), err
    data, _ = contents((tmp_path / "page.html").read_text())
    assert data["strength"] == -4 and len(data["prompts"]) == 2
    assert data["calibration"]["curve"] == CALIBRATION["curve"]


CHECK = """
const text = [];
for (const mu of [-6, 0, 3]) {
  slider.value = Math.round(mu / data.step);
  slider.dispatchEvent(new Event("input"));
  text.push(spans.map((s, i) => choose(i, strengthNow())),
    answers.map((a) => a.parts.textContent));
}
spans[1].dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
const panel = document.getElementById("panel").innerText;
const heading = document.querySelector("h1").innerText;
const spoken = document.getElementById("spoken").textContent;
const drawn = document.querySelectorAll("#curve path").length;
spans[0].focus();
spans[0].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
const focused = document.activeElement.dataset.i;
const all = {text, panel, heading, spoken, drawn, focused, errors};
document.body.textContent = "FOUND" + JSON.stringify(all) + "END";
"""


def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    return found or pytest.skip("no Chromium")


def opened(html, folder):
    """What CHECK finds in the page."""
    errors = "<script>const errors = []; onerror = (e) => { errors.push(String(e)); };</script>"
    html = html.replace("<script ", errors + "<script ", 1)
    path = folder / "page.html"
    path.write_text(html.replace("</body>", f"<script>{CHECK}</script></body>"))
    done = subprocess.run(
        [
            browser(), "--headless=new", "--no-sandbox", "--disable-gpu",
            f"--user-data-dir={folder / 'user'}", "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search("FOUND(.*)END", done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1]))


def test_in_a_browser(engine, explained, written, tmp_path):
    found = opened(written, tmp_path)
    assert found["errors"] == [] and found["focused"] == "1"
    assert found["heading"] == "A <page>" and found["drawn"] == 1
    assert "support of" in found["panel"] and "Adapted" in found["panel"]
    assert found["spoken"].startswith("Token")
    vocabulary = contents(written)[0]["vocabulary"]
    for i, strength in enumerate((-6, 0, 3)):
        chosen, notes = (iter(part) for part in found["text"][2 * i : 2 * i + 2])
        for prompt, group in zip(PROMPTS, explained, strict=True):
            ids = engine.inputs.prompts([prompt])[0]
            for answer in group:
                tokens = [position.token for position in answer.positions]
                p, q = plain(engine.model, ids + tokens, len(ids))
                d = p.log() - q.log()
                moved = p.log() + strength * p * ((p * d).sum(-1, keepdim=True) - d)
                moved[p < STEERING.alpha * p.max(-1, keepdim=True).values] = -torch.inf
                best = moved.argmax(-1).tolist()
                got = [vocabulary[next(chosen)].strip() for _ in tokens]
                assert got == [f"w{token:03}" for token in best]
                other = [k + 1 for k, token in enumerate(tokens) if best[k] != token]
                note = f"parts at token {other[0]}:" if other else "the same to its end"
                assert note in next(notes)
