"""The Triton kernels of a decode step, or why there are none. Importing this never fails."""

import torch

try:
    from svd_engine.kernels import launch, launch_linear, launch_step

    _missing: str | None = None
except ImportError as error:  # Triton comes with PyTorch's CUDA builds only
    _missing = f"Triton cannot be imported: {error}"

__all__ = ["launch_linear", "launch_step", "unavailable"]


def unavailable(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device, or None."""
    if _missing is not None:
        return _missing
    if (reason := launch.unavailable()) is not None:
        return reason
    return None if launch.takes(device.type) else f"the weights are on {device.type}"
