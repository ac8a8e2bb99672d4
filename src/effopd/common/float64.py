"""float64 where the device has it, else on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

#: Types of devices on which no float64 tensor can be made: Apple's GPUs.
_WITHOUT_FLOAT64 = ("mps",)


def has_float64(device: torch.device | str) -> bool:
    """Whether a device can hold float64 tensors."""
    return torch.device(device).type not in _WITHOUT_FLOAT64


def for_float64(tensor: Tensor) -> Tensor:
    """The tensor, for whoever is about to compute in float64: itself, or a copy on the CPU if its
    device has no float64.
    """
    return tensor if has_float64(tensor.device) else tensor.cpu()
