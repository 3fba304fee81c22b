"""Rows of a runner: static steps, moved rows, and memory that outlives a request."""

import platform

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig

from svd_engine.model.freed_memory import keep_freed_memory
from svd_engine.model.kv_cache import KVCache
from svd_engine.model.pair import SequentialRunner, adapted_runner, pair_models
from svd_engine.model.peft_adapter import Adapter
from tests.tiny import tiny_peft

PROMPTS = [[5, 17, 40, 9, 33, 101], [7, 7, 120], [200, 4, 9, 61]]
ALIKE = [[5, 17, 40, 9, 33, 101], [7, 7, 120, 0, 0, 0], [200, 4, 9, 61, 0, 0]]
METHODS = {
    "lora": LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix tuning": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}
FORMS = [(method, form) for method in METHODS for form in ("paired", "sequential")]


def steps(pair, tokens, **options):
    """Adapted and base logits `[2, steps, rows, V]` of one step a row of tokens."""
    return torch.stack([torch.stack(pair.step(row, **options)) for row in tokens], 1)


@pytest.fixture(params=FORMS, ids=" ".join)
def pair(request, executor):
    method, form = request.param
    return pair_models(Adapter.read(tiny_peft("mistral", METHODS[method])), form)


@pytest.fixture
def tokens():
    return torch.randint(0, 200, (6, 3), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prompts", [PROMPTS, ALIKE])
def test_static_steps_equal_shortcut_steps(pair, tokens, prompts):
    pair.prefill(prompts, max_new_tokens=6)
    shortcut = steps(pair, tokens)
    pair.prefill(prompts, max_new_tokens=9)
    static = steps(pair, tokens, kv_length=6 + 9)
    torch.testing.assert_close(static, shortcut, atol=1e-5, rtol=1e-5)


def test_a_static_step_reads_no_tensor_on_the_host(pair, tokens, monkeypatch):
    pair.prefill(PROMPTS, max_new_tokens=6)
    runners = pair.runners if isinstance(pair, SequentialRunner) else [pair.runner]
    places = [r.positions.data_ptr() for r in runners]
    before = [r.positions.clone() for r in runners]

    def refuse(*args):
        raise AssertionError("a host read")

    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    pair.step(tokens[0], kv_length=12)
    monkeypatch.undo()
    for r, place, old in zip(runners, places, before, strict=True):
        assert r.positions.data_ptr() == place
        assert r.positions.tolist() == (old + 1).tolist()


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method, form", FORMS)
def test_prompts_spread_over_copies_and_rows_drop_out(method, form, dtype, tokens):
    """In float64 to its precision; in float32 but for what its matrix products round."""
    model = tiny_peft("mistral", METHODS[method]).to(dtype)
    pair = pair_models(Adapter.read(model), form)
    spread, kept = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([5, 0, 2])
    pair.prefill(PROMPTS, max_new_tokens=6, max_rows=6)
    pair.reorder(spread)
    wide = tokens[:2, [0, 1, 2, 0, 1, 2]]
    first = steps(pair, wide)
    pair.reorder(kept)
    second = steps(pair, tokens[2:])
    for row, source in enumerate(kept.tolist()):
        prompt = int(spread[source])
        pair.prefill(PROMPTS[prompt : prompt + 1], max_new_tokens=6)
        alone = steps(pair, torch.cat([wide[:, source], tokens[2:, row]])[:, None])[:, :, 0]
        together = torch.cat([first[:, :, source], second[:, :, row]], 1)
        atol, rtol = (3e-5, 1e-5) if dtype == torch.float32 else (1e-11, 0.0)
        torch.testing.assert_close(together, alone, atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method, form", FORMS)
def test_several_tokens_have_the_bits_of_one_at_a_time(method, form, dtype, tokens):
    """Also where rows are set back to different places and go on with other tokens."""
    pair = pair_models(Adapter.read(tiny_peft("mistral", METHODS[method]).to(dtype)), form)
    if pair.most_new(3) < 2:
        pytest.skip("no native kernels")
    pair.prefill(PROMPTS, max_new_tokens=9)
    want = steps(pair, tokens).transpose(1, 2)
    pair.prefill(PROMPTS, max_new_tokens=9)
    longest = pair.longest
    wrong = torch.cat([tokens[:3].T, tokens.flip(0)[:2].T], 1)
    first = torch.stack(pair.step(wrong))
    assert torch.equal(first[:, :, :3], want[:, :, :3])
    pair.set_back(torch.tensor([2, 3, 4]))
    second = torch.stack(pair.step(torch.stack([tokens[3:6, 0], tokens[2:5, 1], tokens[1:4, 2]])))
    for row, start in enumerate((3, 2, 1)):
        assert torch.equal(second[:, row], want[:, row, start : start + 3])
    assert pair.longest == longest + 6


def test_more_rows_than_there_is_room_for(pair):
    pair.prefill(PROMPTS, max_new_tokens=1)
    with pytest.raises(ValueError, match="there is room for"):
        pair.reorder(torch.tensor([0, 1, 2, 2]))


def test_memory_outlives_a_request_and_what_lies_in_it_does_not():
    cache = KVCache()

    def store(rows, slots, value):
        cache.reserve(rows, slots)
        cache.place(torch.arange(2).expand(rows, -1), slots, 0)
        new = torch.full((rows, 3, 2, 8), value)
        return cache.update(new, -new, 0)

    keys, values = store(6, 40, torch.nan)
    assert keys.shape == values.shape == (6, 3, 40, 8)
    for rows, slots in ((6, 40), (2, 40), (6, 9), (1, 240)):
        again, _ = store(rows, slots, 1.0)
        assert again.data_ptr() == keys.data_ptr()
        assert again.is_contiguous()
        assert again[:, :, :2].eq(1).all()
        assert again[:, :, 2:].eq(0).all()
    grown, _ = store(6, 41, 1.0)
    assert grown.shape == (6, 3, 41, 8)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators do as they like")
def test_activations_come_back_to_memory_that_was_freed():
    """Not to fresh pages, of which each is handed out at its first touch."""
    resource = pytest.importorskip("resource")
    keep_freed_memory.cache_clear()
    SequentialRunner(adapted_runner(Adapter.read(tiny_peft()), native=False))
    faults = []
    for _ in range(2):
        for _ in range(4):
            layer = [torch.ones(3 << 19) for _ in range(4)]  # 6 MB each, 1536 pages
            del layer
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[1] - faults[0] < 1000
