"""`svd-engine chat`: each answer is that of the engine to the conversation so far."""

import pytest

from svd_engine import SteeredEngine, SteeringConfig
from tests.cli.test_main import check_error

TEMPLATE = "{% for m in messages %}w01{{ m.role | length }} {{ m.content }} {% endfor %}w020"


@pytest.fixture
def command(run, tiny_folder):
    template = tiny_folder / "base" / "chat_template.jinja"
    template.write_text(TEMPLATE)
    folders = ["--adapter", tiny_folder / "adapter", "--base", tiny_folder / "base"]
    yield lambda stdin, *more: run("chat", *folders, *more, stdin=stdin)
    template.unlink()


def test_turns(command, tiny_folder):
    options = ["--strength", -2, "--max-new-tokens", 5, "--system", "w030"]
    code, out, err = command("w005 w006\n\n w007 \n", *options)
    assert code == 0 and err == ""
    engine = SteeredEngine.from_pretrained(tiny_folder / "base", tiny_folder / "adapter")
    engine.steering = SteeringConfig(-2.0)
    messages = [dict(role="system", content="w030")]
    for question, answer in zip(("w005 w006", "w007"), out.splitlines(), strict=True):
        messages.append(dict(role="user", content=question))
        (truth,) = engine.generate(messages=messages, max_new_tokens=5)
        assert answer == truth.text
        messages.append(dict(role="assistant", content=answer))


def test_refusals(command):
    check_error(command("w005\n"), "give --strength")
    check_error(command("w005\n", "--strength", 1, "--set", "n=2"), "'n' is num_return_sequences")
    check_error(command("w005 " * 200 + "\n", "--strength", 1), "does not fit")


def test_what_no_question_could_be_asked_with_is_said_before_the_first(command, tiny_folder):
    check_error(command("", "--strength", 1, "--max-new-tokens", 500), "does not fit")
    (tiny_folder / "base" / "chat_template.jinja").write_text("{{ raise_exception('no system') }}")
    check_error(command("", "--strength", 1, "--system", "w030"), "no system")
