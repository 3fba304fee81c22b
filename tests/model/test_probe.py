"""The trial when an engine is made: what it accepts, what it refuses, and what it costs."""

import copy

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    GPTNeoConfig,
    MambaConfig,
    MarianConfig,
    PhimoeConfig,
    T5Config,
)

from svd_engine import SteeredEngine, SteeringConfig, steered_generate
from svd_engine.integrations.logits_processor import SteeringLogitsProcessor
from svd_engine.model import probe
from svd_engine.model.layers import attention
from svd_engine.model.peft_adapter import Adapter
from tests.tiny import CONFIGS, VOCAB, tiny_peft

SMALL = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BART = dict(
    **SMALL, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    init_std=0.4,
)  # fmt: skip
BERT = BertConfig(
    **SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    initializer_range=0.4,
)  # fmt: skip
PHIMOE = PhimoeConfig(
    **SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, sliding_window=2047,
)  # fmt: skip
T5 = T5Config(**SMALL, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
MAMBA = MambaConfig(**SMALL, hidden_size=32, state_size=4, num_hidden_layers=2)
GPT_NEO = GPTNeoConfig(
    **SMALL, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
)
BLOOM = BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=4)
REFUSED = {
    "positions counted from the cache": (BartConfig(**BART), ["q_proj"], "differ .* by"),
    "positions from the cache, as sinusoids": (MarianConfig(**BART), ["q_proj"], "differ .* by"),
    "an encoder": (BERT, ["query"], "sees later tokens"),
    "a window in the mask alone": (PHIMOE, ["q_proj"], "window of 2047 tokens in its mask alone"),
    "an attention with a window of its own": (GPT_NEO, ["q_proj"], "window_size = 256"),
    "state space": (MAMBA, ["in_proj"], "MambaForCausalLM cannot be decoded"),
    "alibi": (BLOOM, ["query_key_value"], "BloomForCausalLM cannot be decoded"),
}


def random_adapter(base, targets, task="CAUSAL_LM"):
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type=task)
    return get_peft_model(base.eval(), config).eval()


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind):
    config, targets, message = REFUSED[kind]
    torch.manual_seed(0)
    model = random_adapter(AutoModelForCausalLM.from_config(config), targets)
    with pytest.raises(ValueError, match=message) as refusal:
        SteeredEngine(model)
    assert type(model.get_base_model()).__name__ in str(refusal.value)


def test_the_ways_into_hugging_face_refuse_too():
    torch.manual_seed(0)
    model = random_adapter(AutoModelForCausalLM.from_config(BERT), ["query"])
    with pytest.raises(ValueError, match="BertLMHeadModel cannot be decoded"):
        SteeringLogitsProcessor(model, SteeringConfig(-2.0))
    options = dict(custom_generate=steered_generate, max_new_tokens=2)
    for whole in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="BertLMHeadModel cannot be decoded"):
            whole.generate(torch.tensor([[5, 6]]), steering=SteeringConfig(-2.0), **options)


@pytest.mark.parametrize("config, targets", [(BartConfig(**BART), ["q_proj"]), (T5, ["q"])])
def test_encoders_and_decoders_are_refused(config, targets):
    base = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match=f"{type(base).__name__} cannot be decoded"):
        SteeredEngine(random_adapter(base, targets, "SEQ_2_SEQ_LM"))


METHODS = {
    "lora": None,
    "two passes": LoraConfig(use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix tuning": PrefixTuningConfig(num_virtual_tokens=11, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_right_pair_passes(method, dtype):
    SteeredEngine(tiny_peft("mistral", METHODS[method]).to(dtype))


def spoil_attention(monkeypatch):
    right = attention.causal_mask
    monkeypatch.setattr("svd_engine.model.runner.causal_mask", lambda *a: right(*a).roll(1, dims=0))


def spoil_adapter(monkeypatch):
    monkeypatch.setattr("svd_engine.model.layers.linear.add_low_rank", lambda out, *a: out)
    monkeypatch.setattr("svd_engine.model.layers.linear.most_rows", lambda dtype: 0)


def spoil_half(monkeypatch):
    monkeypatch.setattr(
        "svd_engine.model.adapter_layers.AdaptedLayer.first_adapted_row", lambda *a: 0
    )


def spoil_cache(monkeypatch):
    monkeypatch.setattr(
        "svd_engine.model.kv_cache.KVCache.place",
        lambda self, positions, kv_length, start: setattr(self, "_kv_length", kv_length),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spoil", [spoil_attention, spoil_adapter, spoil_half, spoil_cache])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_wrong_pair_is_refused(monkeypatch, architecture, spoil, dtype):
    model = tiny_peft(architecture).to(dtype)
    spoil(monkeypatch)
    with pytest.raises(ValueError, match="cannot be decoded"):
        SteeredEngine(model, pairing="paired")


def test_every_kind_of_layer_is_tried():
    config = copy.deepcopy(CONFIGS["gemma2"])
    config.num_hidden_layers = 8
    config.layer_types = ["full_attention"] * 6 + ["sliding_attention", "full_attention"]
    base = AutoModelForCausalLM.from_config(config)
    before = list(base.model.layers)
    model = random_adapter(base, ["q_proj"])
    short = Adapter.read(model).short.base_model.model.layers
    assert list(short) == [before[0], before[1], before[6]]
    assert list(model.get_base_model().model.layers) == before
    base.model.layers[4].self_attn.scaling *= 2
    base.model.layers[5].self_attn.q_proj.scaling["default"] *= 2
    short = Adapter.read(model).short.base_model.model.layers
    assert list(short) == [before[i] for i in (0, 1, 4, 5, 6)]


def test_a_model_that_needs_all_its_layers_is_tried_as_a_whole(monkeypatch):
    tried = []
    right = probe._errors
    monkeypatch.setattr(probe, "_errors", lambda *a: (tried.append(a[1]), right(*a))[1])
    config = copy.deepcopy(CONFIGS["llama"])
    config.num_hidden_layers = 4
    base = AutoModelForCausalLM.from_config(config)

    class Needy(type(base.model)):
        def forward(self, *args, **kwargs):
            assert self.layers[3] is not None
            return super().forward(*args, **kwargs)

    base.model.__class__ = Needy
    model = random_adapter(base, ["q_proj"])
    SteeredEngine(model)
    assert len(tried[-1].base_model.model.layers) == 4


def test_switched_off():
    torch.manual_seed(0)
    model = random_adapter(AutoModelForCausalLM.from_config(BERT), ["query"])
    SteeredEngine(model, probe=False)


def test_the_model_is_left_as_it_was_and_in_training_mode_passes():
    model = tiny_peft()
    model.train()
    state = {name: (id(m), type(m), m.training) for name, m in model.named_modules()}
    implementation = model.config._attn_implementation
    SteeredEngine(model)
    assert {name: (id(m), type(m), m.training) for name, m in model.named_modules()} == state
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("unknown", ["sinks", "indices", "block_indices", "position_bias"])
def test_attention_refuses_what_it_does_not_know(unknown):
    x = torch.randn(1, 2, 3, 4)
    attention.attend(nn.Module(), x, x, x, None, **{unknown: None})
    with pytest.raises(ValueError, match=unknown):
        attention.attend(nn.Module(), x, x, x, None, **{unknown: x})


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("has_sinks", [True, False])
def test_sinks_and_narrower_values(has_sinks, softcap, length):
    generator = torch.Generator().manual_seed(0)
    query, key, value, sinks = (
        torch.randn(*shape, generator=generator)
        for shape in ((2, 6, length, 8), (2, 3, 5, 8), (2, 3, 5, 4), (6,))
    )
    positions = torch.tensor([[1], [2]]) + torch.arange(length)
    mask = attention.causal_mask(positions, 5, torch.float32)
    got, _ = attention.attend(
        nn.Module(), query, key, value, mask, 0.3, softcap=softcap,
        s_aux=sinks if has_sinks else None,
    )  # fmt: skip
    for row in range(2):
        for head in range(6):
            for q in range(length):
                seen = int(positions[row, q]) + 1
                scores = key[row, head // 2, :seen].double() @ query[row, head, q].double() * 0.3
                if softcap:
                    scores = softcap * (scores / softcap).tanh()
                weights = scores.exp()
                total = weights.sum() + (sinks[head].double().exp() if has_sinks else 0)
                want = weights @ value[row, head // 2, :seen].double() / total
                torch.testing.assert_close(got[row, q, head].double(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.model
@pytest.mark.slow
def test_of_layers_alike_it_runs_two(smollm2):
    """So that it costs a small part of loading the model."""
    adapter = Adapter.read(random_adapter(copy.deepcopy(smollm2[0]), "all-linear"))
    assert len(adapter.base_model.get_decoder().layers) == 30
    assert len(adapter.short.base_model.get_decoder().layers) == 2
