"""Whether a model's masks hide what our attention hides: later tokens, and those out of a window.

A runner hands its own causal mask to the model, so that a window which stands only in the model's
masks would be lost. Windows are longer than a trial of a few tokens; therefore the masks are asked
for at the end of the context.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from svd_engine.model.module_tree import base_tree
from svd_engine.model.peft_adapter import Adapter

NAME = "svd_engine_masks"
END = 1 << 17  # of the context that is looked at
OTHER, ENCODER = -1, -2  # a mask that is not a window, and one that shows later tokens
SEEN = "svd_engine_compared"  # set on the clones of modules that call attention


def check(adapter: Adapter) -> None:
    """Raise ValueError where attention has no other way to know of a window than the mask."""
    tree = base_tree(adapter)
    tree.set_attn_implementation(NAME)
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=tree.device)
    tree.get_decoder()(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    if any(getattr(module, SEEN, False) for module in tree.modules()):
        return
    for name in ("window_size", "sliding_window", "attention_window_size", "attention_chunk_size"):
        if (window := getattr(tree.config.get_text_config(), name, None)) is not None:
            raise ValueError(f"its attention is its own, and {name} = {window} may count there.")


def _window(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable,
    device: Any,
    **_: Any,
) -> Tensor:
    """Build a mask `[rows, 1, q, kv]` filled with the window; 0 is none."""
    slots, windows = torch.arange(END, device=device), set()
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    for position in (END - 2, END - END // 3):
        sees = mask_function(zero, zero, slots[position], slots).expand(END)
        window = int(sees.sum())
        expected = (slots <= position) & (slots > position - window)
        if sees[position + 1 :].any():
            windows.add(ENCODER)
        elif not sees.equal(expected):
            windows.add(OTHER)
        else:
            windows.add(window if window <= position else 0)
    value = windows.pop() if len(windows) == 1 else OTHER
    return torch.full((batch_size, 1, q_length, kv_length), float(value), device=device)


def _compare(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compare a mask made by `_window` with the window that a layer hands to attention."""
    setattr(module, SEEN, True)
    handed = sliding_window if sliding_window is not None and sliding_window < END else 0
    asked = handed if attention_mask is None else int(attention_mask.flatten()[0])
    if asked != handed:
        what = f"has a window of {asked} tokens in its mask alone"
        if asked <= 0:
            what = "sees later tokens" if asked == ENCODER else "has a mask that is no window"
        raise ValueError(f"{type(module).__name__} {what}.")
    rows, heads, length, _dim = query.shape
    return query.new_zeros(rows, length, heads, value.shape[3]), None


AttentionMaskInterface.register(NAME, _window)
AttentionInterface.register(NAME, _compare)
