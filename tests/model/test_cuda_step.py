"""The step of Triton kernels, interpreted, against plain transformers; launches and bytes."""

import contextlib
import copy

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from peft import IA3Config, LoraConfig

from svd_engine.kernels import launch, launch_linear, launch_step, triton_step_attend
from svd_engine.model import step
from svd_engine.model.pair import PairedRunner
from svd_engine.model.peft_adapter import Adapter
from svd_engine.model.step import cpu, cuda, trial
from svd_engine.model.step.cuda import CudaStep
from svd_engine.model.step.read import read_plan
from tests.model import architecture_cases
from tests.ops.runners import INTERPRETED
from tests.tiny import tiny_peft

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason=str(launch.unavailable())),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
OFTEN = ("llama", "qwen3", "gemma2")
SELDOM = ("mistral", "qwen2", "gemma3_text", "phi3", "olmo2", "granite")
TWO_KINDS_OF_LAYERS = ("gemma2", "gemma3_text")
PROMPTS = [[5, 17, 40, 9, 33, 60, 71, 8, 101], [150, 43]]
TOKENS = torch.tensor([[4, 12], [13, 1]])
KERNELS = (
    (launch_linear, "linear_tiles"), (launch_linear, "finish_rows"), (launch_step, "finish_norm"),
    (launch_step, "finish_gate"), (launch_step, "finish_heads"), (launch_step, "attend_tiles"),
    (launch_step, "attend_rows"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes a millisecond per program."""
    for module in (triton_step_attend, launch_step):
        monkeypatch.setattr(module, "SPLITS", tl.constexpr(2))
    monkeypatch.setattr(launch_linear, "TILES", ((0, 128, 1),))
    monkeypatch.setattr(launch_linear, "COLUMNS", 16)
    monkeypatch.setattr(launch_linear, "PROGRAMS", 2)
    monkeypatch.setattr(launch_step, "BLOCK_BYTES", 1)


def pair_of(model) -> PairedRunner:
    pair = PairedRunner(Adapter.read(model))
    pair.runner.native = CudaStep(read_plan(pair.runner))
    return pair


def one_layer(model):
    """Every layer takes the interpreter a second."""
    decoder = model.get_base_model().get_decoder()
    decoder.layers = decoder.layers[:1]
    model.config.num_hidden_layers = 1
    return model


@torch.no_grad()
def plain(model, ids):
    """Logits of the adapted model and of the base, after all of `ids`."""
    row = torch.tensor([ids])
    adapted = model(row).logits[0, -1]
    with model.disable_adapter():
        return adapted, model(row).logits[0, -1]


@pytest.mark.parametrize(
    "architecture", [*OFTEN, *(pytest.param(x, marks=pytest.mark.slow) for x in SELDOM)]
)
def test_logits_are_those_of_plain_transformers(architecture, monkeypatch):
    layers = 2 if architecture in TWO_KINDS_OF_LAYERS else 1
    monkeypatch.setitem(architecture_cases.VALUES, "num_hidden_layers", layers)
    monkeypatch.setitem(architecture_cases.VALUES, "vocab_size", 160)
    torch.manual_seed(0)
    model = architecture_cases.adapted(architecture_cases.tiny(architecture))
    pair = pair_of(model)
    pair.prefill(PROMPTS, max_new_tokens=2)
    got = pair.step(TOKENS[:, 0])
    for i, prompt in enumerate(PROMPTS):
        for half, want in zip(got, plain(model, [*prompt, int(TOKENS[i, 0])]), strict=True):
            assert float((half[i] - want).norm() / want.norm()) < 2e-5


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(
            target_modules=["k_proj", "v_proj", "o_proj", "down_proj"],
            feedforward_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM",
        ),
        LoraConfig(
            r=3, target_modules=["q_proj", "v_proj", "up_proj", "lm_head"], lora_bias=True,
            init_lora_weights=False, task_type="CAUSAL_LM",
        ),
        LoraConfig(
            r=3, target_modules=["q_proj", "down_proj"], use_dora=True, modules_to_save=["lm_head"],
            task_type="CAUSAL_LM",
        ),
    ],
    ids=["ia3", "lora with biases", "dora and a saved head"],
)  # fmt: skip
def test_adapters(config):
    model = one_layer(tiny_peft("llama", config))
    pair, walk = pair_of(model), PairedRunner(Adapter.read(model))
    for runner in (pair, walk):
        runner.prefill(PROMPTS[1:], max_new_tokens=4)
    for part in (TOKENS[:1, :1], TOKENS[1:]):
        for got, want in zip(pair.extend(part), walk.extend(part), strict=True):
            assert float((got - want).norm() / want.norm()) < 1e-5
    for got, want in zip(pair.step(TOKENS[:1, 0]), walk.step(TOKENS[:1, 0]), strict=True):
        assert float((got - want).norm() / want.norm()) < 1e-5


@torch.inference_mode()
def test_a_row_alone_has_the_bits_of_a_row_in_a_batch():
    model = one_layer(tiny_peft("qwen3"))
    pair = pair_of(model)

    def logits(rows):
        pair.prefill([PROMPTS[row] for row in rows], max_new_tokens=2)
        for stored in pair.runner.cache.stored(0):  # the modules' bits do depend on the batch
            for place, row in zip(stored, rows * 2, strict=False):
                place.copy_(memory[row, :, : place.shape[1]])
        return torch.stack(pair.step(TOKENS[rows, 0]))

    memory = torch.randn(2, 2, 1024, 16)
    together = logits([0, 1])
    for row in (0, 1):
        assert torch.equal(logits([row])[:, 0], together[:, row])


@contextlib.contextmanager
def launches(monkeypatch):
    """Names of the kernels that are launched, without running them."""
    names = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: names.append(self.name)

    with monkeypatch.context() as patch:
        for module, name in KERNELS:
            patch.setattr(module, name, Recorder(name))
        yield names


def test_ten_kernels_a_layer(monkeypatch):
    pair = pair_of(tiny_peft("llama"))
    pair.prefill(PROMPTS, max_new_tokens=2)
    with launches(monkeypatch) as names:
        pair.step(TOKENS[:, 0])
    layers = len(pair.runner.native.plan.layers)
    around = ["finish_norm", "linear_tiles"]  # before the first layer, and the head
    assert len(names) == 10 * layers + len(around)
    assert len(names) <= 14 * layers


def test_bytes_of_a_step(monkeypatch):
    """Weights are read once, and of the cache what a row has; nothing is copied beside them."""
    pair = pair_of(one_layer(tiny_peft("llama")))
    pair.prefill(PROMPTS[1:], max_new_tokens=40)
    native, cache = pair.runner.native, pair.runner.cache
    memory = {}
    for layer in native.plan.layers:
        for name in ("query", "key", "value", "output", "gate", "up", "down"):
            memory[f"{len(memory)} {name}"] = getattr(layer, name).weight
    kept = {f"{i} {j}": x for i in range(1) for j, x in enumerate(cache.stored(i))}
    weights = sum(x.numel() for x in memory.values())
    read = dict.fromkeys([*memory, *kept], 0)
    spans = {k: (x.data_ptr(), x.data_ptr() + x.nbytes) for k, x in (memory | kept).items()}
    builder = triton.runtime.interpreter.InterpreterBuilder
    original = builder.create_masked_load

    def count(self, pointers, mask, *rest):
        for name, (begin, end) in spans.items():
            here = (pointers.data >= begin) & (pointers.data < end)
            read[name] += int((here & mask.data).sum())
        return original(self, pointers, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", count)
    pair.step(TOKENS[1:, 0])
    assert sum(read[name] for name in memory) == weights
    length, form = len(PROMPTS[1]) + 1, native.plan.layers[0]
    assert all(read[name] == 2 * length * form.kv_heads * form.head_dim for name in kept)


@pytest.mark.slow
def test_who_runs_is_said(monkeypatch):
    monkeypatch.setattr(step, "CpuStep", CudaStep)  # as for weights on a GPU
    monkeypatch.setattr(cpu, "why_not", cuda.why_not)
    monkeypatch.setattr(trial, "MANY", 1)  # rows and slots take the interpreter long
    monkeypatch.setattr(trial, "FAR", (40,))
    pair, other = (PairedRunner(Adapter.read(one_layer(tiny_peft("llama")))) for _ in range(2))
    step.use_native_step(pair.runner, lambda: other.runner)
    assert pair.runner.how == "cuda"
    other = PairedRunner(Adapter.read(copy.deepcopy(tiny_peft("llama")).double()))
    step.use_native_step(other.runner, lambda: other.runner)
    assert other.runner.how == "module by module, because the weights are float64"
