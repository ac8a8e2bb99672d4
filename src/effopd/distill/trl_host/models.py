"""Loading, placing and entering models in the same way as the hosts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel
from transformers.integrations import deepspeed
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import create_model_from_path

from effopd.common.zero import is_zero3
from effopd.errors import ConfigError

T = TypeVar("T")


def load_causal_lm(name: str, **load: Any) -> PreTrainedModel:
    """Load a model as TRL loads the student."""
    return create_model_from_path(name, **load)


def build_model(kind: type[PreTrainedModel], config: Any, **load: Any) -> PreTrainedModel:
    """A model of class `kind` built from its config, without loading weights."""
    return kind._from_config(config, **load)


def frozen(
    trainer: Any,
    model: str | PreTrainedModel,
    load: Mapping[str, Any],
    shard: Callable[[Any, torch.device], Any] | None = None,
) -> Any:
    """Load a model if it is a path, freeze it, and place and wrap it as TRL does its teacher.

    Differs from TRL: under DeepSpeed the model is whole on every rank, in the precision of the
    config. TRL shards it under ZeRO-3, where its output layer is gathered only inside a forward.

    Args:
        load: loading arguments of a path; a dtype can be a name.
        shard: shards the frozen model, and moves the rest of it to the device.
    """
    if isinstance(model, str):
        arguments = {"trust_remote_code": trainer.args.trust_remote_code} | dict(load)
        if arguments.get("dtype") not in ("auto", None):
            arguments["dtype"] = getattr(torch, arguments["dtype"])
        if trainer.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            arguments["device_map"] = None
        with loaded_whole():
            model = load_causal_lm(model, **arguments)
    model.requires_grad_(False)
    if shard is not None:
        model = shard(model, trainer.accelerator.device)
    if trainer.is_deepspeed_enabled:
        if any(map(is_zero3, model.parameters())):
            raise ConfigError(
                f"{type(model).__name__} was loaded under ZeRO-3, which shards it: expected a whole model. Pass its "
                "path, or load it before the training arguments are built."
            )
        model = model.to(trainer.accelerator.state.deepspeed_plugin.hf_ds_config.dtype())
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)


def release(trainer: Any, model: Any) -> None:
    """Drop accelerate's references to a model that `frozen` placed, so that it can be freed."""
    placed, bare = trainer.accelerator._models, trainer.accelerator.unwrap_model(model)
    placed[:] = [each for each in placed if each is not model and each is not bare]


@contextmanager
def loaded_whole() -> Iterator[None]:
    """In this block, transformers loads whole models, also under ZeRO-3.

    DeepSpeed then shards the trained model when it builds its engine. A model that is sharded while
    it is loaded cannot be checked.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if deepspeed._hf_deepspeed_config_weak_ref is None:  # otherwise a trainer built in this block set it
            deepspeed._hf_deepspeed_config_weak_ref = reference


def inside_forward(wrapper: Any, model: Any, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run `work` inside the forward of `wrapper`, where the weights of `model` are gathered."""
    return _ForwardRedirection()(wrapper, model, work, *args, **kwargs)


@contextmanager
def last_logits_processor(model: Any, processor: LogitsProcessor) -> Iterator[None]:
    """In this block, `generate` on `model` applies `processor` after all other processors.

    Blocks can be nested; the processor of the innermost one is the last.
    """
    processors, outer = model._get_logits_processor, vars(model).get("_get_logits_processor")

    def with_processor(*args: Any, **kwargs: Any) -> Any:
        chain = processors(*args, **kwargs)
        chain.append(processor)
        return chain

    model._get_logits_processor = with_processor
    try:
        yield
    finally:
        if outer is None:
            del model._get_logits_processor
        else:
            model._get_logits_processor = outer


class Decoder:
    """Next-token logits of growing rows, with a cache of its own, computed as in `generate`.

    Args:
        model: causal LM without wrappers.
        mask_BP: 1 at the tokens of the left-padded prompts, 0 at padding.
    """

    def __init__(self, model: Any, mask_BP: Tensor):
        accepted = inspect.signature(model.forward).parameters
        self._model, self._started = model, False
        self._state: dict[str, Any] = {"attention_mask": mask_BP, "use_cache": True}
        if "position_ids" in accepted:
            self._state["position_ids"] = (mask_BP.long().cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in accepted:
            self._state["logits_to_keep"] = 1

    @torch.no_grad()
    def next_logits(self, ids_BL: Tensor) -> Tensor:
        """Logits [B, V] of the next token.

        Args:
            ids_BL: the prompts at the first call, and one more column at each call after it.
        """
        inputs = self._model.prepare_inputs_for_generation(
            ids_BL,
            next_sequence_length=1 if self._started else None,
            is_first_iteration=not self._started,
            **self._state,
        )
        outputs = self._model(**inputs, return_dict=True)
        self._state = self._model._update_model_kwargs_for_generation(outputs, self._state)
        self._started = True
        return outputs.logits[:, -1]
