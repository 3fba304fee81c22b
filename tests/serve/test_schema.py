"""No request that the schema allows is answered with a 500, and none that it does not."""

import pytest

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.generation.limits import Limits
from tests.tiny import tiny_peft

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")
CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}"
MODES = list(schemathesis.GenerationMode)  # valid and invalid


@pytest.fixture
def schema(letters, monkeypatch):
    from svd_engine.serve.app import make_app
    from svd_engine.serve.settings import Settings

    monkeypatch.setattr(letters, "chat_template", CHAT, raising=False)
    engine = SteeredEngine(tiny_peft(), letters, SteeringConfig(-4.0))
    engine.limits = Limits(rows=4, chunk=16)
    yield schemathesis.openapi.from_asgi("/openapi.json", make_app(engine, Settings(max_tokens=20)))
    engine.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_no_request_is_answered_with_a_500(schema, path, mode):
    @hypothesis.given(schema[path]["POST"].as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def check(case):
        response = case.call()
        assert response.status_code < 500, response.text

    check()
