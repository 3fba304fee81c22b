"""Reads the plan of a decoder from its modules and from two passes of a token through them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svd_engine.model.layers import attention
from svd_engine.model.step import parts, rotary
from svd_engine.model.step.parts import NotDescribed
from svd_engine.model.step.plan import Layer, Linear, Plan

if TYPE_CHECKING:
    from svd_engine.model.runner import ModelRunner

FAR = (1 << 17) - 1  # a position beyond every limit at which a model changes its ways
MODULES = {  # what a part may hold; with anything else it computes something else
    "decoder": {"embed_tokens", "layers", "norm", "rotary_emb"},
    "layer": {
        "self_attn", "mlp", "resid_attn_dropout", "resid_mlp_dropout", *parts.LAYER_NORMS,
    },
    "attention": {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"},
    "feed-forward": {
        "gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn",
    },
}  # fmt: skip


def read_plan(runner: "ModelRunner") -> Plan:
    """Read the plan of a `ModelRunner`'s model. Raise NotDescribed where it has none."""
    model: Any = runner.model
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers") or not hasattr(decoder, "norm"):
        raise NotDescribed("its decoder has no layers and norm")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            raise NotDescribed(f"{name or 'it'} has hooks or a forward of its own")
    _holds_only("decoder", decoder)
    layers, angles = list(decoder.layers), rotary.angles(decoder)
    first_input, calls = _record(model, layers[0])
    if len(calls) != len(layers):
        raise NotDescribed("its layers do not call attention once each")
    read = tuple(
        _layer(layer, call, rotary.which(angles, call.query, call.key, FAR))
        for layer, call in zip(layers, calls, strict=True)
    )
    return Plan(
        layers=read,
        norm=parts.norm(decoder.norm),
        head=_head(model, read[0].query.bits),
        embedding_scale=_embedding_scale(model, first_input),
        rotaries=tuple(map(rotary.table, angles)),
    )


def _head(model: Any, bits: int) -> Linear | None:
    """Read the head; None if its module is to compute the logits.

    bits: of the other layers' codes, whose inputs are packed as those of the head.
    """
    try:
        head = parts.linear(model.get_output_embeddings())
    except NotDescribed:
        return None
    return head if head.input_scale is None and head.bits == bits else None


@torch.inference_mode()
def _record(model: Any, first_layer: nn.Module) -> tuple[Tensor, list[attention.Call]]:
    """Run token 1 at position 0 and at FAR, in both halves.

    Return what the first layer reads, and what each layer hands to attention.
    """
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    hook = first_layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with attention.recorded() as calls:
            model.get_decoder()(
                input_ids=_tokens(model),
                attention_mask=torch.zeros(4, 1, 1, 1, dtype=model.dtype, device=model.device),
                position_ids=torch.tensor([[0], [FAR]], device=model.device).repeat(2, 1),
                use_cache=False,
            )
    finally:
        hook.remove()
    return inputs[0][:, 0], calls


def _tokens(model: Any) -> Tensor:
    return torch.ones(4, 1, dtype=torch.int64, device=model.device)


@torch.inference_mode()
def _embedding_scale(model: Any, first_input: Tensor) -> float | Tensor | None:
    embedded = model.get_input_embeddings()(_tokens(model))[:, 0]
    if torch.equal(first_input, embedded):
        return None
    config = model.config.get_text_config()
    for scale in (
        torch.tensor(config.hidden_size**0.5, dtype=embedded.dtype),
        getattr(config, "embedding_multiplier", 1.0),
    ):
        if torch.equal(first_input, embedded * scale):
            return scale
    raise NotDescribed("its first layer reads more than scaled embeddings")


def _layer(layer: Any, call: attention.Call, which_rotary: int | None) -> Layer:
    attn, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attn is None or mlp is None:
        raise NotDescribed("its layers have no self_attn and mlp")
    for part, module in (("layer", layer), ("attention", attn), ("feed-forward", mlp)):
        _holds_only(part, module)
    if not call.is_plain:
        raise NotDescribed("its attention takes more than queries, keys and values of one width")
    dim = call.head_dim
    sizes = [call.heads * dim, call.kv_heads * dim, call.kv_heads * dim]
    query, key, value = parts.joined(attn, ("q_proj", "k_proj", "v_proj"), "qkv_proj", sizes)
    gate, up = parts.joined(mlp, ("gate_proj", "up_proj"), "gate_up_proj", None)
    if any(x.input_scale is not None for x in (query, key, value, gate, up)):
        raise NotDescribed("the input of joined layers is scaled")
    return Layer(
        query=query, key=key, value=value, output=parts.linear(attn.o_proj),
        gate=gate, up=up, down=parts.linear(mlp.down_proj), **parts.layer_norms(layer),
        query_norm=parts.norm(getattr(attn, "q_norm", None)),
        key_norm=parts.norm(getattr(attn, "k_norm", None)),
        heads=call.heads, kv_heads=call.kv_heads, head_dim=dim, window=call.window,
        rotary=which_rotary, activation=parts.activation(mlp), scaling=call.scaling,
        softcap=call.softcap,
        residual_scale=float(getattr(layer, "residual_multiplier", 1.0)),
    )  # fmt: skip


def _holds_only(part: str, module: nn.Module) -> None:
    other = [
        name
        for name, child in module.named_children()
        if name not in MODULES[part] and any(True for _ in child.parameters())
    ]
    if other:
        raise NotDescribed(f"its {part} holds {', '.join(sorted(other))}")
