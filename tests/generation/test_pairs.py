"""Pairs beyond an adapter: two checkpoints, and one model with two prompts."""

import math

import pytest
import torch
from tokenizers.models import WordLevel

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.kernels import reference
from tests.tiny import CONFIGS, PROMPTS, tiny_base, tiny_peft

CONTRAST = [[9, 33], [60, 2, 7, 7, 120, 3, 88, 61], [55], [200, 4, 31]]


def tuned(architecture="llama"):
    """The base with every weight a little different, as full fine-tuning leaves it."""
    model = tiny_base(architecture)
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def by_hand(adapted, base, prompt, other, new, strength, alpha, direction):
    """Two plain models, no cache, float64 steering."""
    ids = []
    for _ in range(new):
        rows = [
            model(torch.tensor([[*start, *ids]])).logits[:, -1].double()
            for model, start in ((adapted, prompt), (base, other))
        ]
        steered = reference.steer(*rows, strength, alpha=alpha, direction=direction)
        ids.append(int(steered.argmax()))
        if ids[-1] == 2:
            break
    return ids


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("direction", ["projected", "difference"])
def test_two_checkpoints_equal_plain_models(architecture, direction, executor):
    adapted, base = tuned(architecture), tiny_base(architecture)
    steering = SteeringConfig(-2.0, alpha=0.2, direction=direction)
    engine = SteeredEngine.from_checkpoints(adapted, base, steering=steering)
    got = engine.generate(PROMPTS, max_new_tokens=12)
    for completion, prompt in zip(got, PROMPTS, strict=True):
        want = by_hand(adapted, base, prompt, prompt, 12, -2.0, 0.2, direction)
        assert completion.token_ids == want


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("scale", [1.7, 3.0])
def test_a_contrast_is_transformers_guidance(architecture, scale, executor):
    model = tiny_base(architecture)
    steering = SteeringConfig(1 - scale, alpha=0.0, direction="difference")
    engine = SteeredEngine.from_model(model, steering=steering)
    got = engine.generate(PROMPTS, contrast=CONTRAST, max_new_tokens=10)
    for completion, prompt, other in zip(got, PROMPTS, CONTRAST, strict=True):
        ids = torch.tensor([prompt])
        want = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            negative_prompt_ids=torch.tensor([other]),
            guidance_scale=scale,
            max_new_tokens=10,
            do_sample=False,
        )
        assert completion.token_ids == want[0, len(prompt) :].tolist()


def test_a_contrast_of_an_adapter_is_read_by_the_base(executor):
    model = tiny_peft()
    engine = SteeredEngine(model, steering=SteeringConfig(-2.0))
    got = engine.generate(PROMPTS, contrast=CONTRAST[1], max_new_tokens=8)

    def base(ids):
        with model.disable_adapter():
            return model(ids)

    for completion, prompt in zip(got, PROMPTS, strict=True):
        want = by_hand(model, base, prompt, CONTRAST[1], 8, -2.0, 0.1, "projected")
        assert completion.token_ids == want


def test_streams_samples_and_beams_take_a_contrast(words):
    steering = SteeringConfig(-1.0, alpha=0.1, direction="difference")
    engine = SteeredEngine.from_model(tiny_base("llama"), words, steering=steering)
    sampled = dict(contrast="w009 w033", max_new_tokens=6, temperature=1.0, seed=5)
    (whole,) = engine.generate("w005 w017", **sampled)
    assert [e.token_id for e in engine.stream("w005 w017", **sampled)] == whole.token_ids
    together = engine.generate(PROMPTS, contrast=CONTRAST, max_new_tokens=6, num_beams=3)
    for searched, prompt, other in zip(together, PROMPTS, CONTRAST, strict=True):
        (alone,) = engine.generate(prompt, contrast=other, max_new_tokens=6, num_beams=3)
        assert searched.token_ids == alone.token_ids


def test_checkpoints_come_from_folders_of_one_vocabulary(tiny_folder, tmp_path, words):
    tuned().save_pretrained(tmp_path / "tuned")
    words.save_pretrained(tmp_path / "tuned")
    SteeringConfig(-2.0).save_pretrained(tmp_path / "tuned")
    engine = SteeredEngine.from_checkpoints(tmp_path / "tuned", tiny_folder / "base")
    assert engine.steering.generation == SteeringConfig(-2.0)
    (got,) = engine.generate("w005 w017 w040", max_new_tokens=8)
    ids = [5, 17, 40]
    assert got.token_ids == by_hand(
        tuned(), tiny_base("llama"), ids, ids, 8, -2.0, 0.1, "projected"
    )
    other = words.__class__.from_pretrained(tmp_path / "tuned")
    other.backend_tokenizer.model = WordLevel({f"w{i:03}": 210 - i for i in range(211)})
    other.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="one vocabulary: of the adapted, its token"):
        SteeredEngine.from_checkpoints(tmp_path / "tuned", tiny_folder / "base")


def test_log_probabilities_of_a_contrast_are_those_of_the_formula():
    model = tiny_base("llama")
    steering = SteeringConfig(-0.5, alpha=0.0, direction="difference")
    engine = SteeredEngine.from_model(model, steering=steering)
    (got,) = engine.generate(PROMPTS[0], contrast=CONTRAST[1], max_new_tokens=1)
    with torch.no_grad():
        z = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
        b = model(torch.tensor([CONTRAST[1]])).logits[0, -1].double()
    want = (1.5 * z - 0.5 * b).log_softmax(-1)
    assert math.isclose(got.logprobs[0], float(want.max()), abs_tol=1e-4)


def test_the_adapted_checkpoint_says_where_a_text_ends():
    adapted, base = tuned(), tiny_base("llama")
    steering = SteeringConfig(-2.0)
    (free,) = SteeredEngine.from_checkpoints(adapted, base, steering=steering).generate(
        PROMPTS[0], max_new_tokens=6, eos_token_id=[]
    )
    end = free.token_ids[2]
    adapted.generation_config.eos_token_id = end
    (got,) = SteeredEngine.from_checkpoints(adapted, base, steering=steering).generate(
        PROMPTS[0], max_new_tokens=6
    )
    assert (got.finish_reason, got.stop_reason) == ("stop", end)


@pytest.mark.parametrize("shorter", ["adapted", "base"])
def test_a_text_fits_both_checkpoints(shorter):
    models = {"adapted": tuned(), "base": tiny_base("llama")}
    models[shorter].config.max_position_embeddings = 16
    engine = SteeredEngine.from_checkpoints(**models, steering=SteeringConfig(-2.0))
    with pytest.raises(ValueError, match="context is 16"):
        engine.generate([5] * 10, max_new_tokens=7)


def test_what_two_models_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"adapted must be a folder.*got a PeftModel"):
        SteeredEngine.from_checkpoints(tiny_peft(), tiny_base("llama"))
    with pytest.raises(ValueError, match=r"model must be a folder.*got a NoneType"):
        SteeredEngine.from_model(None)
    model, other = tiny_base("llama"), tiny_base("llama")
    other.resize_token_embeddings(180)
    with pytest.raises(ValueError, match="one vocabulary; got 211 and 180"):
        SteeredEngine.from_checkpoints(model, other)
    with pytest.raises(ValueError, match=r"must have no adapter; .*Linear of PEFT"):
        SteeredEngine.from_checkpoints(tiny_peft().get_base_model(), model)
    engine = SteeredEngine.from_model(model, steering=SteeringConfig(-1.0))
    with pytest.raises(ValueError, match="contrast is missing"):
        engine.generate(PROMPTS[0])
    with pytest.raises(ValueError, match="model='adapted' is decoded alone"):
        engine.generate(PROMPTS[0], model="adapted", contrast=[3])
    with pytest.raises(ValueError, match="contrast has 3 prompts for 4"):
        engine.generate(PROMPTS, contrast=CONTRAST[:3])
    with pytest.raises(ValueError, match=r"contrast: prompts\[0\] is empty"):
        engine.generate(PROMPTS[0], contrast=[[]])
    with pytest.raises(ValueError, match=r"contrast\[0\] does not fit"):
        engine.generate(PROMPTS[0], contrast=[5] * 127, max_new_tokens=4)
    with pytest.raises(ValueError, match="score needs two models"):
        engine.score(PROMPTS[0], [[4]])
    with pytest.raises(ValueError, match="calibrate needs two models"):
        engine.calibrate([])
    model.lm_head.weight.data.mul_(1)
    with torch.no_grad():
        model.lm_head.weight.mul_(1)
    with pytest.raises(ValueError, match="has changed since"):
        engine.generate(PROMPTS[0], contrast=[3])
