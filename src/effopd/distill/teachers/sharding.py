"""Frozen models with decoder layers sharded by FSDP2, for forward passes only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from effopd.errors import CompatibilityError, ConfigError
from effopd.models.logit_path import core_of


def check_sharding(trainer: Any) -> None:
    """Check that the run shards its student with FSDP2.

    Raises:
        ConfigError: it does not.
    """
    if not (trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2):
        raise ConfigError(
            "teacher_shard=True shards the teacher like the student, which this run does not shard. Launch it with "
            "FSDP2 (recipes/accelerate-fsdp2.yaml), or leave out --teacher_shard."
        )


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of modules with the most parameters: the decoder layers.

    Raises:
        CompatibilityError: the model has no list of modules.
    """
    lists = [each for each in core_of(model).base_model.modules() if isinstance(each, nn.ModuleList)]
    if not lists:
        raise CompatibilityError(
            f"{type(core_of(model)).__name__} has no list of decoder layers to shard. Leave out --teacher_shard."
        )
    return max(lists, key=lambda each: sum(p.numel() for p in each.parameters()))


def shard_layers(model: Any, device: torch.device) -> Any:
    """Shard each decoder layer over all ranks; the rest of the model is whole on `device`.

    A layer is gathered for its forward pass and freed after it, so a rank holds its shards and one
    whole layer. Every rank must make the same forward passes.
    """
    for layer in decoder_layers(model):
        fully_shard(layer, reshard_after_forward=True)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, torch.distributed.tensor.DTensor):
                getattr(module, name).data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model
