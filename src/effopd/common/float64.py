"""float64 computation on the tensor's device, or on the CPU if the device has no float64."""

from __future__ import annotations

import torch
from torch import Tensor

#: Device types without float64: Apple GPUs.
_WITHOUT_FLOAT64 = ("mps",)


def has_float64(device: torch.device | str) -> bool:
    """Whether a device can hold float64 tensors."""
    return torch.device(device).type not in _WITHOUT_FLOAT64


def for_float64(tensor: Tensor) -> Tensor:
    """The tensor itself, or a CPU copy if its device has no float64. The dtype is unchanged."""
    return tensor if has_float64(tensor.device) else tensor.cpu()
