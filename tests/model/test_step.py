"""The native decode step against the walk over modules; `test_matrix` has the tokens."""

import dataclasses

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM

from svd_engine import SteeredEngine
from svd_engine.model import step
from svd_engine.model.pair import PairedRunner, base_runner, pair_models
from svd_engine.model.peft_adapter import Adapter
from svd_engine.ops import cpu
from tests.model import architecture_cases
from tests.tiny import PROMPTS, VOCAB, tiny_peft

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="no native kernels")
NATIVE = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2",
    "granite", "smollm3", "exaone4",
)  # fmt: skip
FORMS = {
    "lora": None,
    "lora with biases": LoraConfig(
        r=3, target_modules="all-linear", lora_bias=True, init_lora_weights=False,
        task_type="CAUSAL_LM",
    ),
    "a head": LoraConfig(
        r=4, target_modules=["lm_head", "embed_tokens", "o_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    ),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "dora": LoraConfig(use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora on the head": LoraConfig(
        use_dora=True, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"
    ),
    "a saved head": LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"],
        task_type="CAUSAL_LM",
    ),
    "prompt": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}  # fmt: skip


def native(model):
    pair = pair_models(Adapter.read(model))
    assert pair.runner.how == "one native call"
    return pair


@torch.inference_mode()
def prefilled(pair, prompts, seeds):
    """Keys and values of a prompt that depend on its seed alone, not on PyTorch's roundings."""
    pair.prefill(prompts, max_new_tokens=5)
    for layer in range(2):
        for stored in pair.runner.cache.stored(layer):
            for half in stored.chunk(2):
                for row, seed in zip(half, seeds, strict=True):
                    generator = torch.Generator().manual_seed(seed)
                    like = torch.randn(row.shape[0], 32, row.shape[2], generator=generator)
                    row.copy_(like[:, : row.shape[1]])


def tokens(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(3))


def how(architecture):
    model = architecture_cases.adapted(architecture_cases.tiny(architecture))
    return pair_models(Adapter.read(model)).runner.how


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", NATIVE)
def test_these_run_natively(architecture, dtype):
    native(architecture_cases.adapted(architecture_cases.tiny(architecture)).to(dtype))


OTHERS = {
    "ministral3": "positions are not a plain rotary",  # they scale queries, from 16,384 tokens on
    "ernie4_5": "positions are not a plain rotary embedding of halves",  # neighbours turn
    "mixtral": "its feed-forward holds experts, gate",
    "arcee": "it has no gate_proj",
    "stablelm": "its norms are no RMSNorm",
    "gpt2": "its decoder has no layers and norm",
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_others_walk_and_say_why(architecture):
    assert OTHERS[architecture] in how(architecture)


def test_a_model_with_hooks_walks():
    model = tiny_peft("llama")
    model.get_base_model().model.norm.register_forward_hook(lambda *_: None)
    assert "model.norm has hooks" in pair_models(Adapter.read(model)).runner.how


@pytest.mark.parametrize("period", [1, 2])
def test_layers_without_positions_and_with_windows(period):
    """As in EXAONE 4: layers with a window turn, the others do not."""
    torch.manual_seed(0)
    config = architecture_cases.config("exaone4")
    config.layer_types = ["sliding_attention", "full_attention"][-period:] * (2 // period)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    pair = native(architecture_cases.adapted(base))
    rotary = [layer.rotary for layer in pair.runner.native.plan.layers]
    assert rotary == [0 if kind.startswith("sliding") else None for kind in config.layer_types]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_equals_the_walk(dtype, form):
    model = tiny_peft("llama", FORMS[form]).to(dtype)
    pair, walk = native(model), PairedRunner(Adapter.read(model))
    for runner in (pair, walk):
        runner.prefill(PROMPTS, max_new_tokens=6)
    for new in (1, 3):
        text = tokens(len(PROMPTS), new)
        for got, want in zip(pair.extend(text), walk.extend(text), strict=True):
            error = (got.float() - want.float()).norm(dim=-1) / want.float().norm(dim=-1)
            assert error.max() < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("capability", cpu.CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_alone(dtype, capability):
    """In any batch, among any number of new tokens, and on any number of threads."""
    best = cpu.capability()
    if cpu.capability(capability) != capability:
        cpu.capability(best)
        pytest.skip(f"this CPU has no {capability}")
    threads = torch.get_num_threads()
    try:
        pair = native(tiny_peft("qwen3").to(dtype))
        text = tokens(len(PROMPTS), 5)
        alone = []
        for i, prompt in enumerate(PROMPTS):
            prefilled(pair, [prompt], [i])
            torch.set_num_threads(2)
            steps = [pair.extend(token[None, None]) for token in text[i]]
            alone.append([torch.cat(half, 1) for half in zip(*steps, strict=True)])
        for count in (1, 3):
            prefilled(pair, PROMPTS, range(len(PROMPTS)))
            torch.set_num_threads(count)
            together = pair.extend(text)
            for half, got in enumerate(together):
                assert torch.equal(got, torch.cat([x[half] for x in alone]))
    finally:
        torch.set_num_threads(threads)
        cpu.capability(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_are_multiplied_in_panels(dtype):
    """As by the modules, and a token has the same bits in any number of rows that are many."""
    adapted = tiny_peft("qwen3").to(dtype)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(12)]
    text, got = tokens(len(prompts), 3), {}
    for count in (9, 12):
        pair, walk = native(adapted), PairedRunner(Adapter.read(adapted))
        for runner in (pair, walk):
            prefilled(runner, prompts[:count], range(count))
        steps = [pair.extend(token[:, None]) for token in text[:count].T]
        got[count] = [torch.cat(half, 1) for half in zip(*steps, strict=True)]
        for own, want in zip(got[count], walk.extend(text[:count]), strict=True):
            error = (own - want).float().norm() / want.float().norm()
            assert error < (1e-5 if dtype == torch.float32 else 0.02)
    assert all(torch.equal(few, many[:9]) for few, many in zip(got[9], got[12], strict=True))
    assert pair.most_new(1) == 16  # which have the bits of one; longer texts go panel by panel too


@pytest.mark.parametrize("form", ["lora", "prompt", "prefix"])
def test_short_prompts_are_read_natively(monkeypatch, form):
    """As by the modules, in ragged rows; longer ones are read by the modules."""
    model = tiny_peft("llama", FORMS[form])
    pair, walk = native(model), PairedRunner(Adapter.read(model))
    pair.runner.native.most_prompt_tokens = 2 * len(PROMPTS) * (30 + 4)
    calls, run = [], pair.runner.native.run
    monkeypatch.setattr(pair.runner.native, "run", lambda *x: calls.append(x) or run(*x))
    generator = torch.Generator().manual_seed(4)
    for longest, is_native in ((30, True), (40, False)):
        ids = torch.randint(VOCAB, (len(PROMPTS), longest), generator=generator).tolist()
        prompts = [row[: longest - 3 * i] for i, row in enumerate(ids)]
        for got, want in zip(pair.prefill(prompts, 3), walk.prefill(prompts, 3), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert bool(calls) == is_native
        text = tokens(len(PROMPTS))
        for got, want in zip(pair.step(text), walk.step(text), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        calls.clear()


def test_a_step_that_is_off_is_not_taken(monkeypatch):
    read = step.read_plan

    def spoiled(runner):
        plan = read(runner)
        first = dataclasses.replace(plan.layers[0], scaling=plan.layers[0].scaling * 1.1)
        return dataclasses.replace(plan, layers=(first, *plan.layers[1:]))

    monkeypatch.setattr(step, "read_plan", spoiled)
    pair = pair_models(Adapter.read(tiny_peft("llama")))
    assert pair.runner.native is None
    assert pair.runner.how.startswith("module by module, because in a trial the native step was")


def test_the_engine_says_how_each_model_runs():
    assert SteeredEngine(tiny_peft("llama")).step == "one native call"
    saved = LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"], task_type="CAUSAL_LM")
    told = SteeredEngine(tiny_peft("llama", saved)).step
    assert told.startswith("adapted: module by module, because ")
    assert told.endswith("; base: one native call")
    half = SteeredEngine(tiny_peft("llama").to(torch.float16), probe=False).step
    assert half == "module by module, because the weights are float16"


def test_the_base_alone_runs_natively():
    runner = base_runner(Adapter.read(tiny_peft("llama")))
    assert runner.how == "one native call"
    runner.prefill([[5, 17]], max_new_tokens=1)
    with pytest.raises(RuntimeError, match="does not fit the cache"):
        runner.extend(tokens(1, 2))
