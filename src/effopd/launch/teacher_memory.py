"""Bytes of a local teacher's weights by dtype, quantization and offload.

A teacher has P parameters: L in linear layers that are quantized, H in its output layer and D in
its decoder layers. A quantized weight takes q bytes, scales included: 1.06 in 8 bits and 0.56 in
4 bits.

    dtype of d bytes             d P
    8 or 4 bits                  q L + d (P − L)
    offloaded, between uses      d H; while in use d P
    sharded over N ranks         d (P − D + D / N)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from effopd.distill.teachers.sharding import decoder_layers
from effopd.launch.model_size import ModelSize
from effopd.launch.model_states import BF16, FP32

#: Bytes per quantized weight, including its scales.
QUANTIZED = {"8bit": 1.06, "4bit": 0.56}
DTYPE_BYTES = {"float32": FP32, "auto": BF16, "bfloat16": BF16, "float16": BF16}


@dataclass(frozen=True)
class TeacherSize:
    """Numbers of parameters of a teacher.

    Attributes:
        parameters: all of them.
        linear: those that bitsandbytes quantizes.
        head: those of the output layer; `None`: not known.
        layers: those of the decoder layers; `None`: not known.
    """

    parameters: int
    linear: int
    head: int | None = None
    layers: int | None = None

    @classmethod
    def of(cls, size: ModelSize) -> TeacherSize:
        """From a model's configuration; without one, all parameters are counted as linear."""
        model = size.model
        if model is None:
            return cls(size.parameters, size.parameters)
        head = model.get_output_embeddings()
        shared = {id(p) for p in head.parameters()}
        linear = sum(
            m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) not in shared
        )
        layers = sum(p.numel() for p in decoder_layers(model).parameters())
        return cls(size.parameters, linear, sum(p.numel() for p in head.parameters()), layers)

    def weights(self, dtype: str, quantization: str | None = None) -> int:
        """Bytes of all weights."""
        each = DTYPE_BYTES[dtype]
        if quantization is None:
            return each * self.parameters
        return math.ceil(QUANTIZED[quantization] * self.linear + each * (self.parameters - self.linear))

    def at_rest(self, dtype: str) -> int | None:
        """Bytes on the accelerator between the uses of an offloaded teacher; `None`: not known."""
        return None if self.head is None else DTYPE_BYTES[dtype] * self.head

    def sharded(self, dtype: str, ranks: int) -> int | None:
        """Bytes on each of `ranks` ranks that share the decoder layers; `None`: not known."""
        if self.layers is None:
            return None
        return DTYPE_BYTES[dtype] * (self.parameters - self.layers + math.ceil(self.layers / ranks))

    def choices(self, dtype: str) -> dict[str, int | None]:
        """Bytes by choice of `--teacher_…`, `None` if not known; the last two are for `dtype`."""
        return {
            "float32": self.weights("float32"),
            "bfloat16": self.weights("bfloat16"),
            "8 bits": self.weights(dtype, "8bit"),
            "4 bits": self.weights(dtype, "4bit"),
            f"{dtype} offloaded (between uses)": self.at_rest(dtype),
            f"{dtype} sharded over 8": self.sharded(dtype, 8),
        }


def quantization_of(args: Any, init: Mapping[str, Any]) -> str | None:
    """'8bit', '4bit' or `None`, from the flags or from `teacher_model_init_kwargs`."""
    config = init.get("quantization_config")
    if isinstance(config, Mapping):
        return "8bit" if config.get("load_in_8bit") else "4bit" if config.get("load_in_4bit") else None
    return getattr(args, "quantization", None)


def dtype_of(init: Mapping[str, Any]) -> str:
    """Name of the dtype among loading arguments."""
    return str(init.get("dtype", "float32")).removeprefix("torch.")
