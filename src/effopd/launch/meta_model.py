"""Models built on the meta device from their configuration, without weights or memory.

The class is the one that TRL loads: the first of the configuration's `architectures`. A class that
transformers does not have is loaded as a causal language model from the model's own code.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from effopd.distill.trl_host.models import build_model
from effopd.distill.values import check_init_kwargs
from effopd.errors import CompatibilityError, ConfigError, MissingDependencyError
from effopd.models.files import reading
from effopd.tasks.builtin_models import with_spoken_names

logger = logging.getLogger(__name__)

#: Configuration fields for the number of positions.
_LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "max_seq_length",
    "seq_length",
    "n_ctx",
)
#: Parameter names of absolute position embeddings.
_TABLE = re.compile(r"(?:^|[._])(?:wpe|embed_positions|pos_encoding|positions?_embed\w*|pos_emb\w*)(?:[._]|$)")
_NOT_OF_TEXT = re.compile(r"vision|visual|image|audio|patch|encoder\.embeddings")
#: Maximum number of rows of a position table beyond the configured positions (OPT has 2).
_OFFSET = 8


def read_config(flag: str, name: str, init: Mapping[str, Any] | None = None, **load: Any) -> Any:
    """The configuration of a model, updated with the settings among its loading arguments `init`.

    Raises:
        CompatibilityError: the configuration cannot be read.
        ConfigError: a loading argument is neither one of `from_pretrained` nor a setting of the
            configuration.
    """
    with reading(flag, name):
        config = AutoConfig.from_pretrained(name, **load)
    if init:
        settings = [*vars(config), *type(config).attribute_map, *getattr(config, "sub_configs", ())]
        check_init_kwargs(f"{'teacher_' if 'teacher' in flag else ''}model_init_kwargs", init, settings)
        for key, value in init.items():
            if key in settings and key not in ("dtype", "torch_dtype", "attn_implementation", "quantization_config"):
                setattr(config, key, value)
    return config


def meta_model(flag: str, name: str, init: Mapping[str, Any] | None = None, **load: Any) -> PreTrainedModel:
    """The model of a folder or Hub id, on the meta device.

    Args:
        flag: the flag that messages name.
        init: loading arguments of the model.
        load: passed to `AutoConfig.from_pretrained`.

    Raises:
        CompatibilityError: the configuration cannot be read, or it is not one of a causal language
            model with an output head.
        ConfigError: a loading argument is unknown.
        MissingDependencyError: the model needs a package that is not installed.
    """
    return model_of(flag, name, read_config(flag, name, init, **load), (init or {}).get("attn_implementation"))


def model_of(flag: str, name: str, config: Any, attention: str | None = None, device: str = "meta") -> PreTrainedModel:
    """As `meta_model`, from a configuration. Other devices are only for `FakeTensorMode`."""
    kind = _class_of(flag, name, config)
    extra = {"attn_implementation": attention} if attention else {}
    try:
        with torch.device(device):
            if kind is None:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, **extra)
            else:
                model = build_model(kind, config, **extra)
    except ImportError as error:
        raise MissingDependencyError(f"{flag} {name!r}: {' '.join(str(error).split())}") from error
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise CompatibilityError(
            f"{flag} {name!r}: building the model from its configuration failed: {' '.join(str(error).split())}"
        ) from error
    if model.get_output_embeddings() is None:
        raise CompatibilityError(
            f"{flag} {name!r} is a {type(model).__name__}, which has no output head: expected a causal language model."
        )
    return model


def _class_of(flag: str, name: str, config: Any) -> Any:
    """The class that TRL loads. `None`: a causal language model from the model's own code."""
    architectures = getattr(config, "architectures", None)
    if not architectures:
        raise CompatibilityError(
            f"{flag} {name!r}: its config.json has no 'architectures', so the class to load is unknown. Expected for "
            'example "architectures": ["Qwen3ForCausalLM"].'
        )
    kind = getattr(transformers, architectures[0], None)
    if kind is None:
        if getattr(config, "auto_map", None):
            return None
        raise CompatibilityError(
            f"{flag} {name!r} is a {architectures[0]}, which transformers {transformers.__version__} does not support."
        )
    if getattr(config, "is_encoder_decoder", False) or not kind.can_generate():
        raise CompatibilityError(
            f"{flag} {name!r} is a {architectures[0]}: expected a decoder-only language model such as …ForCausalLM."
        )
    return kind


def positions(model: PreTrainedModel) -> tuple[int | None, bool]:
    """(number of positions of a model, whether it is a hard limit).

    The limit is hard if the model has a table of absolute positions. `None`: the number is unknown.
    """
    text = model.config.get_text_config()
    declared = next((int(value) for name in _LIMITS if isinstance(value := getattr(text, name, None), int)), None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if declared and isinstance(rope, Mapping) and rope.get("original_max_position_embeddings") and rope.get("factor"):
        declared = max(declared, math.ceil(rope["original_max_position_embeddings"] * rope["factor"]))
    tables = [
        tensor.shape
        for name, tensor in _tensors(model)
        if _TABLE.search(name) and not _NOT_OF_TEXT.search(name) and tensor.ndim >= 2
    ]
    rows = [max(shape[:-1]) for shape in tables]
    fitting = [size for size in rows if declared is None or 0 <= size - declared <= _OFFSET]
    if fitting:
        return (declared or min(fitting)), True
    return declared, False


def _tensors(model: PreTrainedModel) -> Iterable[tuple[str, Any]]:
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if "sinusoidal" not in type(model.get_submodule(name.rpartition(".")[0])).__name__.lower():  # these grow
            yield name, buffer


def check_positions_of(flag: str, name: str, prompt: int | None, answer: int, setting: str, **load: Any) -> None:
    """`check_positions` for a model folder or Hub id. LoRA adapter folders are not checked.

    Raises:
        ConfigError: as `check_positions`.
        CompatibilityError: the model cannot be read.
    """
    if prompt is not None and not (Path(name) / "adapter_config.json").is_file():
        check_positions(flag, name, meta_model(flag, name, **load), prompt, answer, setting)


def check_positions(flag: str, name: str, model: PreTrainedModel, prompt: int, answer: int, setting: str) -> None:
    """Check that the longest prompt and answer fit into the positions of a model.

    Too long a sequence is only a warning if the positions are computed (RoPE, …).

    Args:
        prompt: tokens of the longest prompt.
        answer: tokens of the longest answer.
        setting: the flag that limits the length of an answer.

    Raises:
        ConfigError: the sequence is too long and the model has a table of absolute positions.
    """
    limit, table = positions(model)
    if limit is None or prompt + answer <= limit:
        return
    text = (
        f"{flag} {name!r} has {limit} positions, but the longest prompt has {prompt} tokens "
        f"and an answer up to {answer}, together {prompt + answer}."
    )
    fix = f"Set {setting} to {limit - prompt} or less" if prompt < limit else "Shorten the prompts"
    if table:
        raise ConfigError(f"{text} It has no embeddings beyond these positions. {fix}, or use another model.")
    logger.warning(
        "%s It was not trained beyond these positions. %s, unless this is intended.", with_spoken_names(text), fix
    )
