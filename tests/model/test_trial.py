"""The trial of a plan: whatever is wrong in it is found, in every field."""

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from svd_engine.model.pair import PairedRunner
from svd_engine.model.peft_adapter import Adapter
from svd_engine.model.step import trial
from svd_engine.model.step.cpu import CpuStep
from svd_engine.model.step.parts import NotDescribed
from svd_engine.model.step.plan import Layer, Linear, Norm, Plan
from svd_engine.model.step.read import read_plan
from svd_engine.model.step.rms_norm import FORMS
from svd_engine.model.step.widen import widen
from svd_engine.ops import cpu
from tests.tiny import VOCAB

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="no native kernels")
# Layers that read the same input have one scale of it.
NO_FORM = {(layer, "input_scale") for layer in ("key", "value", "up")}


@pytest.fixture(scope="module")
def model():
    """A model in whose plan no field is idle, but for those that changes put in."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, initializer_range=0.3, head_dim=8, sliding_window=8,
        query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules="all-linear", lora_bias=True, task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, lora).eval()
    for name, parameter in peft_model.named_parameters():
        if parameter.dim() == 1 or "lora" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return peft_model


def changes_of_a_linear(x: Linear):
    def ones(size, least=1.0):
        return torch.linspace(least, 3, size).to(x.weight)

    wrong = [
        ("weight", x.weight.flip(0)),
        ("bias", ones(len(x.weight)) if x.bias is None else None),
    ]
    if x.low_rank is None:
        wrong.append(("low_rank", (x.weight[:2], x.weight[:, :2], None)))
    else:
        down, up, up_bias = x.low_rank
        wrong += [("low_rank", None), ("low_rank", (down, 2 * up, up_bias))]
        if up_bias is not None:
            wrong.append(("low_rank", (down, up, None)))
    for name, size in (("input_scale", x.weight.shape[1]), ("output_scale", len(x.weight))):
        wrong.append((name, ones(size, 0.0) if getattr(x, name) is None else None))
    for name, value in wrong:
        yield name, dataclasses.replace(x, **{name: value})


def changes_of_a_norm(x: Norm):
    yield "weight", dataclasses.replace(x, weight=x.weight.flip(0))
    yield "eps", dataclasses.replace(x, eps=3.0)
    form = next(form for form in FORMS if form.offset != x.form.offset)
    yield "form", dataclasses.replace(x, form=form)


def changes_of_a_layer(x: Layer):
    for field in dataclasses.fields(Layer):
        value = getattr(x, field.name)
        if isinstance(value, Linear | Norm):
            parts = changes_of_a_linear if isinstance(value, Linear) else changes_of_a_norm
            for name, part in parts(value):
                if (field.name, name) not in NO_FORM:
                    yield f"{field.name} {name}", part
        if isinstance(value, Norm):
            yield f"{field.name} None", None
    yield "window", 3 if x.window is None else x.window - 1
    yield "window", 3 if x.window is None else x.window + 1
    yield "window", 3 if x.window is None else None
    yield "rotary", 0 if x.rotary is None else None
    yield "activation", {"silu": "gelu_tanh", "gelu_tanh": "silu"}[x.activation]
    yield "scaling", 2 * x.scaling
    yield "softcap", 0.5 if x.softcap is None else None
    yield "softcap", 0.5 if x.softcap is None else 2 * x.softcap
    yield "residual_scale", 1.3 * x.residual_scale


def changes(plan: Plan):
    """Plans with one wrong value, by the name of its field."""

    def with_layer(index, **values):
        layers = list(plan.layers)
        layers[index] = dataclasses.replace(layers[index], **values)
        return dataclasses.replace(plan, layers=tuple(layers))

    first = plan.layers[0]
    for name, value in changes_of_a_layer(first):
        yield name, with_layer(0, **{name.split()[0]: value})
    halved = dict(
        heads=2 * first.heads, kv_heads=2 * first.kv_heads, head_dim=first.head_dim // 2,
        query_norm=None, key_norm=None, rotary=None,
    )  # fmt: skip
    yield "heads kv_heads head_dim", with_layer(0, **halved)
    yield "window of the next layer", with_layer(1, window=3)
    for name, part in changes_of_a_norm(plan.norm):
        yield f"norm {name}", dataclasses.replace(plan, norm=part)
    for name, part in changes_of_a_linear(plan.head):
        if name != "input_scale":
            yield f"head {name}", dataclasses.replace(plan, head=part)
    yield "embedding_scale", dataclasses.replace(plan, embedding_scale=1.5)
    late = tuple(lambda n, f=f: tuple(x.roll(1, 0) for x in f(n)) for f in plan.rotaries)
    yield "rotaries", dataclasses.replace(plan, rotaries=late)
    yield "layers", dataclasses.replace(plan, layers=plan.layers[:1])


def is_found(runner, plan):
    try:
        trial.check(runner, CpuStep(plan))
    except NotDescribed as error:
        assert "in a trial the native step was off by" in str(error)
        return True
    return False


def test_a_wrong_value_in_any_field_is_found(model):
    runner = PairedRunner(Adapter.read(model).short).runner
    plan = read_plan(runner)
    assert not is_found(runner, plan)
    names = set()
    for field, wrong in changes(plan):
        assert is_found(runner, wrong), field
        names.update(field.split())
    assert names >= {f.name for kind in (Plan, Layer) for f in dataclasses.fields(kind)}


def test_it_is_found_in_bfloat16_too(model):
    adapter = Adapter.read(copy.deepcopy(model).to(torch.bfloat16))
    runner, wide = (PairedRunner(adapter.short).runner for _ in range(2))
    widen(wide.model)
    plans = [read_plan(x) for x in (runner, wide)]
    assert not is_found(runner, plans[0]) and not is_found(wide, plans[1])
    for (field, wrong), (_, wide_wrong) in zip(*map(changes, plans), strict=True):
        assert is_found(runner, wrong) or is_found(wide, wide_wrong), field


@pytest.mark.parametrize("wrong", ["many rows", "far positions"])
def test_what_is_wrong_of_many_rows_or_far_away_alone_is_found(model, wrong):
    class Right(CpuStep):
        is_tried_at_length = True

    class Step(Right):
        def run(self, embedded, positions, *others):
            out = super().run(embedded, positions, *others)
            is_wrong = len(positions) > 16 if wrong == "many rows" else positions.max() > 1024
            return out * (1.01 if is_wrong else 1.0)

    runner = PairedRunner(Adapter.read(model)).runner
    plan = read_plan(runner)
    trial.check(runner, Right(plan))
    with pytest.raises(NotDescribed, match="off by"):
        trial.check(runner, Step(plan))
