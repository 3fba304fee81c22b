"""steering_config.json: a round trip, what is refused, and PEFT's indifference to it."""

import json
import math

import pytest
from peft import PeftModel

from svd_engine import SteeredEngine, Steering, SteeringConfig
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
        dict(strength=1, direction="raw"),
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


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({}, "projected"),
        ({"projection": True}, "projected"),
        ({"projection": False}, "difference"),
        ({"projection": False, "direction": "projected"}, "projected"),
    ],
)
def test_files_of_before_directions_are_read(tmp_path, written, read):
    (tmp_path / "steering_config.json").write_text(json.dumps({"strength": -2.0} | written))
    config = SteeringConfig.from_pretrained(tmp_path)
    assert config == SteeringConfig(-2.0, direction=read)
    kept = json.loads(config.save_pretrained(tmp_path).read_text())
    assert kept["direction"] == read and "projection" not in kept


@pytest.mark.parametrize(
    ("written", "generation", "ranking"),
    [
        ({"strength": -2.0}, -2.0, -2.0),  # files of before uses
        ({"strength": -2.0, "objective": "preference"}, -2.0, -2.0),
        ({"strength": -2.0, "objective": "ranking"}, None, -2.0),
        ({"generation": {"strength": -2.0}}, -2.0, None),
        ({"ranking": {"strength": -3.0}}, None, -3.0),
        ({"generation": {"strength": -2.0}, "ranking": {"strength": -3.0}}, -2.0, -3.0),
    ],
)
def test_each_use_has_its_strength(tmp_path, written, generation, ranking):
    (tmp_path / "steering_config.json").write_text(json.dumps(written))
    steering = Steering.from_pretrained(tmp_path)
    found = {use: config.strength for use, config in steering.uses().items()}
    wanted = {"generation": generation, "ranking": ranking}
    assert found == {use: strength for use, strength in wanted.items() if strength is not None}
    steering.save_pretrained(tmp_path)
    assert Steering.from_pretrained(tmp_path) == steering
    if generation is None:
        with pytest.raises(ValueError, match="holds no strength for generation"):
            SteeringConfig.from_pretrained(tmp_path)
    else:
        assert SteeringConfig.from_pretrained(tmp_path).strength == generation


def test_steering_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a SteeringConfig or a Steering; got -2\.0"):
        SteeredEngine(tiny_peft(), steering=-2.0)
    with pytest.raises(ValueError, match="no strength to write"):
        Steering().save_pretrained(tmp_path)
    (tmp_path / "steering_config.json").write_text('{"ranking": -2.0}')
    with pytest.raises(ValueError, match=r"not a steering configuration: a strength is an object"):
        Steering.from_pretrained(tmp_path)
