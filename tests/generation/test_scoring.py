"""Teacher forcing: prompts shared by completions are computed once, and nothing else changes."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig

from svd_engine import SteeringConfig
from svd_engine.generation import scoring
from svd_engine.kernels import reference
from svd_engine.model.pair import pair_models
from svd_engine.model.peft_adapter import Adapter
from tests.tiny import tiny_peft

PROMPTS = [[5, 17, 40, 9], [7], [120, 3, 88, 61, 14, 90]]
COMPLETIONS = [[9, 33, 2], [101], [55, 4, 4, 12, 77]]
PASSAGES = [scoring.Passage(p, c) for c in COMPLETIONS for p in PROMPTS]
METHODS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


@torch.no_grad()
def two_pass(model, prompt, completion):
    ids = torch.tensor([prompt + completion])
    adapted = model(ids).logits[0, len(prompt) - 1 : -1]
    with model.disable_adapter():
        base = model(ids).logits[0, len(prompt) - 1 : -1]
    target = torch.tensor(completion)
    return float(reference.score(adapted, base, -3.0, target, penalty=0.0).sum())


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("form", ["paired", "sequential"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("slots", [8, 40, 2048])
def test_scores_equal_two_pass(monkeypatch, method, form, slots):
    monkeypatch.setattr(scoring, "BATCH_TOKENS", slots)
    model = tiny_peft("mistral", METHODS[method])
    pair = pair_models(Adapter.read(model), form)
    got = scoring.score(pair, PASSAGES, SteeringConfig(-3.0), 0.0)
    assert got == pytest.approx([two_pass(model, *passage) for passage in PASSAGES], abs=2e-4)


def test_a_shared_prompt_is_computed_once(monkeypatch):
    pair = pair_models(Adapter.read(tiny_peft("llama")), "paired")
    fed = []
    for name in ("prefill", "extend"):
        call = getattr(pair, name)

        def counted(rows, *rest, call=call):
            fed.append(len(rows))
            return call(rows, *rest)

        monkeypatch.setattr(pair, name, counted)
    scoring.score(pair, PASSAGES, SteeringConfig(-3.0), 0.0)
    assert fed == [3, 9]
