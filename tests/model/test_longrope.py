"""Rotary frequencies that depend on the length of a text: each row has its own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from svd_engine import SteeredEngine, SteeringConfig, steered_generate
from svd_engine.integrations.logits_processor import SteeringLogitsProcessor
from tests.tiny import VOCAB, assert_same_tokens, teacher_forced_two_pass

LIMIT = 16
PROMPTS = [list(range(3, 8)), list(range(30, 30 + LIMIT + 9)), list(range(90, 90 + LIMIT + 1))]


def adapted(kind):
    small = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, initializer_range=0.4,
        max_position_embeddings=64,
    )  # fmt: skip
    if kind == "longrope":
        rope = dict(
            rope_type=kind, rope_theta=10000.0, original_max_position_embeddings=LIMIT,
            short_factor=[1.0] * 4, long_factor=[1.0, 3.0, 9.0, 27.0],
        )  # fmt: skip
        config = Phi3Config(**small, rope_parameters=rope, original_max_position_embeddings=LIMIT)
    else:
        rope = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
        config = LlamaConfig(**small | {"max_position_embeddings": LIMIT}, rope_parameters=rope)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    lora = LoraConfig(
        r=4, target_modules=["down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, lora).eval()


def test_a_short_row_beside_a_long_one():
    model = adapted("longrope")
    engine = SteeredEngine(model, steering=SteeringConfig(-2.0))
    together = engine.generate(PROMPTS, max_new_tokens=8, eos_token_id=[])
    for prompt, got in zip(PROMPTS, together, strict=True):
        truth = teacher_forced_two_pass(model, prompt, got.token_ids, -2.0)
        assert_same_tokens(got.token_ids, truth, tie=1e-3)
    completions = [PROMPTS[0], PROMPTS[0][::-1]]
    for prompt in PROMPTS:
        scores = engine.score(prompt, completions, model="adapted")
        for completion, got in zip(completions, scores, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            rows = logits[len(prompt) - 1 : -1]
            want = rows.gather(1, torch.tensor(completion)[:, None]).sum()
            assert got == pytest.approx(float(want), abs=1e-3)


def test_the_peft_model_keeps_its_frequencies():
    model = adapted("longrope")
    with torch.no_grad():
        before = model(torch.tensor([PROMPTS[0]])).logits
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    SteeredEngine(model).generate(PROMPTS, max_new_tokens=2)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([PROMPTS[0]])).logits, before)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_text_that_grows_over_the_limit_is_refused(kind):
    model = adapted(kind)
    engine = SteeredEngine(model, steering=SteeringConfig(-2.0))
    # The context of the model with dynamic frequencies ends at the limit.
    message = f"beyond {LIMIT} the model has other rotary" if kind == "longrope" else "context"
    for prompts in (PROMPTS[:1], PROMPTS):
        with pytest.raises(ValueError, match=message):
            engine.generate(prompts, max_new_tokens=LIMIT)
    with pytest.raises(ValueError, match=message):
        engine.score(PROMPTS[0], [[7] * LIMIT])
    with pytest.raises(ValueError, match="rotary frequencies"):
        model.generate(
            torch.tensor(PROMPTS[:1]), custom_generate=steered_generate,
            steering=SteeringConfig(-2.0), max_new_tokens=LIMIT,
        )  # fmt: skip


def test_the_logits_processor_reads_a_text_anew_that_grows_over_the_limit():
    model = adapted("longrope")
    processor = SteeringLogitsProcessor(model, SteeringConfig(-2.0))
    text = torch.arange(3, 3 + LIMIT + 4)[None]
    with torch.no_grad():
        for end in range(LIMIT - 2, LIMIT + 4):
            part = text[:, :end]
            with model.disable_adapter():
                base = model(part).logits[:, -1]
            torch.testing.assert_close(
                processor._base_logits(part.tolist()), base, atol=2e-5, rtol=1e-5
            )
