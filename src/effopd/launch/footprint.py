"""How much memory a run takes, from the sizes of its models alone: nothing is loaded or downloaded.

Every number is bytes on one rank. fp32 masters as TRL loads them; N ranks; P parameters of the student, R of them trained,
M of them moved by the look-ahead, T of the teacher:

    weights 4P, gradients 4R, optimizer 8R (AdamW), anchor 4M, candidate 4M (during a search): each / N under FSDP2, whole
    under DDP
    teacher (and reference): its dtype × T, whole on every rank, as TRL and accelerate place it
    gathered: under FSDP2 two layers at a time in the compute dtype, 2 · 2 · P / layers

What a step works with beside these is in `working_memory`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from effopd.errors import EffOPDError
from effopd.extrapolate.parameter_rules import select
from effopd.launch.meta_model import model_of
from effopd.launch.working_memory import BF16, FP32

_IN_A_NAME = re.compile(r"(?<![a-z\d.])(\d+(?:\.\d+)?)([bm])(?![a-z\d])", re.IGNORECASE)


@dataclass(frozen=True)
class ModelSize:
    """What the estimate needs to know of a model.

    Attributes:
        parameters: how many.
        source: where that is from: 'configuration' or 'name'.
        layers: of the configuration; 0 if it is not at hand.
        names: size of every parameter by name, if the configuration is at hand.
        config: the configuration, if it is at hand.
    """

    parameters: int
    source: str
    layers: int = 0
    names: Mapping[str, int] = field(default_factory=dict, repr=False)
    config: Any = field(default=None, repr=False, compare=False)

    def selected(self, rule: str) -> int:
        """How many parameters the look-ahead's `parameters` rule moves; all, if their names are not known.

        Raises:
            ConfigError: it moves none, or none of one kind of block.
        """
        if not self.names:
            return self.parameters
        return sum(self.names[name] for name in select(self.names, rule, "the student"))


def model_size(name: str, **load: Any) -> ModelSize | None:
    """Size of a model folder or of a Hub id in the local cache, else what its name says (…-1.7B-…), else `None`.

    Never goes to the network.
    """
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True, **load)
    except (OSError, ValueError, KeyError, ImportError, EffOPDError):
        found = _IN_A_NAME.findall(name.rstrip("/").rsplit("/", 1)[-1])
        if not found:
            return None
        number, unit = found[0]
        return ModelSize(round(float(number) * {"b": 1e9, "m": 1e6}[unit.lower()]), "name")
    return size_of(config)


def size_of(config: Any) -> ModelSize:
    """Size of the model that a configuration describes, built without memory."""
    config.architectures = config.architectures or [_causal_class(config)]
    return size_of_model(model_of("model", config.model_type, config))


def _causal_class(config: Any) -> str:
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type))


def size_of_model(model: PreTrainedModel) -> ModelSize:
    """Size of a model that is built, on the meta device for instance."""
    names = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers = model.config.get_text_config().num_hidden_layers
    return ModelSize(model.num_parameters(), "configuration", layers, names, model.config)


#: Bytes of optimizer state per trained parameter, by the start of `--optim`; the longest start that fits counts.
_STATES = {
    "adamw": 8.0, "paged_adamw": 8.0, "ademamix": 12.0, "paged_ademamix": 12.0, "adafactor": 0.1, "sgd": 0.0, "adagrad": 4.0,
    "rmsprop": 4.0, "lion": 4.0, "paged_lion": 4.0, "lomo": 0.0, "adalomo": 0.1, "adamw_torch_8bit": 2.0, "adamw_torch_4bit": 1.0,
    "adamw_bnb_8bit": 2.0, "adamw_8bit": 2.0, "ademamix_8bit": 3.0, "paged_ademamix_8bit": 3.0, "paged_adamw_8bit": 2.0,
    "lion_8bit": 1.0, "paged_lion_8bit": 1.0, "rmsprop_bnb_8bit": 1.0, "galore": 2.0, "apollo": 2.0, "schedule_free_sgd": 4.0,
}  # fmt: skip


def state_bytes(optim: str) -> float:
    """Bytes of optimizer state per trained parameter; AdamW's where the optimizer is not known."""
    starts = [start for start in _STATES if optim.startswith(start)]
    return _STATES[max(starts, key=len)] if starts else 8.0


def bytes_a_rank(
    student: ModelSize,
    frozen: int,
    *,
    ranks: int = 1,
    sharded: bool = False,
    moved: int | None = None,
    anchor_here: bool = True,
    trained: int | None = None,
    weight_bytes: float = FP32,
    optim: str = "adamw",
) -> dict[str, int]:
    """Estimated bytes on one rank, by what they are for.

    Args:
        frozen: bytes of the teacher and, if there is one, the reference.
        ranks: data-parallel processes.
        sharded: FSDP2 rather than DDP.
        moved: parameters that the look-ahead moves; `None`: no look-ahead.
        anchor_here: whether the anchor is beside the parameters rather than on another device.
        trained: parameters of the adapters; `None`: all of the student's are trained.
        weight_bytes: of a parameter of the student; adapters are fp32.
        optim: the optimizer's name.
    """
    share, p = (ranks if sharded else 1), student.parameters
    updated = p if trained is None else trained
    found = {
        "weights": math.ceil((weight_bytes * p + FP32 * (trained or 0)) / share),
        "gradients": math.ceil(FP32 * updated / share),
        "optimizer": math.ceil(state_bytes(optim) * updated / share),
        "teacher": frozen,
    }
    if moved is not None:
        found |= {
            "anchor": math.ceil(FP32 * moved / share) * anchor_here,
            "candidate": math.ceil(FP32 * moved / share),
        }
    if sharded and student.layers:
        found["gathered"] = math.ceil(2 * BF16 * p / student.layers)
    return found
