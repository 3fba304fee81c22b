"""Every causal language model of transformers that a tiny random one can be built of.

`found` makes an engine of it with a LoRA and compares it with the plain models.
"""

import copy
import dataclasses
import functools
import inspect
import re
import traceback
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.kernels import reference
from svd_engine.model.pair import PairedRunner

LARGEST = 2_000_000  # parameters
TEXTS = [[5, 17, 40, 9, 33, 60, 71, 8, 101], [150, 43], [7, 9, 120, 33, 88]]
NEW = 6  # tokens: more than the window of the tiny models
# Fields of configurations by their size; a configuration takes those that it has.
SIZES = {
    2: """
        num_hidden_layers n_layer n_layers decoder_layers encoder_layers num_layers
        num_decoder_layers num_encoder_layers num_experts_per_tok moe_topk moe_k
        num_global_key_value_heads index_n_heads linear_num_key_heads num_key_value_heads
        swa_num_key_value_heads
    """,
    1: """
        n_group topk_group n_shared_experts mamba_n_groups moe_num_shared_experts
        first_k_dense_replace
    """,
    4: """
        num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads
        num_heads attention_heads num_decoder_attention_heads num_encoder_attention_heads
        num_local_experts num_experts n_routed_experts moe_num_experts rotary_dim
        qk_rope_head_dim state_size mamba_n_heads linear_num_value_heads index_topk
        swa_num_attention_heads
    """,
    5: """
        sliding_window attention_chunk_size attention_window_size window_size
    """,
    8: """
        head_dim qk_nope_head_dim v_head_dim mamba_d_state mamba_chunk_size chunk_size
        linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input index_head_dim
        d_kv kv_channels global_head_dim swa_head_dim swa_v_head_dim query_pre_attn_scalar
    """,
    16: """
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        q_lora_rank kv_lora_rank expert_ffn_hidden_size mamba_d_head
    """,
    32: """
        hidden_size n_embd d_model embed_dim word_embed_proj_dim embedding_size d_embed
        lru_width emb_dim
    """,
    48: """
        intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim n_inner d_inner dff d_ff
        mlp_hidden_size ffn_hidden_size dim_feedforward
    """,
    128: """
        max_position_embeddings n_positions n_ctx max_target_positions max_source_positions
    """,
}
VALUES = {name: size for size, names in SIZES.items() for name in names.split()} | dict(
    vocab_size=211, vocab_size_per_layer_input=211, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.2, init_std=0.2, is_decoder=True, expand=2,
)  # fmt: skip
LATENT = """
    axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 youtu
"""
OTHER = {name: dict(num_key_value_heads=4) for name in LATENT.split()} | {
    "bert": dict(is_decoder=False),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "jamba": dict(attn_layer_offset=1, attn_layer_period=2),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "longcat_flash": dict(num_key_value_heads=4, head_dim=4, qk_rope_head_dim=4),
    "mamba2": dict(num_heads=4, head_dim=16),
}


class Found(NamedTuple):
    architecture: str
    outcome: str  # "paired", "two passes" or "refused"
    reason: str
    error: float = 0.0  # of logits, as a share of their spread
    wrong_tokens: int = 0
    step: str = ""  # how decode steps run


def config(architecture):
    cls = CONFIG_MAPPING[architecture]
    names = (
        {field.name for field in dataclasses.fields(cls)}
        if dataclasses.is_dataclass(cls)
        else set(inspect.signature(cls.__init__).parameters)
    )
    aliases = getattr(cls, "attribute_map", {})
    values = {k: v for k, v in VALUES.items() if k in names or k in aliases}
    values = {k: v for k, v in values.items() if aliases.get(k, k) == k or aliases[k] not in values}
    return cls(**values | OTHER.get(architecture, {}))


@functools.cache
def buildable():
    """The architectures of which a tiny model can be built and run."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _is_tiny(name)]


def _is_tiny(architecture):
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config(architecture))
        return sum(p.numel() for p in model.parameters()) <= LARGEST
    except Exception:  # it needs other fields, or a package
        return False


def tiny(architecture):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(architecture), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.normal_()
    return model


def adapted(model):
    """A LoRA on the linear layers that see every token."""
    head = model.get_output_embeddings()
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not re.search(r"expert|router|(^|\.)gate$|out_proj|lm_head|cls\.|encoder_attn", name)
    ]
    peft_model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    ).eval()
    torch.manual_seed(1)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn_like(parameter)
    return peft_model


@torch.no_grad()
def found(architecture):
    """Try one architecture; None where plain PEFT or plain transformers does not run it."""
    base = tiny(architecture)
    rows = torch.tensor([text + [11] * (9 - len(text)) for text in TEXTS])
    try:
        plain = copy.deepcopy(base)
        model = adapted(base)
        for reference_model in (plain, model):
            reference_model(input_ids=rows, use_cache=False)
    except Exception:
        return None
    name = type(plain).__name__
    try:
        engine = SteeredEngine(model, steering=SteeringConfig(-2.0))
    except ValueError as error:
        assert str(error).startswith(name), error
        return Found(name, "refused", _reason(error))
    error = _error(engine.pair, plain, model)
    wrong = sum(
        _wrong_tokens(plain, model, text, got.token_ids)
        for text, got in zip(
            TEXTS, engine.generate(TEXTS, max_new_tokens=NEW, eos_token_id=[]), strict=True
        )
    )
    is_paired = isinstance(engine.pair, PairedRunner)
    reason = (
        "" if is_paired else re.sub(r"[\w.]*\.", "", str(engine._models.adapted.reason_not_paired))
    )
    outcome = "paired" if is_paired else "two passes"
    return Found(name, outcome, reason, error, wrong, engine.step)


def _reason(error):
    """What a refusal says, without numbers that vary and without the words of others."""
    told = re.sub(r"^\w+ cannot be decoded: ", "", str(error))
    if differs := re.match(r"in a trial the logits of .* differ from the model's own", told):
        return "in a trial " + re.sub(r".*(differ)", r"logits \1", differs[0])
    frames = traceback.extract_tb(error.__cause__.__traceback__)
    ours = "svd_engine" in frames[-1].filename and isinstance(
        error.__cause__, ValueError | AttributeError
    )
    return told.removesuffix(".") if ours else f"{type(error.__cause__).__name__} in the trial"


def _error(pair, plain, model):
    first = pair.logits(pair.prefill([text[:-1] for text in TEXTS], max_new_tokens=1))
    second = pair.step(torch.tensor([text[-1] for text in TEXTS]))
    errors = []
    for i, text in enumerate(TEXTS):
        for half, reference_model in enumerate((model, plain)):
            want = reference_model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -2:]
            got = torch.stack([first[half][i], second[half][i]])
            errors.append((got - want).norm() / (want - want.mean(-1, keepdim=True)).norm())
    return float(torch.stack(errors).max())


def _wrong_tokens(plain, model, prompt, tokens):
    row = torch.tensor([prompt + tokens[:-1]])
    z, b = (
        m(input_ids=row, use_cache=False).logits[0, -len(tokens) :].float() for m in (model, plain)
    )
    steered = reference.steer(z, b, -2.0, alpha=0.1)
    chosen = steered.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return int((steered.amax(1) - chosen > 1e-3).sum())
