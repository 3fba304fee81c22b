"""`svd-engine serve` as a process, with OpenAI's client: its answers, who leaves, and its end."""

import asyncio
import copy
import os
import re
import signal
import subprocess
import sys

import httpx2
import pytest
from transformers import AutoModelForCausalLM

from svd_engine import SteeredEngine, SteeringConfig
from tests.tiny import CONFIGS, PROMPTS

for module in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(module)
openai = pytest.importorskip("openai")

CONTEXT = 20_000  # so long that a request lasts
NEVER_ENDS = dict(logit_bias={"2": -100}, temperature=0)


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory, words):
    """A base with a long context, and the adapter of the tiny one."""
    base = tmp_path_factory.mktemp("served")
    config = copy.deepcopy(CONFIGS["llama"])
    config.max_position_embeddings = CONTEXT
    tiny = AutoModelForCausalLM.from_pretrained(tiny_folder / "base")
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(tiny.state_dict())
    model.save_pretrained(base)
    words.save_pretrained(base)
    return base, tiny_folder / "adapter"


def start(folders, *options):
    """The process, and its address."""
    command = [
        sys.executable, "-m", "svd_engine.cli.main", "serve", "--base", folders[0], "--adapter",
        folders[1], "--strength", "-4", "--port", "0", "--max-tokens", CONTEXT, *options,
    ]  # fmt: skip
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    line = process.stdout.readline()
    found = re.search(r"http://127.0.0.1:\d+", line)
    assert found, line + process.stdout.read()
    return process, found[0]


def client_of(url, timeout=60.0):
    return openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=timeout
    ).completions


async def until(url, running, waiting):
    """Wait until the server says so; return its metrics."""
    wanted = f"svd_engine_running {running}.0", f"svd_engine_waiting {waiting}.0"
    for _ in range(200):
        shown = await asyncio.to_thread(lambda: httpx2.get(f"{url}/metrics", timeout=30).text)
        if all(line in shown for line in wanted):
            return shown
        await asyncio.sleep(0.05)
    raise AssertionError(shown)


@pytest.fixture(scope="module")
def url(folders):
    process, url = start(folders, "--rows", 4, "--chunk", 8, "--timeout", 1)
    yield url
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert process.stdout.read() == ""


def test_answers_are_those_of_the_same_request_alone(url, folders):
    engine = SteeredEngine.from_pretrained(*folders, steering=SteeringConfig(-4.0))
    long = [(7 * i) % 190 + 5 for i in range(90)]
    asked = [
        dict(prompt=p, max_tokens=10 + 7 * i, temperature=t, seed=i)
        for p in (*PROMPTS, long)
        for i, t in enumerate((0.0, 0.8))
    ]
    asked += [
        dict(prompt=long, max_tokens=9, model="base"),
        dict(prompt=PROMPTS[0], max_tokens=9, model="adapted", presence_penalty=1.5),
        dict(prompt=PROMPTS[0], max_tokens=12, extra_body=dict(strength=2.0, alpha=0.02)),
        dict(prompt=PROMPTS[2], max_tokens=12, n=2, temperature=1, seed=5),
    ]

    async def one(client, options):
        options = {"model": "svd-engine", "temperature": 0} | options
        answer = await client.create(**options)
        return [choice.text for choice in answer.choices]

    async def all_at_once():
        client = client_of(url)
        return await asyncio.gather(*(one(client, options) for options in asked))

    for options, texts in zip(asked, asyncio.run(all_at_once()), strict=True):
        extra = options.pop("extra_body", None)
        alone = engine.generate(
            options.pop("prompt"),
            max_new_tokens=options.pop("max_tokens"),
            num_return_sequences=options.pop("n", 1),
            steering=SteeringConfig(extra["strength"], extra["alpha"]) if extra else None,
            **options,
        )
        assert texts == [completion.text for completion in alone]


def test_whoever_leaves_is_cancelled(url):
    async def leave():
        async with await client_of(url).create(
            model="svd-engine", prompt=[5], max_tokens=CONTEXT - 1, stream=True, **NEVER_ENDS
        ) as events:
            async for _ in events:
                break
        with pytest.raises(openai.APITimeoutError):
            await client_of(url, timeout=0.2).create(
                model="svd-engine", prompt=[5], max_tokens=CONTEXT - 1, **NEVER_ENDS
            )

        return await until(url, running=0, waiting=0)

    shown = asyncio.run(leave())
    assert 'svd_engine_requests_total{outcome="cancelled"} 2.0' in shown


def test_the_end_loses_nothing_silently(folders):
    """SIGTERM lets requests finish, those that wait too; what is left then is told so."""
    process, url = start(folders, "--rows", 2, "--kv-tokens", 2 * CONTEXT, "--timeout", 4)

    async def stream(client, tokens):
        texts = []
        try:
            async for event in await client.create(
                model="svd-engine", prompt=[5], max_tokens=tokens, stream=True, **NEVER_ENDS
            ):
                texts += [event.choices[0].text]
        except openai.APIError as error:
            return texts, error
        return texts, None

    async def whole(client):
        await client.create(model="svd-engine", prompt=[7], max_tokens=CONTEXT - 1, **NEVER_ENDS)

    async def terminated():
        client, requests = client_of(url), []
        for request in (
            stream(client, CONTEXT - 1), stream(client, 400), stream(client, 20), whole(client)
        ):  # fmt: skip
            requests.append(asyncio.create_task(request))
            await until(url, running=min(2, len(requests)), waiting=max(0, len(requests) - 2))
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(1)
        with pytest.raises(openai.APIConnectionError):
            await client_of(url).create(model="svd-engine", prompt=[5])
        return await asyncio.gather(*requests, return_exceptions=True)

    ended, finished, waited, refused = asyncio.run(terminated())
    assert finished[1] is None and len(finished[0]) == 400
    assert waited[1] is None and len(waited[0]) == 20
    assert "shutting down" in str(ended[1]) and ended[0][:400] == finished[0]
    assert isinstance(refused, openai.InternalServerError) and refused.status_code == 503
    assert process.wait(20) == -signal.SIGTERM
    assert process.stdout.read() == ""
