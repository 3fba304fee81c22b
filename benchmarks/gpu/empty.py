"""A Triton kernel that does nothing: what a launch costs."""

import triton


@triton.jit
def nothing(x):
    pass
