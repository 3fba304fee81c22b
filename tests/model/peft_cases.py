"""Every PEFT method, and every option of LoRA that changes what is computed, on a tiny Llama."""

import contextlib
import functools
import importlib.util
import re
import sys
import tempfile
import types
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import config as lora

from svd_engine import loading
from svd_engine.model import peft_methods
from svd_engine.model.adapter_layers import Halves
from svd_engine.model.pair import PairedRunner, pair_models
from svd_engine.model.peft_adapter import Adapter
from tests.tiny import PROMPTS, tiny_base

LAYERS = dict(target_modules=["q_proj", "v_proj", "down_proj"])
RANK = LAYERS | dict(r=4)
VIRTUAL = dict(num_virtual_tokens=4)


def sub(name, **options):
    """A configuration inside LoRA's, made once it is known that this version of PEFT has it."""
    return lambda: getattr(lora, name)(**options)


OPTIONS_OF_LORA = (
    dict(use_rslora=True),
    dict(lora_bias=True),
    dict(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}),
    dict(target_modules=["embed_tokens", "lm_head"]),
    dict(target_modules=[], target_parameters=["q_proj.weight", "down_proj.weight"]),
    dict(modules_to_save=["lm_head", "norm"]),
    dict(trainable_token_indices=[5, 7, 9]),
    dict(bias="all"),
    dict(layer_replication=[[0, 2], [0, 2]]),
    dict(use_dora=True),
    dict(use_qalora=True, qalora_group_size=4),
    dict(
        use_bdlora=sub(
            "BdLoraConfig",
            target_modules_bd_a=["q_proj"],
            target_modules_bd_b=["v_proj"],
            nblocks=2,
            match_strict=False,
        )
    ),
    dict(velora_config=sub("VeloraConfig", num_groups=4)),
    dict(monteclora_config=sub("MontecloraConfig")),
    dict(kasa_config=sub("KasaConfig")),
    dict(arrow_config={"top_k": 2}),
    dict(alora_invocation_tokens=[7, 7]),
    *(
        dict(init_lora_weights=init)
        for init in (
            False, "gaussian", "orthogonal", "eva", "mica", "pissa", "pissa_niter_2", "olora",
        )
    ),
    dict(init_lora_weights="corda", corda_config={}),
    dict(init_lora_weights="loftq", loftq_config=dict(loftq_bits=4)),
    dict(init_lora_weights="lora_ga", lora_ga_config=sub("LoraGAConfig")),
)  # fmt: skip
NOT_BUILT = {"arrow_config", "corda_config", "loftq_config"}  # without experts, data, scipy
CASES = (
    ("LORA", RANK),
    *(("LORA", RANK | options) for options in OPTIONS_OF_LORA),
    ("ADALORA", RANK | dict(total_step=10)),
    ("ADAMSS", LAYERS | dict(r=8, num_subspaces=2)),
    ("ADAPTION_PROMPT", dict(adapter_len=4, adapter_layers=2)),
    ("BEFT", LAYERS),
    ("BOFT", LAYERS | dict(boft_block_size=4)),
    ("BONE", RANK),
    ("C3A", LAYERS | dict(block_size=16)),
    ("CARTRIDGE", VIRTUAL),
    (
        "CPT",
        dict(cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4]),
    ),
    ("DEFT", RANK),
    ("DELORA", RANK),
    ("FOURIERFT", LAYERS | dict(n_frequency=50)),
    ("FROD", LAYERS | dict(progressbar=False)),
    ("GLORA", RANK),
    ("GRALORA", RANK),
    ("HIRA", RANK),
    ("HRA", RANK),
    ("IA3", dict(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    ("LILY", RANK),
    ("LN_TUNING", dict(target_modules=["input_layernorm", "norm"])),
    ("LOHA", RANK),
    ("LOKR", RANK),
    ("MISS", RANK),
    ("MISS", RANK | dict(init_weights="bat")),
    ("MISS", RANK | dict(init_weights="mini", mini_r=2)),
    ("MULTITASK_PROMPT_TUNING", VIRTUAL | dict(num_tasks=2)),
    ("OFT", LAYERS | dict(oft_block_size=4)),
    ("OSF", LAYERS),
    ("PEANUT", RANK),
    ("POLY", RANK | dict(n_tasks=2)),
    ("PREFIX_TUNING", VIRTUAL),
    ("PROMPT_TUNING", VIRTUAL),
    ("PSOFT", RANK),
    ("PVERA", LAYERS | dict(r=8)),
    ("PVERA", LAYERS | dict(r=8, sample_at_inference=True)),
    ("P_TUNING", VIRTUAL | dict(encoder_hidden_size=16)),
    ("RANDLORA", RANK),
    ("ROAD", LAYERS | dict(group_size=8)),
    ("SHADOW", RANK),
    ("SHIRA", RANK),
    ("SUPERTUNING", LAYERS | dict(sparsity=0.9)),
    ("SUPERTUNING", LAYERS | dict(sparsity=0.9, r=4, lora_alpha=8)),
    ("TINYLORA", LAYERS),
    ("TRAINABLE_TOKENS", dict(token_indices=[5, 7, 9])),
    ("UNILORA", LAYERS),
    ("VBLORA", LAYERS | dict(vector_length=8, num_vectors=16)),
    ("VERA", LAYERS | dict(r=8)),
    ("WAVEFT", LAYERS | dict(n_frequency=50)),
    ("XLORA", dict(hidden_size=32)),
)


class Found(NamedTuple):
    """What became of a case."""

    method: str
    outcome: str  # paired, two passes, refused
    reason: str


def label(case):
    """LORA, or LORA `use_dora=True`: the method and what is special about it."""
    method, options = case
    usual = next(usual for name, usual in CASES if name == method)
    special = {k: v for k, v in options.items() if usual.get(k) != v and not k.endswith("size")}
    shown = [
        f"`{k}={v!r}`" if isinstance(v, str | bool | list) else f"`{k}`" for k, v in special.items()
    ]
    return " ".join([method, *shown])


def available(case):
    """Whether the installed version of PEFT has the method and its options."""
    method, options = case
    if method not in PeftType.__members__:
        return False
    known = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[method]].__dataclass_fields__
    if options.get("init_lora_weights") == "mica":
        return "mica" in known["init_lora_weights"].metadata.get("lora_variants", ())
    return options.keys() <= known.keys()


def build(case, folder):
    """A random adapter that changes the model visibly."""
    method, options = case
    options = {name: value() if callable(value) else value for name, value in options.items()}
    if method == "XLORA":
        plain = get_peft_model(tiny_base("llama"), LoraConfig(task_type="CAUSAL_LM", **RANK))
        plain.save_pretrained(folder / "expert")
        options["adapters"] = {"0": str(folder / "expert")}
    with clustering():
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[method]](task_type="CAUSAL_LM", **options)
        base = tiny_base("llama")
        base.config.use_cache = method != "XLORA"  # which wants none
        model = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    return model


@contextlib.contextmanager
def clustering():
    """A stand-in for the only function of scikit-learn that PEFT needs, unless it is installed."""
    if importlib.util.find_spec("sklearn") is not None:
        yield
        return

    class KMeans:
        def __init__(self, n_clusters, **_):
            self.clusters = n_clusters

        def fit_predict(self, rows):
            return torch.arange(len(rows)).remainder(self.clusters).numpy()

    package, module = types.ModuleType("sklearn"), types.ModuleType("sklearn.cluster")
    package.cluster, module.KMeans = module, KMeans
    names = {"sklearn": package, "sklearn.cluster": module}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


NATIVE_ALONE = "in float32 two native passes are faster, and the default"


@functools.cache
def found(index):
    """Try a case as it is loaded from a folder. Raise AssertionError where a model is wrong."""
    case = CASES[index]
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        try:
            if case[1].keys() & NOT_BUILT:
                peft_methods.check({"default": _altered(case)})
            model = build(case, Path(name))
            reason = Adapter.read(model).reason_not_paired or ""
        except ValueError as error:
            return Found(label(case), "refused", _reason(error))
        model.save_pretrained(f"{name}/adapter")
        with clustering():
            loaded = loading.load_adapter(tiny_base("llama"), f"{name}/adapter")
        adapter = Adapter.read(loaded)
        chosen = pair_models(adapter)
        _compare(chosen, adapter, loaded, model)
        if reason:
            return Found(label(case), "two passes", re.sub(r"\S+\.(\w+)", r"\1", reason))
        if isinstance(chosen, PairedRunner):
            return Found(label(case), "paired", _own_layers(chosen))
        pair = pair_models(adapter, "paired")
        _compare(pair, adapter, loaded, model)
        told = _own_layers(pair)
        return Found(label(case), "paired", f"{told + '; ' * bool(told)}{NATIVE_ALONE}")


def _altered(case):
    """A configuration that PEFT makes only of more than a test has."""
    config = LoraConfig(task_type="CAUSAL_LM", **RANK)
    for name, value in case[1].items():
        setattr(config, name, value)
    return config


def _own_layers(pair):
    """Which layers are read once for each half."""
    named = pair.runner.model.named_modules()
    names = {name.rpartition(".")[2]: None for name, x in named if isinstance(x, Halves)}
    return f"each half has its own {', '.join(names)}" if names else ""


def _compare(pair, adapter, loaded, model):
    """Compare both models with plain ones, several ragged prompts at once, a prefill and a step."""
    base = tiny_base("llama")
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]
    first = pair.logits(pair.prefill([prompt[:-1] for prompt in prompts], max_new_tokens=1))
    second = pair.step(torch.tensor([prompt[-1] for prompt in prompts]))
    apart = 0.0
    for i, prompt in enumerate(prompts):
        truths = [whole(torch.tensor([prompt])).logits[0, -2:] for whole in (model, base)]
        for before, after, truth in zip(first, second, truths, strict=True):
            torch.testing.assert_close(
                torch.stack([before[i], after[i]]), truth, atol=2e-4, rtol=1e-5
            )
        apart = max(apart, float((truths[0] - truths[1]).abs().max()))
    assert apart > 0.1
    loaded(torch.tensor(prompts[:1]))
    adapter.state.check()  # a pass of PEFT's own changes nothing


def _reason(error):
    text = str(error).removeprefix("adapter 'default' ")
    return re.split(r": it cannot|, so that|, so the|\. ", text)[0].replace("|", "\\|")
