"""The form of a text over HTTP: OpenAI's field and vLLM's are the engine's options."""

import asyncio
import json

import httpx2
import pytest

from svd_engine import SteeredEngine, SteeringConfig
from tests.tiny import tiny_peft

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("llguidance", reason='pip install "svd-engine[grammar]"')

SCHEMA = {"enum": [[1, 2], "yes", {"a": True}]}
BODY = dict(prompt="yes", temperature=0, max_tokens=40, logit_bias={"3": -100, "4": -100})


@pytest.fixture(scope="module")
def engine(letters):
    engine = SteeredEngine(tiny_peft(), letters, SteeringConfig(-4.0))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def post(engine):
    from svd_engine.serve.app import make_app
    from svd_engine.serve.settings import Settings

    app = make_app(engine, Settings())

    def call(**fields):
        async def send():
            transport = httpx2.ASGITransport(app=app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://tiny") as client:
                return await client.post("/v1/completions", json=BODY | fields)

        return asyncio.run(send())

    return call


FORMS = [
    (dict(response_format=dict(type="json_schema", json_schema=dict(name="x", schema=SCHEMA))),
     dict(json_schema=SCHEMA)),
    (dict(structured_outputs=dict(json=SCHEMA)), dict(json_schema=SCHEMA)),
    (dict(structured_outputs=dict(json=json.dumps(SCHEMA))), dict(json_schema=SCHEMA)),
    (dict(structured_outputs=dict(regex="[0-9]{2,4}")), dict(regex="[0-9]{2,4}")),
    (dict(structured_outputs=dict(choice=["a b.", "no (c)"])), dict(regex=r"a b\.|no \(c\)")),
    (dict(response_format=dict(type="json_object"), max_tokens=4),
     dict(json_schema={"type": "object"}, max_new_tokens=4)),
    (dict(response_format=dict(type="text"), max_tokens=9), dict(max_new_tokens=9)),
]  # fmt: skip


@pytest.mark.parametrize("asked, options", FORMS)
def test_a_form_is_the_engines(post, engine, asked, options):
    (want,) = engine.generate(
        "yes", **dict(max_new_tokens=40, logit_bias={3: -100, 4: -100}) | options
    )
    answer = post(**asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == want.text
    if options.get("json_schema") == SCHEMA:
        assert json.loads(want.text) in SCHEMA["enum"]


@pytest.mark.parametrize(
    "asked, message",
    [
        (dict(response_format=dict(type="yaml")), "response_format.type"),
        (dict(response_format=dict(type="json_schema")), "exactly if that is its type"),
        (dict(structured_outputs={}), "needs one of regex"),
        (dict(structured_outputs=dict(regex="a", choice=["a"])), "needs one of regex"),
        (dict(structured_outputs=dict(regex="(a")), "regex cannot be used: unclosed group"),
        (dict(structured_outputs=dict(grammar="root ::= x")), "structured_outputs.grammar"),
        (
            dict(structured_outputs=dict(regex="a"), response_format=dict(type="json_object")),
            "are one field",
        ),
    ],
)
def test_bad_forms_are_refused(post, asked, message):
    answer = post(**asked)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
