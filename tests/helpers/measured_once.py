"""Measurements of a model before training (`effopd.models.checks`), once per process and model.

The trainers of the tests have the same few tiny models, and a measurement depends on nothing but
the model: equal weights, configs and classes have equal results. They take a fifth of a short
training. A model with hooks, with a method of its own, or of another class is always measured; a
measurement that raises is never kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest

#: Weights of the largest model whose measurements are kept.
_WEIGHTS = 2_000_000
_KEPT: dict[Hashable, Any] = {}


def _identity(core: Any) -> Hashable | None:
    """All that a measurement of a model depends on; `None`: more than is compared here."""
    import torch
    from transformers import Qwen3ForCausalLM

    if type(core) is not Qwen3ForCausalLM or core.num_parameters() > _WEIGHTS or torch.is_autocast_enabled("cpu"):
        return None
    digest = hashlib.sha256()
    for name, module in core.named_modules():
        own = vars(module).values()
        foreign = not type(module).__module__.startswith(("torch.nn.", "transformers."))
        if foreign or module._forward_hooks or module._forward_pre_hooks or any(map(callable, own)):
            return None
        settings = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        digest.update(f"{name} {sorted(settings.items())}".encode())
    for name, tensor in [*core.named_parameters(), *core.named_buffers()]:
        if type(tensor) not in (torch.nn.Parameter, torch.Tensor) or tensor.device.type != "cpu":
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    methods = [type(module).forward for module in core.modules()] + [type(core).generate, type(core)._sample]
    configs = [vars(config) | {"_name_or_path": ""} for config in (core.config, core.generation_config)]
    return digest.hexdigest(), str(configs), tuple(methods)


def _once(measure: Callable[[Any], Any]) -> Callable[[Any], Any]:
    from effopd.models.logit_path import core_of

    @wraps(measure)
    def measured(model: Any) -> Any:
        identity = _identity(core_of(model))
        if identity is None:
            return measure(model)
        key = (measure.__module__, measure.__name__, identity)
        if key not in _KEPT:
            _KEPT[key] = measure(model)
        return _KEPT[key]

    return measured


@contextmanager
def measured_once() -> Iterator[None]:
    from effopd.models import checks, logit_path, sampler_check

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((logit_path, "_measured"), (sampler_check, "_measured"), (checks, "check_sampler")):
            patch.setattr(module, name, _once(getattr(module, name)))
        yield
