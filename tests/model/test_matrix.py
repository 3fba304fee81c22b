"""Every method of the paper on every architecture: both halves of a pair, and steered tokens."""

import copy

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.model import pair as pair_module
from svd_engine.model.pair import pair_models
from svd_engine.model.peft_adapter import Adapter
from tests.tiny import (
    CONFIGS,
    PROMPTS,
    assert_same_tokens,
    teacher_forced_two_pass,
    tiny_base,
    tiny_peft,
)

pytestmark = pytest.mark.slow


def lora(attention, feed_forward, embedding, **options):
    targets = options.pop("targets", [*attention, feed_forward])
    return LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options)


PAIRED = {
    "lora": lora,
    "lora with patterns": lambda a, f, e: lora(
        a, f, e, rank_pattern={a[0]: 2}, alpha_pattern={f: 32}
    ),
    "rslora": lambda a, f, e: lora(a, f, e, use_rslora=True),
    "lora with a bias": lambda a, f, e: lora(a, f, e, lora_bias=True),
    "lora on the head": lambda a, f, e: lora(a, f, e, targets=["lm_head", f]),
    "lora on the embedding": lambda a, f, e: lora(a, f, e, targets=[e, f]),
    "ia3": lambda a, f, e: IA3Config(
        target_modules=[*a, f], feedforward_modules=[f], task_type="CAUSAL_LM"
    ),
    "ia3 on the input of all": lambda a, f, e: IA3Config(
        target_modules=[*a, f], feedforward_modules=[*a, f], task_type="CAUSAL_LM"
    ),
    "prompt tuning": lambda *_: PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "p-tuning": lambda *_: PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=16, task_type="CAUSAL_LM"
    ),
    "prefix tuning": lambda *_: PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "a prefix beyond the window": lambda *_: PrefixTuningConfig(
        num_virtual_tokens=11, task_type="CAUSAL_LM"
    ),
    "dora": lambda a, f, e: lora(a, f, e, use_dora=True),
    "adalora": lambda a, f, e: AdaLoraConfig(
        target_modules=[*a, f], total_step=10, task_type="CAUSAL_LM"
    ),
    "modules to save": lambda a, f, e: lora(a, f, e, modules_to_save=["lm_head"]),
    "trainable tokens": lambda a, f, e: lora(a, f, e, trainable_token_indices=[5, 7, 9]),
}


def adapted_model(architecture, method):
    names = (["c_attn"], "c_fc", "wte") if architecture == "gpt2" else (
        ["q_proj", "k_proj", "v_proj"], "down_proj", "embed_tokens"
    )  # fmt: skip
    return tiny_peft(architecture, PAIRED[method](*names))


@torch.inference_mode()
def last_logits(pair, prompts):
    """Adapted and base logits `[prompts, 2, V]` of the last two tokens: of a prefill and a step."""
    first = pair.logits(pair.prefill([prompt[:-1] for prompt in prompts], max_new_tokens=1))
    second = pair.step(torch.tensor([prompt[-1] for prompt in prompts]))
    return [torch.stack(steps, 1) for steps in zip(first, second, strict=True)]


@pytest.mark.parametrize("method", PAIRED)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_method_on_every_architecture(architecture, method, monkeypatch):
    model, base = adapted_model(architecture, method), tiny_base(architecture)
    pair = pair_models(Adapter.read(model), "paired")
    # Plain float32 is itself up to 3e-5 from these.
    exact = [copy.deepcopy(whole).double() for whole in (model, base)]
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]
    truths = [
        [whole(torch.tensor([prompt])).logits[0, -2:].detach().float() for whole in exact]
        for prompt in prompts
    ]
    with monkeypatch.context() as patch:
        patch.setattr(pair_module, "use_native_step", lambda *_: None)
        walk = pair_models(Adapter.read(model))
    for each in (pair, walk):  # `pair` takes native steps where it can
        together = last_logits(each, prompts)
        assert (together[0] - together[1]).abs().amax() > 0.1
        for i, prompt in enumerate(prompts):
            alone = last_logits(each, [prompt])
            for half, rows, truth in zip(alone, together, truths[i], strict=True):
                torch.testing.assert_close(rows[i], half[0], atol=2e-5, rtol=1e-5)
                torch.testing.assert_close(half[0], truth, atol=2e-5, rtol=1e-5)
    engine = SteeredEngine(model, pairing="paired")
    for strength in (-4.0, 3.0):
        engine.steering = SteeringConfig(strength)
        for prompt, got in zip(PROMPTS, engine.generate(PROMPTS, max_new_tokens=8), strict=True):
            truth = teacher_forced_two_pass(model, prompt, got.token_ids, strength)
            assert_same_tokens(got.token_ids, truth, tie=1e-3)
