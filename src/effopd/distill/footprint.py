"""How much memory a run takes, from the sizes of its models alone: nothing is loaded or downloaded.

Every number is bytes on one rank. fp32 masters as TRL loads them; N ranks; P parameters of the student, M of them moved by
the look-ahead, T of the teacher:

    weights 4P, gradients 4P, Adam 8P, anchor 4M, candidate 4M (during a search): each / N under FSDP2, whole under DDP
    teacher (and reference): its dtype × T, whole on every rank, as TRL and accelerate place it
    gathered: under FSDP2 two layers at a time in the compute dtype, 2 · 2 · P / layers
    cache: key and value of every position while a micro-batch of rollouts is sampled
    activations: with checkpointing one hidden state a layer, and one layer's working set of about 16 hidden states

Logits are never whole: the loss goes through them in chunks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from effopd.extrapolate.parameter_rules import select

FP32, BF16 = 4, 2
_IN_A_NAME = re.compile(r"(?<![a-z\d.])(\d+(?:\.\d+)?)([bm])(?![a-z\d])", re.IGNORECASE)


@dataclass(frozen=True)
class ModelSize:
    """What the estimate needs to know of a model.

    Attributes:
        parameters: how many.
        source: where that is from: 'configuration' or 'name'.
        layers, hidden, kv_width: of the configuration (kv_width = key-value heads × head size); 0 if it is not at hand.
        names: size of every parameter by name, if the configuration is at hand.
    """

    parameters: int
    source: str
    layers: int = 0
    hidden: int = 0
    kv_width: int = 0
    names: Mapping[str, int] = field(default_factory=dict, repr=False)

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
    except (OSError, ValueError):
        found = _IN_A_NAME.findall(name.rstrip("/").rsplit("/", 1)[-1])
        if not found:
            return None
        number, unit = found[0]
        return ModelSize(round(float(number) * {"b": 1e9, "m": 1e6}[unit.lower()]), "name")
    return size_of(config)


def size_of(config: Any) -> ModelSize:
    """Size of the model that a configuration describes, built without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSize(
        model.num_parameters(),
        "configuration",
        text.num_hidden_layers,
        text.hidden_size,
        heads * head_size,
        {name: parameter.numel() for name, parameter in model.named_parameters()},
    )


def bytes_a_rank(
    student: ModelSize,
    frozen: int,
    *,
    ranks: int = 1,
    sharded: bool = False,
    moved: int | None = None,
    rows: int = 1,
    length: int = 0,
    checkpointing: bool = True,
    anchor_here: bool = True,
) -> dict[str, int]:
    """Estimated bytes on one rank, by what they are for.

    Args:
        frozen: bytes of the teacher and, if there is one, the reference.
        ranks: data-parallel processes.
        sharded: FSDP2 rather than DDP.
        moved: parameters that the look-ahead moves; `None`: no look-ahead.
        rows: sequences of a micro-batch.
        length: longest prompt plus longest answer, in tokens.
        checkpointing: whether activations are checkpointed.
        anchor_here: whether the anchor is beside the parameters rather than on another device.
    """
    share, p = (ranks if sharded else 1), student.parameters
    found = {
        "weights": math.ceil(FP32 * p / share),
        "gradients": math.ceil(FP32 * p / share),
        "optimizer": math.ceil(2 * FP32 * p / share),
        "teacher": frozen,
    }
    if moved is not None:
        found |= {
            "anchor": math.ceil(FP32 * moved / share) * anchor_here,
            "candidate": math.ceil(FP32 * moved / share),
        }
    if sharded and student.layers:
        found["gathered"] = math.ceil(2 * BF16 * p / student.layers)
    if student.layers:
        found["cache"] = 2 * BF16 * student.layers * student.kv_width * rows * length
        kept = student.layers if checkpointing else 16 * student.layers
        found["activations"] = BF16 * student.hidden * rows * length * (kept + 16)
    return found
