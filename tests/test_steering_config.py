"""steering_config.json: a round trip, what is refused, and PEFT's indifference to it."""

import json
import math

import pytest
from peft import PeftModel

from svd_engine import SteeringConfig
from svd_engine.utils.files import write_text
from tests.tiny import tiny_base, tiny_peft


def test_round_trip(tmp_path):
    config = SteeringConfig(
        -3.5, alpha=0.2, interval=(-5.0, -1.0), vocab_size=211, verdict="use it"
    )
    path = config.save_pretrained(tmp_path)
    assert SteeringConfig.from_pretrained(tmp_path) == config
    assert json.loads(path.read_text())["penalty"] == "-inf"
    assert [p.name for p in tmp_path.iterdir()] == ["steering_config.json"]
    finite = SteeringConfig(1.0, penalty=-2.0)
    finite.save_pretrained(tmp_path)
    assert SteeringConfig.from_pretrained(tmp_path) == finite


def test_peft_ignores_and_keeps_the_file(tmp_path):
    model = tiny_peft()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    SteeringConfig(2.0).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_base("llama"), str(tmp_path))
    again.save_pretrained(tmp_path, save_embedding_layers=False)
    assert SteeringConfig.from_pretrained(tmp_path).strength == 2.0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"strength": "a"}', '{"strength": NaN}'])
def test_a_file_that_is_no_configuration(tmp_path, text):
    (tmp_path / "steering_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"steering_config\.json is not a steering configuration"):
        SteeringConfig.from_pretrained(tmp_path)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="svd-engine calibrate"):
        SteeringConfig.from_pretrained(tmp_path)
    for bad in (
        dict(strength=math.nan),
        dict(strength=-1e39),
        dict(strength=10**400),
        dict(strength=1.0, alpha=2),
        dict(strength=1, penalty=1),
    ):
        with pytest.raises(ValueError):
            SteeringConfig(**bad)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "old")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
