"""Reads the plan of a decoder from its tree of modules and from one pass through it."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svd_engine.model.adapter_layers import AdaptedLayer, PairedIa3, PairedLoraLinear
from svd_engine.model.layers import attention, linear, rms_norm
from svd_engine.model.step.plan import Layer, Linear, Norm, Plan, Rotary

if TYPE_CHECKING:
    from svd_engine.model.runner import ModelRunner

STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # a position's angles depend on it alone
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}
MODULES = {  # what a part may hold; with anything else it computes something else
    "decoder": {"embed_tokens", "layers", "norm", "rotary_emb"},
    "layer": {
        "self_attn", "mlp", "input_layernorm", "post_attention_layernorm",
        "pre_feedforward_layernorm", "post_feedforward_layernorm", "resid_attn_dropout",
        "resid_mlp_dropout",
    },
    "self_attn": {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"},
    "mlp": {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"},
}  # fmt: skip


class NotDescribed(Exception):  # noqa: N818
    """Why a decoder has no plan."""


def read_plan(runner: "ModelRunner") -> Plan:
    """Read the plan of a `ModelRunner`'s model. Raise NotDescribed where it has none."""
    model: Any = runner.model
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers") or not hasattr(decoder, "norm"):
        raise NotDescribed(f"{type(decoder).__name__} has no layers and norm")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise NotDescribed(f"{name} has hooks")
    _holds_only("decoder", decoder)
    layers = list(decoder.layers)
    first_inputs, calls = _record(runner, layers[0])
    if len(calls) != len(layers):
        raise NotDescribed(f"{len(layers)} layers call attention {len(calls)} times")
    rotaries, which = _rotaries(decoder, model.config.get_text_config(), len(layers))
    return Plan(
        layers=tuple(
            _layer(layer, call, which[i])
            for i, (layer, call) in enumerate(zip(layers, calls, strict=True))
        ),
        norm=_norm(decoder.norm),
        head=_linear(model.get_output_embeddings()),
        embedding_scale=_embedding_scale(model, *first_inputs),
        rotaries=rotaries,
    )


def _record(
    runner: "ModelRunner", first_layer: nn.Module
) -> tuple[tuple[Tensor, Tensor], list[Any]]:
    """Run a token; return it, the first layer's input, and what attention was called with."""
    token = torch.ones(2 if runner.paired else 1, 1, dtype=torch.int64)
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    hook = first_layer.register_forward_pre_hook(keep, with_kwargs=True)
    calls: list[Any] = []
    recording = attention.RECORDING.set(calls)
    try:
        runner.prefill(token.tolist())
    finally:
        attention.RECORDING.reset(recording)
        hook.remove()
    token = token.to(runner.model.device)
    at = torch.zeros(len(token), dtype=torch.int64)  # the token's place, after virtual tokens
    if runner.prompt_embeddings is not None:
        at[len(token) // 2 if runner.paired else 0 :] = runner.virtual_tokens
    return (token, seen[0][torch.arange(len(token)), at]), calls


def _embedding_scale(model: Any, token: Tensor, x: Tensor) -> float | Tensor | None:
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(token)[:, 0]
    if torch.equal(x, embedded):
        return None
    config = model.config.get_text_config()
    for scale in (
        torch.tensor(config.hidden_size**0.5, dtype=x.dtype),
        getattr(config, "embedding_multiplier", 1.0),
    ):
        if torch.equal(x, embedded * scale):
            return scale
    raise NotDescribed("the first layer reads more than scaled embeddings")


def _rotaries(
    decoder: Any, config: Any, layers: int
) -> tuple[tuple[Rotary, ...], list[int | None]]:
    """Return the tables' functions, and which of them each layer reads."""
    module = getattr(decoder, "rotary_emb", None)
    if module is None:
        raise NotDescribed("its positions are not rotary")
    types = getattr(module, "rope_type", "default")
    for kind in types.values() if isinstance(types, dict) else [types]:
        if kind not in STATIC_ROPE:
            raise NotDescribed(f"its rotary embedding is {kind}")
    like = next(decoder.parameters())

    def table(*layer_type: str) -> Rotary:
        @torch.inference_mode()
        def compute(positions: int) -> tuple[Tensor, Tensor]:
            x = torch.zeros(1, dtype=like.dtype, device=like.device)
            cos, sin = module(x, torch.arange(positions, device=like.device)[None], *layer_type)
            return cos[0].contiguous(), sin[0].contiguous()

        return compute

    if "layer_type" not in inspect.signature(type(module).forward).parameters:
        return (table(),), [0] * layers
    kinds = sorted(set(config.layer_types))
    return tuple(map(table, kinds)), [kinds.index(kind) for kind in config.layer_types]


def _layer(layer: Any, call: attention.Call, rotary: int | None) -> Layer:
    attn, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attn is None or mlp is None:
        raise NotDescribed(f"{type(layer).__name__} has no self_attn and mlp")
    for name, module in dict(layer=layer, self_attn=attn, mlp=mlp).items():
        _holds_only(name, module)
    if not call.is_plain:
        raise NotDescribed("its attention takes more than queries, keys and values of one width")
    dim = call.head_dim
    sizes = [call.heads * dim, call.kv_heads * dim, call.kv_heads * dim]
    query, key, value = _parts(attn, ("q_proj", "k_proj", "v_proj"), "qkv_proj", sizes)
    gate, up = _parts(mlp, ("gate_proj", "up_proj"), "gate_up_proj", None)
    if any(x.input_scale is not None for x in (query, key, value, gate, up)):
        raise NotDescribed("the input of joined layers is scaled")
    act = getattr(mlp, "act_fn", None) or mlp.activation_fn
    return Layer(
        query=query, key=key, value=value, output=_linear(attn.o_proj),
        gate=gate, up=up, down=_linear(mlp.down_proj), **_layer_norms(layer),
        query_norm=_norm(getattr(attn, "q_norm", None)),
        key_norm=_norm(getattr(attn, "k_norm", None)),
        heads=call.heads, kv_heads=call.kv_heads, head_dim=dim, window=call.window,
        rotary=rotary if getattr(attn, "use_rope", True) else None, activation=_activation(act),
        scaling=call.scaling, softcap=call.softcap,
        residual_scale=float(getattr(layer, "residual_multiplier", 1.0)),
    )  # fmt: skip


def _holds_only(part: str, module: nn.Module) -> None:
    for name, child in module.named_children():
        if name not in MODULES[part] and any(True for _ in child.parameters()):
            raise NotDescribed(f"{type(module).__name__} holds {name}")


def _parts(
    module: Any, names: tuple[str, ...], joined: str, sizes: list[int] | None
) -> list[Linear]:
    """The linear layers of these names, or the parts of the one that joins them."""
    if not hasattr(module, joined):
        return [_linear(getattr(module, name)) for name in names]
    whole = _linear(getattr(module, joined))
    if whole.input_scale is not None or whole.output_scale is not None:
        raise NotDescribed(f"{joined} is scaled")
    sizes = sizes or [len(whole.weight) // len(names)] * len(names)

    def part(start: int, size: int) -> Linear:
        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[start : start + size]

        weight, low_rank = whole.weight[start : start + size], whole.low_rank
        if low_rank is not None:
            down, up, up_bias = low_rank
            low_rank = down, up[start : start + size], rows(up_bias)
        return Linear(weight, rows(whole.bias), low_rank)

    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [part(start, size) for start, size in zip(starts, sizes, strict=True)]


def _linear(module: Any) -> Linear:
    base: Any = module.base_layer if isinstance(module, AdaptedLayer) else module
    if type(base) not in (nn.Linear, linear.Linear):
        raise NotDescribed(f"it has a {type(base).__name__}")
    weight, bias = base.weight, base.bias
    if type(weight) not in linear.PLAIN or weight.stride(1) != 1:
        raise NotDescribed("a weight is no plain matrix")
    plain = Linear(weight.detach(), None if bias is None else bias.detach())
    if module is base:
        return plain
    if isinstance(module, PairedLoraLinear):
        return Linear(plain.weight, plain.bias, low_rank=module.low_rank)
    if isinstance(module, PairedIa3):
        scale = module.scale.contiguous()
        if module.is_feedforward:
            return Linear(plain.weight, plain.bias, input_scale=scale)
        return Linear(plain.weight, plain.bias, output_scale=scale)
    raise NotDescribed(f"it has a {type(module).__name__}")


def _norm(module: Any) -> Any:
    if module is None:
        return None
    found = getattr(module, "native_form", None) or rms_norm.recognise(module)
    if found is None:
        raise NotDescribed(f"{type(module).__name__} is no known RMSNorm")
    return Norm(module.weight.detach(), *found)


def _layer_norms(layer: Any) -> dict[str, Norm | None]:
    named = {
        name: getattr(layer, name, None) for name in MODULES["layer"] if name.endswith("layernorm")
    }
    before, after = named["input_layernorm"], named["post_attention_layernorm"]
    pre, post = named["pre_feedforward_layernorm"], named["post_feedforward_layernorm"]
    places = ("attention_norm", "attended_norm", "feedforward_norm", "fed_norm")
    if before is not None and pre is None and post is None:
        found = before, None, after, None  # Llama
    else:
        found = before, after, pre, post  # Gemma 2; without `before` and `pre`, OLMo 2
    return dict(zip(places, map(_norm, found), strict=True))


def _activation(act: Callable[[Tensor], Tensor]) -> str:
    x = torch.linspace(-6, 6, 97)
    for name, function in ACTIVATIONS.items():
        if torch.allclose(act(x), function(x), atol=1e-6):
            return name
    raise NotDescribed(f"its activation is {type(act).__name__}")
