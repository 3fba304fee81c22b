"""Memory that a prompt's activations come back to, instead of fresh pages from the system."""

import functools

import torch

LARGEST = (32 << 20) - (64 << 10)  # bytes, of a block that glibc keeps once it was freed


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MB, and 64 MB of them, for the next allocation.

    At first it returns each of 128 KB or more to the system, which hands the next one out page by
    page. The size that it keeps grows to that of the largest block freed (`man mallopt`).
    """
    torch.empty(LARGEST, dtype=torch.uint8)
