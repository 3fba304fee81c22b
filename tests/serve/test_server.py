"""The server against the engine itself, over HTTP, with OpenAI's own client."""

import asyncio
import threading
import time

import httpx2
import pytest
import torch

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.generation.limits import Limits
from svd_engine.kernels import reference
from tests.tiny import VOCAB, tiny_peft

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

PROMPT = "w005 w017 w040 w009 w033"
KEY = "sesame"


@pytest.fixture(scope="module")
def engine(chat_words):
    engine = SteeredEngine(tiny_peft(), chat_words, SteeringConfig(-4.0))
    engine.limits = Limits(rows=4, waiting=40, chunk=16)
    return engine


@pytest.fixture(scope="module")
def url(engine):
    from svd_engine.serve.app import make_app
    from svd_engine.serve.settings import Settings

    settings = Settings(name="tiny", api_key=KEY, max_tokens=100, max_body=20_000)
    server = uvicorn.Server(
        uvicorn.Config(make_app(engine, settings), port=0, log_level="error", lifespan="on")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
    assert not engine.scheduler.is_open


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def complete(client, **options):
    return client.completions.create(
        **{"model": "tiny", "prompt": PROMPT, "temperature": 0} | options
    )


def test_a_completion_is_the_engines(client, engine):
    want = engine.generate(PROMPT, max_new_tokens=12)[0]
    got = complete(client, max_tokens=12, logprobs=2)
    choice = got.choices[0]
    assert (choice.text, choice.finish_reason) == (want.text, want.finish_reason)
    assert choice.logprobs.token_logprobs == pytest.approx(want.logprobs, abs=1e-4)
    assert len(choice.logprobs.tokens) == len(want.token_ids) == got.usage.completion_tokens
    assert got.usage.prompt_tokens == 5
    echoed = complete(client, max_tokens=12, echo=True).choices[0].text
    assert echoed == PROMPT + want.text


@torch.no_grad()
def test_echoed_log_probabilities(client, engine):
    """Of a prompt's tokens, and the two best in each place, by two plain passes in float64."""
    ids, model = [5, 17, 40, 9, 33], engine.model
    adapted = model(torch.tensor([ids])).logits[0, :-1].float()
    with model.disable_adapter():
        base = model(torch.tensor([ids])).logits[0, :-1].float()
    cases = [
        ({}, reference.steer(adapted, base, -4.0, penalty=0.0)),
        (
            dict(strength=2.0, alpha=0.3),
            reference.steer(adapted, base, 2.0, alpha=0.3, penalty=0.0),
        ),
        (dict(model="base"), base),
    ]
    for asked, logits in cases:
        want = logits.double().log_softmax(-1)
        extra = {k: v for k, v in asked.items() if k != "model"}
        options = dict(max_tokens=2, logprobs=2, model=asked.get("model", "tiny"), extra_body=extra)
        plain = complete(client, **options).choices[0]
        got = complete(client, **options, echo=True).choices[0]
        told = got.logprobs
        assert got.text == f"{PROMPT}{plain.text}"
        assert told.tokens == [*PROMPT.split(), *plain.logprobs.tokens]
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        logprobs = [float(row[token]) for row, token in zip(want, ids[1:], strict=True)]
        assert told.token_logprobs[1:5] == pytest.approx(logprobs, abs=1e-3)
        assert told.token_logprobs[5:] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-4)
        assert told.top_logprobs[5:] == plain.logprobs.top_logprobs
        for listed, row in zip(told.top_logprobs[1:5], want, strict=True):
            best = row.topk(2)
            assert [*listed] == [f"w{token:03}" for token in best.indices.tolist()]
            assert [*listed.values()] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert told.text_offset[:2] == [0, 4]
    two = complete(client, prompt=[[5], [5, 17]], echo=True, logprobs=0, max_tokens=0).choices
    assert [choice.logprobs.tokens for choice in two] == [["w005"], ["w005", "w017"]]
    assert two[1].logprobs.top_logprobs == [None, {}]
    sampled = complete(
        client, prompt=[[5, 6], [7, 8]], n=2, temperature=1, echo=True, logprobs=1, max_tokens=1
    ).choices
    assert [c.logprobs.tokens[0] for c in sampled] == ["w005", "w005", "w007", "w007"]


def test_a_stream_is_the_completion(client, engine):
    want = engine.generate(PROMPT, max_new_tokens=12, temperature=0.8, seed=5)[0]
    options = dict(max_tokens=12, temperature=0.8, seed=5, stream=True)
    chunks = [*complete(client, **options, stream_options={"include_usage": True})]
    assert "".join(c.choices[0].text for c in chunks[:-1]) == want.text
    assert chunks[-2].choices[0].finish_reason == want.finish_reason
    assert chunks[-1].usage.completion_tokens == len(want.token_ids)


def test_chats(client, engine):
    messages = [{"role": "user", "content": "w050 w051"}]
    want = engine.generate(messages=messages, max_new_tokens=9)[0]
    options = dict(model="tiny", messages=messages, max_tokens=9, temperature=0)
    create = client.chat.completions.create
    got = create(**options, logprobs=True, top_logprobs=2).choices[0]
    assert (got.message.content, got.finish_reason) == (want.text, want.finish_reason)
    assert [len(x.top_logprobs) for x in got.logprobs.content] == [2] * len(want.token_ids)
    parts = [{"role": "user", "content": [{"type": "text", "text": "w050 w051"}]}]
    assert create(**{**options, "messages": parts}).choices[0].message.content == want.text
    chunks = [*create(**options, stream=True)]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content for c in chunks) == want.text


def test_options_reach_the_engine(client, engine):
    steering = SteeringConfig(3.0, alpha=0.01)
    cases = [
        (dict(extra_body=dict(strength=3.0, alpha=0.01)), dict(steering=steering)),
        (dict(model="adapted"), dict(model="adapted")),
        (dict(model="base"), dict(model="base")),
        (dict(stop=["w1"]), dict(stop_strings=["w1"])),
        (
            dict(n=3, temperature=0.9, top_p=0.8, seed=9),
            dict(num_return_sequences=3, temperature=0.9, top_p=0.8, seed=9),
        ),
        (dict(prompt=[[5, 6], [7, 8, 9]]), dict(prompts=[[5, 6], [7, 8, 9]])),
    ]
    for asked, options in cases:
        want = engine.generate(**{"prompts": PROMPT, "max_new_tokens": 12} | options)
        got = complete(client, max_tokens=12, **asked)
        assert [x.text for x in got.choices] == [x.text for x in want]
    token = engine.generate(PROMPT, max_new_tokens=1)[0].token_ids[0]
    banned = complete(client, max_tokens=1, logit_bias={str(token): -100}, extra_body=dict(alpha=0))
    assert banned.choices[0].text != f"w{token:03}"


@pytest.mark.parametrize(
    "status, options",
    [
        (400, dict(max_tokens=101)),
        (400, dict(temperature=-1)),
        (400, dict(prompt=[VOCAB])),
        (400, dict(prompt=[])),
        (400, dict(n=3)),
        (400, dict(n=9, temperature=1)),
        (400, dict(extra_body=dict(strenght=1))),
        (400, dict(extra_body=dict(strength=1), model="base")),
        (400, dict(presence_penalty=2.5)),
        (400, dict(extra_body=dict(tools=[1]))),
        (400, dict(echo=True, stream=True)),
        (400, dict(logit_bias={"x": 1})),
        (404, dict(model="gpt-4")),
        (413, dict(prompt="w005 " * 5000)),
    ],
)
def test_bad_requests_in_openais_form(client, status, options):
    with pytest.raises(openai.APIStatusError) as caught:
        complete(client, **options)
    assert caught.value.status_code == status
    assert caught.value.body["message"] and caught.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["tokenize", "v1/chat/completions"])
def test_no_messages_are_refused(url, path):
    answer = httpx2.post(
        f"{url}/{path}", json=dict(messages=[]), headers={"Authorization": f"Bearer {KEY}"}
    )
    assert answer.status_code == 400 and "messages" in answer.json()["error"]["message"]


def test_the_key_and_what_needs_none(url, client):
    with pytest.raises(openai.AuthenticationError):
        complete(openai.OpenAI(base_url=f"{url}/v1", api_key="sesamf", max_retries=0))
    assert httpx2.get(f"{url}/v1/models").status_code == 401
    assert httpx2.get(f"{url}/health").json() == {"status": "ok"}
    assert [m.id for m in client.models.list()] == ["tiny", "steered", "adapted", "base"]
    tokens = httpx2.post(
        f"{url}/tokenize", json=dict(prompt=PROMPT), headers={"Authorization": f"Bearer {KEY}"}
    )
    assert tokens.json() == {"tokens": [5, 17, 40, 9, 33], "count": 5}
    complete(client, max_tokens=3)
    shown = httpx2.get(f"{url}/metrics").text
    assert "svd_engine_running 0.0" in shown and "time_between_tokens_seconds_bucket" in shown


def test_whoever_leaves_is_cancelled(url, engine):
    """Streams and whole answers that nobody waits for leave the batch long before their end."""
    headers = {"Authorization": f"Bearer {KEY}"}
    step = engine.scheduler._batch.step
    engine.scheduler._batch.step = lambda tokens: (time.sleep(0.02), step(tokens))[1]
    body = dict(prompt=[5], max_tokens=100, logit_bias={"2": -100}, alpha=0)
    with httpx2.stream(
        "POST", f"{url}/v1/completions", json={**body, "stream": True}, headers=headers
    ) as got:
        lines = got.iter_lines()  # held: the connection goes with it
        next(lines)
        assert runs(engine, 1)
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{url}/v1/completions", json=body, headers=headers, timeout=0.3)
    assert runs(engine, 0)
    engine.scheduler._batch.step = step


def runs(engine, sequences):
    """Whether so many sequences run, within a second: long before 100 tokens are decoded."""
    for _ in range(100):
        if engine.scheduler.running == sequences:
            return True
        time.sleep(0.01)
    return False


def test_many_clients_some_of_which_leave(url, engine):
    want = {
        i: engine.generate([i, 7], max_new_tokens=5, eos_token_id=None)[0].text
        for i in range(5, 25)
    }

    async def one(client, i):
        body = dict(prompt=[i, 7], max_tokens=5, temperature=0, stream=i % 7 == 0)
        if i % 7 == 0:
            async with client.stream("POST", "/v1/completions", json=body):
                return None
        return (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]

    async def all_of_them():
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
            return await asyncio.gather(*(one(client, i) for i in want))

    for text, i in zip(asyncio.run(all_of_them()), want, strict=True):
        assert text in (None, want[i])
