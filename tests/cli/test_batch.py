"""`generate --input`: the answers of the requests alone, in order; a killed run goes on."""

import json

import pytest

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.ops import cpu

REQUESTS = [
    dict(prompt="w005 w021", id="a"),
    dict(prompt=[101, 7], max_new_tokens=3),
    dict(prompt="w030", max_new_tokens=3, strength=1.0),
    dict(prompt="w005", temperature=1.3, seed=4, num_return_sequences=2, suppress_tokens=[9]),
    dict(prompt="w005 w021", num_beams=2, model="adapted"),
]


@pytest.fixture
def command(run, tiny_folder, tmp_path):
    def call(lines, *more):
        text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
        (tmp_path / "in.jsonl").write_text(text)
        return run(
            "generate", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl",
            "--adapter", tiny_folder / "adapter", "--base", tiny_folder / "base",
            "--strength", -2, "--max-new-tokens", 5, *more,
        )  # fmt: skip

    return call


def test_requests_are_answered_and_a_killed_run_goes_on(command, tmp_path, tiny_folder):
    code, out, _ = command(REQUESTS)
    path = tmp_path / "out.jsonl"
    whole = path.read_text()
    assert code == 0 and "5 requests, 5 of them new" in out
    engine = SteeredEngine.from_pretrained(tiny_folder / "base", tiny_folder / "adapter")
    engine.steering = SteeringConfig(-2.0)
    for request, text in zip(REQUESTS, whole.splitlines(), strict=True):
        options = {"max_new_tokens": 5, **request}
        prompt, strength = options.pop("prompt"), options.pop("strength", -2.0)
        options.pop("id", None)
        engine.steering = SteeringConfig(strength)
        truth = engine.generate([prompt], **options)
        line = json.loads(text)
        assert line["prompt"] == prompt and line.get("id") == request.get("id")
        assert [c["token_ids"] for c in line["completions"]] == [c.token_ids for c in truth]
        assert [c["text"] for c in line["completions"]] == [c.text for c in truth]
    path.write_text(whole[: whole.index("\n") + 30])  # killed in its second line
    code, out, _ = command(REQUESTS)
    assert code == 0 and "4 of them new" in out
    ids = [
        [[c["token_ids"] for c in json.loads(x)["completions"]] for x in text.splitlines()]
        for text in (path.read_text(), whole)
    ]
    assert ids[0] == ids[1]
    kept = path.read_text()
    codes = [(REQUESTS, ("--weights", "int8"))] if cpu.unavailable() is None else []
    for lines, more in ((REQUESTS[1:], ()), (REQUESTS, ("--alpha", 0.5)), *codes):
        code, _, err = command(lines, *more)
        assert code == 2 and "answers another request" in err and path.read_text() == kept


@pytest.mark.parametrize(
    "line, message",
    [
        ("{oops", "in.jsonl:2"),
        ("{}", "in.jsonl:2: a request has prompt or messages"),
        (dict(prompt="w005", max_tokens=3), "in.jsonl:2: request: 'max_tokens' is max_new_tokens"),
        (dict(prompt="w005", colour=3), "in.jsonl:2: request: there is no option 'colour'"),
        (dict(prompt="w005", temperature="hot"), "in.jsonl:2: temperature must be a number"),
        (dict(prompt=[5] * 200), "in.jsonl:2: prompts[0] does not fit"),
        (dict(messages=[dict(role="user", content="w005")]), "no chat template"),
        (dict(prompt=5), "in.jsonl:2: prompt is text or token ids; got 5"),
        (dict(prompt="w005", strength="much"), "in.jsonl:2: strength must be a number"),
    ],
)
def test_a_bad_request_stops_all_before_any_work(command, tmp_path, line, message):
    code, _, err = command([REQUESTS[0], line])
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_input_and_output_stand_alone(command, run, tiny_folder):
    assert "no prompts, --file" in command(REQUESTS, "w005")[2]
    result = run("generate", "--output", "x", "--adapter", tiny_folder / "adapter")
    assert result[0] == 2 and "belong together" in result[2]


def test_verbose_may_stand_anywhere(command):
    with pytest.raises(ValueError, match="a request has prompt or messages"):
        command(["{}"], "--verbose")
