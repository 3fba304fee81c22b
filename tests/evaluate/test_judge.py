"""The judge against a small server: what it is asked, how failures are met, what is kept."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from svd_engine.evaluate import judge as endpoint
from svd_engine.evaluate import verdicts
from svd_engine.evaluate.judge import Judge


def ask(judge, prompt="Is it?"):
    async def once():
        async with judge.client() as client:
            return await judge.ask(client, prompt)

    return asyncio.run(once())


LINE = {"question": "Why?", "right": ["So."], "wrong": ["Luck."]}


class Server:
    """Says yes where `agrees(prompt)`; answers the first requests with `failures` instead."""

    def __init__(self):
        self.prompts, self.headers, self.bodies = [], [], []
        self.failures, self.agrees = [], lambda prompt: "judge: Luck" not in prompt
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(this):  # noqa: N805
                body = json.loads(this.rfile.read(int(this.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                with lock:
                    self.prompts.append(prompt)
                    self.headers.append(dict(this.headers) | {"path": this.path})
                    self.bodies.append(body)
                    failure = self.failures.pop(0) if self.failures else None
                said = "Yes." if self.agrees(prompt) else "no"
                code, text, more = failure or (200, said, {})
                reply = {"choices": [{"message": {"content": text}}]} if code == 200 else text
                if code:
                    this.send_response(code)
                    for name, value in more.items():
                        this.send_header(name, value)
                    this.end_headers()
                    this.wfile.write(json.dumps(reply).encode())

            def log_message(this, *arguments):  # noqa: N805
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_the_environment_names_it(monkeypatch):
    for name in (endpoint.URL, endpoint.MODEL, endpoint.KEY):
        monkeypatch.delenv(name, raising=False)
    assert Judge.from_environment() is None
    monkeypatch.setenv(endpoint.URL, "http://localhost/v1/")
    with pytest.raises(ValueError, match="set SVD_JUDGE_MODEL"):
        Judge.from_environment()
    monkeypatch.setenv(endpoint.MODEL, "m")
    monkeypatch.setenv(endpoint.KEY, "hidden")
    judge = Judge.from_environment()
    assert judge == Judge("http://localhost/v1", "m", "hidden")
    assert "hidden" not in repr(judge)


def test_the_request(server):
    assert ask(Judge(server.url, "m", "key")) is True
    assert server.bodies == [
        {"model": "m", "messages": [{"role": "user", "content": "Is it?"}], "temperature": 0}
    ]
    assert server.headers[0]["Authorization"] == "Bearer key"
    assert server.headers[0]["path"] == "/v1/chat/completions"
    ask(Judge(server.url, "m"))
    assert "Authorization" not in server.headers[1]


@pytest.mark.parametrize(
    "failure",
    [
        (500, "broken", {}),
        (429, "slower", {"Retry-After": "0"}),
        (429, "slower", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        (200, "perhaps", {}),
        (200, "<think>no, no", {}),
        (0, "", {}),  # the connection is closed
    ],
)
def test_it_asks_again(server, failure):
    server.failures = [failure, failure]
    assert ask(Judge(server.url, "m")) is True
    assert len(server.prompts) == 3


def test_a_thought_is_not_the_verdict(server):
    server.failures = [(200, "<think>yes or no?</think>\n**No**, it is not.", {})]
    assert ask(Judge(server.url, "m")) is False


def test_it_gives_up(server, monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(endpoint.asyncio, "sleep", sleep)
    server.failures = [(503, "busy", {})] * endpoint.ATTEMPTS
    with pytest.raises(ValueError, match=r"judge 'm' at .* HTTP 503: \"busy\" .*run it again"):
        ask(Judge(server.url, "m", "hidden"))
    assert waits == [0.001 * 2**n for n in range(endpoint.ATTEMPTS - 1)]
    server.failures = [(401, "no key", {})]
    before = len(server.prompts)
    with pytest.raises(ValueError, match="HTTP 401") as raised:
        ask(Judge(server.url, "m", "hidden"))
    assert len(server.prompts) == before + 1 and "hidden" not in str(raised.value)


def test_verdicts_by_hand_and_each_asked_once(server, tmp_path):
    lines = [
        LINE | {"answers": {"base": "Luck.", "adapted": "So."}},
        LINE | {"answers": {"base": "", "adapted": "So."}},
    ]
    judge, cache = Judge(server.url, "m"), tmp_path / "verdicts.jsonl"
    table = verdicts.collect(judge, lines, cache)
    assert table["base"].tolist() == [[0, 0, 0], [1, 0, 0]]
    assert table["adapted"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert len(server.prompts) == len(set(server.prompts)) == 4
    truthful = next(p for p in server.prompts if "judge: So." in p and "True answers" in p)
    assert all(part in truthful for part in ("Why?", "- So.", "- Luck.", "Answer to judge: So."))
    again = verdicts.collect(judge, lines, cache)
    assert all((again[model] == table[model]).all() for model in table)
    assert len(server.prompts) == 4
    verdicts.collect(Judge(server.url, "other"), lines, cache)
    assert len(server.prompts) == 8


def test_what_was_judged_before_a_failure_is_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "PARALLEL", 1)
    lines = [LINE | {"answers": {"base": f"So {i}."}} for i in range(3)]
    judge, cache = Judge(server.url, "m"), tmp_path / "verdicts.jsonl"
    server.failures = [None, None, (400, "enough", {})]
    with pytest.raises(ValueError, match="HTTP 400"):
        verdicts.collect(judge, lines, cache)
    assert len(cache.read_text().splitlines()) == 2
    with cache.open("a") as file:
        file.write('{"key": "ha')
    assert verdicts.collect(judge, lines, cache)["base"].tolist() == [[1, 1, 1]] * 3
    assert len(cache.read_text().splitlines()) == 6


def test_reading_answers(tmp_path):
    path = tmp_path / "answers.jsonl"

    def write(*lines):
        path.write_text("\n".join(map(json.dumps, lines)))  # no newline at the end
        return path

    second, first = (
        LINE | {"id": 1, "answers": {"base": "b"}},
        LINE | {"id": 0, "answers": {"base": "a"}},
    )
    header = {"fingerprint": "f", "settings": {"questions": 2}}
    assert verdicts.read_answers(write(header, second, first)) == (
        {"questions": 2},
        [first, second],
    )
    assert verdicts.read_answers(write(LINE | {"answers": {"mine": "a"}}))[0] == {}
    assert path.read_text() == json.dumps(LINE | {"answers": {"mine": "a"}})
    for lines, message in (
        ([header, first], r"holds 1 of 2 answers"),
        ([first, {"question": "Why?"}], r"answers.jsonl:2: right is missing or not a list"),
        ([first, LINE | {"answers": {"x": "a"}}], r"answers.jsonl:2: answers must name the same"),
        ([], "holds 0 of 1 answers"),
    ):
        with pytest.raises(ValueError, match=message):
            verdicts.read_answers(write(*lines))
    with pytest.raises(ValueError, match="does not exist"):
        verdicts.read_answers(tmp_path / "absent.jsonl")
