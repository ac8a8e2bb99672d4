"""Loading, placing and entering models in the same way as the hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from transformers import LogitsProcessor, PreTrainedModel
from trl.models import prepare_deepspeed
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import create_model_from_path

T = TypeVar("T")


def load_causal_lm(name: str, **load: Any) -> PreTrainedModel:
    """Load a model as TRL loads the student."""
    return create_model_from_path(name, **load)


def build_model(kind: type[PreTrainedModel], config: Any, **load: Any) -> PreTrainedModel:
    """A model of class `kind` built from its config, without loading weights."""
    return kind._from_config(config, **load)


def place_frozen(trainer: Any, model: PreTrainedModel) -> Any:
    """Place and wrap a frozen model as TRL does its teacher."""
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)


def inside_forward(wrapper: Any, model: Any, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run `work` inside the forward of `wrapper`, where the weights of `model` are gathered."""
    return _ForwardRedirection()(wrapper, model, work, *args, **kwargs)


@contextmanager
def last_logits_processor(model: Any, processor: LogitsProcessor) -> Iterator[None]:
    """In this block, `generate` on `model` applies `processor` after all other processors."""
    processors = model._get_logits_processor

    def with_processor(*args: Any, **kwargs: Any) -> Any:
        chain = processors(*args, **kwargs)
        chain.append(processor)
        return chain

    model._get_logits_processor = with_processor
    try:
        yield
    finally:
        del model._get_logits_processor
