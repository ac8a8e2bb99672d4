"""Frozen weights in host memory, copied to the accelerator for each forward pass.

Only the backbone's parameters move. The output layer, which the loss reads after the forward pass,
stays on the accelerator, as do parameters that it shares with the backbone. The host copy is never
written, so the values in use equal it bit for bit and nothing is copied back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from effopd.common.distributed import rank
from effopd.errors import CompatibilityError
from effopd.models.logit_path import core_of

logger = logging.getLogger(__name__)

_OFFLOADED: WeakKeyDictionary[nn.Module, Offloaded] = WeakKeyDictionary()


class Offloaded:
    """Moves the backbone of a frozen causal LM to a device for its forward passes.

    Hooks on the backbone move the weights, so every forward pass finds them in place. `hold` keeps
    them in place for several passes, such as the tokens of an answer.

    Args:
        model: a frozen causal LM.
        to_device: copies a tensor to the device.
        to_host: copies a tensor to host memory; called once per parameter.

    Raises:
        CompatibilityError: the model has no backbone apart from its output layer.

    Attributes:
        moved_bytes: bytes copied to the device so far.
    """

    def __init__(self, model: Any, to_device: Callable[[Tensor], Tensor], to_host: Callable[[Tensor], Tensor]):
        core = core_of(model)
        backbone: nn.Module = core.base_model
        if backbone is core:
            raise CompatibilityError(
                f"{type(core).__name__} has no separate backbone, whose weights could be offloaded. Leave out "
                "--teacher_offload."
            )
        stays = {id(p) for p in core.get_output_embeddings().parameters()}
        self._parameters = [p for p in backbone.parameters() if id(p) not in stays]
        self._to_device = to_device
        self._host = [to_host(p.data) for p in self._parameters]
        self._users = 0
        self.moved_bytes = 0
        self._leave()
        backbone.register_forward_pre_hook(lambda *_: self._enter_once())
        backbone.register_forward_hook(lambda *_: self._exit_once(), always_call=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in host memory."""
        return sum(each.nbytes for each in self._host)

    @property
    def on_device(self) -> bool:
        """Whether the weights are on the device now."""
        return self._users > 0

    def _enter_once(self) -> None:
        self._users += 1
        if self._users == 1:
            for parameter, host in zip(self._parameters, self._host, strict=True):
                parameter.data = self._to_device(host)
            self.moved_bytes += self.nbytes

    def _exit_once(self) -> None:
        self._users -= 1
        if self._users == 0:
            self._leave()

    def _leave(self) -> None:
        for parameter, host in zip(self._parameters, self._host, strict=True):
            parameter.data = host

    @contextmanager
    def hold(self) -> Iterator[None]:
        """In this block, the weights stay on the device."""
        self._enter_once()
        try:
            yield
        finally:
            self._exit_once()


def offload(model: Any, accelerator: Any) -> Any:
    """Offload a placed, frozen model to pinned host memory; on the CPU, only log a warning."""
    device = accelerator.device
    if device.type == "cpu":
        if rank() == 0:
            logger.warning(
                "teacher_offload=True has no effect: this run is on the CPU, where the weights already are."
            )
        return model
    core = core_of(accelerator.unwrap_model(model))
    _OFFLOADED[core] = Offloaded(core, partial(_copy, device=device), partial(_pinned, pin=device.type == "cuda"))
    return model


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


def _pinned(tensor: Tensor, pin: bool) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=pin).copy_(tensor)


@contextmanager
def in_use(model: Any) -> Iterator[None]:
    """In this block, an offloaded model stays on the device; other models and `None` do nothing."""
    offloaded = None if model is None else _OFFLOADED.get(core_of(model))
    if offloaded is None:
        yield
    else:
        with offloaded.hold():
            yield
