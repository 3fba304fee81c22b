"""A Triton kernel that does nothing, to time a launch."""

import triton


@triton.jit
def nothing(x):
    pass
