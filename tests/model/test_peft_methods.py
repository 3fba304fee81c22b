"""Every PEFT method is paired exactly, decoded in two passes exactly, or refused by its name."""

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    LoraConfig,
    PeftType,
    get_peft_model,
    inject_adapter_in_model,
)

from svd_engine import (
    SteeredEngine,
    SteeringConfig,
    SteeringLogitsProcessor,
    loading,
    steered_generate,
)
from svd_engine.model import peft_methods
from svd_engine.model.pair import PairedRunner
from tests import limits
from tests.model import peft_cases
from tests.model.peft_cases import CASES
from tests.tiny import tiny_base

PROMPT = torch.tensor([[5, 17, 40, 9, 33, 101]])
INSTALLED = [i for i, case in enumerate(CASES) if peft_cases.available(case)]


@pytest.mark.parametrize("case", INSTALLED, ids=lambda i: peft_cases.label(CASES[i]))
def test_a_method_is_exact_or_refused(case):
    found = peft_cases.found(case)
    method, options = CASES[case]
    if method in peft_methods.REFUSED:
        assert found.outcome == "refused" and f"uses {method}" in found.reason
    elif found.outcome == "refused":
        assert any(f"{name}=" in found.reason for name in options)
    else:
        assert method in peft_methods.STEERED


def test_every_method_that_is_known_has_a_case():
    known = {*peft_methods.STEERED, *peft_methods.REFUSED}
    assert {method for method, _ in CASES} == known
    assert set(PeftType.__members__) - known == set() or not limits.is_documented_peft()


def test_a_method_that_is_not_known_is_refused(monkeypatch):
    monkeypatch.setattr(peft_methods, "STEERED", ())
    config = peft_cases.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.HRA](task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="'mine' uses HRA, which is not known"):
        peft_methods.check({"mine": config})


def test_a_module_of_peft_that_would_stay_in_the_base_is_refused(monkeypatch):
    monkeypatch.setattr(peft_methods, "REFUSED", {})
    monkeypatch.setattr(peft_methods, "STEERED", ("ADAPTION_PROMPT",))
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_base("llama"), config)
    with pytest.raises(ValueError, match=r"AdaptedAttention of PEFT in .*self_attn"):
        SteeredEngine(model)


def test_the_other_ways_in_refuse_as_well():
    """A model as transformers' own `add_adapter` leaves it, and the processor's model."""
    config = LoraConfig(init_lora_weights="olora", target_modules=["q_proj"], task_type="CAUSAL_LM")
    # `add_adapter` of a newer transformers asks for a newer PEFT, and otherwise does this.
    injected = inject_adapter_in_model(config, tiny_base("llama"))
    options = dict(custom_generate=steered_generate, steering=SteeringConfig(-2.0))
    with pytest.raises(ValueError, match="init_lora_weights='olora'"):
        injected.generate(PROMPT, max_new_tokens=2, **options)
    with pytest.raises(ValueError, match="init_lora_weights='olora'"):
        SteeringLogitsProcessor(get_peft_model(tiny_base("llama"), config), SteeringConfig(-2.0))
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="AdaptedAttention of PEFT"):
        get_peft_model(tiny_base("llama"), config).generate(PROMPT, max_new_tokens=2, **options)


def test_the_table_in_the_documentation():
    written = limits.table("peft methods")
    rows = limits.peft_methods().splitlines()
    if limits.is_documented_peft():
        assert rows == written
    else:
        assert set(rows) <= set(written)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_that_rewrote_the_base_pairs_once_it_is_converted(init, use_rslora, tmp_path):
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=init,
        use_rslora=use_rslora, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(tiny_base("llama"), config).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'.*path_initial_model"):
        SteeredEngine(model)

    model.save_pretrained(tmp_path / "as it is")
    base, untouched = tiny_base("llama"), tiny_base("llama")
    with pytest.raises(ValueError, match=f"as it is' has init_lora_weights='{init}'"):
        loading.load_adapter(base, tmp_path / "as it is")
    for name, weight in base.state_dict().items():
        assert torch.equal(weight, untouched.state_dict()[name])

    adapted = model(PROMPT).logits[:, -1].detach()
    model.save_pretrained(
        tmp_path / "converted",
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    engine = SteeredEngine(loading.load_adapter(base, tmp_path / "converted"))
    assert isinstance(engine.pair, PairedRunner)
    rows = engine.pair.logits(engine.pair.prefill(PROMPT.tolist()))
    torch.testing.assert_close(rows[0], adapted, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(rows[1], untouched(PROMPT).logits[:, -1], atol=1e-4, rtol=1e-5)


def test_an_adapter_beside_the_active_one_may_have_rewritten_the_base():
    lora = dict(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_base("llama"), LoraConfig(**lora))
    model.add_adapter("other", LoraConfig(init_lora_weights="olora", **lora))
    with pytest.raises(ValueError, match="'other' has init_lora_weights='olora'"):
        SteeredEngine(model)
