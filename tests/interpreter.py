"""Triton's interpreter without what makes it slow.

It patches `triton.language` again at every call of a device function, which takes milliseconds, and
reduces with a function of ours one element after the other. After `speed_up` it patches at a launch
and for the first function of a module, and reduces by pairs of neighbours until one element is
left; a sum then rounds as in a device's tree.
"""

from typing import Any

from triton.runtime import interpreter

PATCHED: set[str] = set()  # modules


def _call(function: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    if function.fn.__module__ not in PATCHED:
        PATCHED.add(function.fn.__module__)
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **kwargs)


def _reduce(reduction: interpreter.ReduceOps, inputs: tuple[Any, ...]) -> list[Any]:
    inputs, axis = reduction.unravel(inputs, reduction.axis)
    while (length := inputs[0].handle.data.shape[axis]) > 1:
        assert length % 2 == 0, "tiles are powers of two"
        pairs = [
            reduction.to_tensor(x.handle.data.take(range(first, length, 2), axis), x.dtype)
            for first in (0, 1)
            for x in inputs
        ]
        reduced = reduction.combine_fn.fn(*pairs)
        inputs = reduced if isinstance(reduced, tuple) else (reduced,)
    outputs = []
    for x in inputs:
        data = x.handle.data
        if not reduction.keep_dims:
            data = data.squeeze(axis) if data.ndim > 1 else data.item()
        outputs.append(reduction.to_tensor(data, x.dtype))
    return outputs


def speed_up() -> None:
    """Change the interpreter for the rest of the process."""
    interpreter.InterpretedFunction.__call__ = _call
    interpreter.ReduceOps.generic_reduce = _reduce
