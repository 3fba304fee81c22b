"""A judge that redirects, stalls, cuts its replies short or fails halfway, as real servers."""

import json
import os
import signal
import socket
import threading
import time

import pytest

from svd_engine.evaluate import judge as endpoint
from svd_engine.evaluate import verdicts
from svd_engine.evaluate.judge import Judge
from tests.evaluate.test_judge import LINE, Server, ask, server  # noqa: F401

YES = json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode()


class RawServer:
    """Answers each connection by the next of `replies`, bytes or seconds of silence."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            reply = self.replies[min(self.asked, len(self.replies) - 1)]
            self.asked += 1
            threading.Thread(target=self.answer, args=(connection, reply), daemon=True).start()

    def answer(self, connection, reply):
        with connection:
            connection.recv(1 << 16)
            for part in reply if isinstance(reply, list) else [reply]:
                try:
                    time.sleep(part) if isinstance(part, float) else connection.sendall(part)
                except OSError:
                    return  # the client has gone


@pytest.fixture
def raw(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)
    made = []
    yield lambda *replies: made.append(RawServer(*replies)) or made[-1]
    for one in made:
        one.socket.close()


def reply(body, *headers):
    lines = [b"HTTP/1.1 200 OK", b"Connection: close", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


GOOD = reply(YES, b"Content-Length: %d" % len(YES))
BROKEN = {
    "cut": reply(YES[:9], b"Content-Length: %d" % len(YES)),
    "bad chunk": reply(b"zz\r\n" + YES, b"Transfer-Encoding: chunked"),
    "half a chunk": reply(b"ff\r\n" + YES, b"Transfer-Encoding: chunked"),
    "no gzip": reply(YES, b"Content-Encoding: gzip", b"Content-Length: %d" % len(YES)),
    "no HTTP": b"yes",
    "nothing": b"",
    "no JSON": reply(b"yes"),
    "deep": reply(b"[" * 100_000),
    "other JSON": reply(b'{"choices": [[5]]}'),
    "null": reply(b'{"choices": [{"message": {"content": null}}]}'),
    "too long": reply(b" " * 3000 + YES),
    "stalls before its head": 9.0,
    "stalls in its body": [reply(YES[:9], b"Content-Length: %d" % len(YES)), 9.0],
    "drips": [reply(b"", b"Content-Length: 5000"), *[b" ", 0.05] * 100],
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_it_asks_again(raw, monkeypatch, broken):
    monkeypatch.setattr(endpoint, "TIMEOUT", 0.3)
    monkeypatch.setattr(endpoint, "LARGEST", 2000)
    served = raw(broken, GOOD)
    assert ask(Judge(served.url, "m")) is True
    assert served.asked == 2


def test_a_deadline_over_all_attempts(raw, monkeypatch):
    monkeypatch.setattr(endpoint, "TIMEOUT", 0.2)
    monkeypatch.setattr(endpoint, "DEADLINE", 0.5)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"0\.5 seconds are over; last: .*Timeout"):
        ask(Judge(raw(9.0).url, "m"))
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_the_key_stays_at_its_endpoint(server, code):  # noqa: F811
    other = Server()
    try:
        server.failures = [(code, "", {"Location": f"{other.url}/chat/completions"})]
        with pytest.raises(ValueError, match=rf"HTTP {code}: to {other.url}.* not followed"):
            ask(Judge(server.url, "m", "hidden"))
        assert len(server.prompts) == 1 and not other.prompts
    finally:
        other.http.shutdown()
        other.http.server_close()


def test_an_error_that_repeats_the_key_is_shown_without_it(server):  # noqa: F811
    server.failures = [(401, "the key hidden is wrong", {})]
    with pytest.raises(ValueError, match="the key <SVD_JUDGE_KEY> is wrong") as raised:
        ask(Judge(server.url, "m", "hidden"))
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a", "localhost/v1", "http://"])
def test_other_urls_are_refused(monkeypatch, url):
    monkeypatch.setenv(endpoint.URL, url)
    monkeypatch.setenv(endpoint.MODEL, "m")
    with pytest.raises(ValueError, match="must begin with http"):
        Judge.from_environment()


def test_a_key_that_no_header_may_have_is_refused(monkeypatch):
    monkeypatch.setenv(endpoint.URL, "http://localhost")
    monkeypatch.setenv(endpoint.MODEL, "m")
    for key in ("a\nb", "é"):
        monkeypatch.setenv(endpoint.KEY, key)
        with pytest.raises(ValueError, match="SVD_JUDGE_KEY has characters"):
            Judge.from_environment()


def test_ctrl_c_answers_at_once(raw, tmp_path):
    served = raw(GOOD, 30.0)
    lines = [LINE | {"answers": {"base": f"So {i}."}} for i in range(20)]
    cache = tmp_path / "verdicts.jsonl"
    pressed = []

    def press():
        # One verdict is there; the other questions stall, their connections made.
        while not cache.exists() or served.asked <= verdicts.PARALLEL:
            time.sleep(0.01)
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job ignores it
    try:
        threading.Thread(target=press, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            verdicts.collect(Judge(served.url, "m"), lines, cache)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - pressed[0] < 1
    assert len(cache.read_text().splitlines()) == 1


def test_what_arrived_before_a_failure_is_kept(raw, tmp_path):
    """Several questions are open when one fails: those answered by then are not asked again."""
    refusal = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    served = raw(GOOD, GOOD, GOOD, [0.3, refusal], 30.0)
    lines = [LINE | {"answers": {"base": f"So {i}."}} for i in range(9)]
    judge, cache = Judge(served.url, "m"), tmp_path / "verdicts.jsonl"
    with pytest.raises(ValueError, match="HTTP 400"):
        verdicts.collect(judge, lines, cache)
    assert len(cache.read_text().splitlines()) == 3
    served.replies, served.asked = [GOOD], 0
    assert verdicts.collect(judge, lines, cache)["base"].tolist() == [[1, 1, 1]] * 9
    assert served.asked == 18 - 3


def test_verdicts_belong_to_an_endpoint_and_a_model(raw, tmp_path):
    one, two = raw(GOOD), raw(GOOD)
    lines, cache = [LINE | {"answers": {"base": "So."}}], tmp_path / "verdicts.jsonl"
    for judge in (Judge(one.url, "m"), Judge(two.url, "m"), Judge(one.url, "other")):
        verdicts.collect(judge, lines, cache)
        verdicts.collect(judge, lines, cache)
    assert (one.asked, two.asked) == (4, 2)
    kept = [json.loads(line) for line in cache.read_text().splitlines()]
    assert {(line["url"], line["model"]) for line in kept} == {
        (one.url, "m"), (two.url, "m"), (one.url, "other"),
    }  # fmt: skip
