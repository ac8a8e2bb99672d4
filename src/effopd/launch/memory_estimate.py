"""Estimated memory of a run per rank, from its settings: bytes by purpose, and their peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import is_triton_available

from effopd.launch.adapters import adapter_config, trained_parameters
from effopd.launch.meta_model import model_of
from effopd.launch.model_size import ModelSize, model_size
from effopd.launch.model_states import BF16, FP32, model_state_bytes
from effopd.launch.opd import RunSettings
from effopd.launch.prompts import evaluates
from effopd.launch.run_models import loading_arguments
from effopd.launch.step_memory import PROCESS, StepMemory, StepShape, step_memory

#: (heading, ranks, sharded) of the estimated setups.
SETUPS = (("1 GPU, or DDP", 1, False), ("8 × FSDP2", 8, True), ("32 × FSDP2", 32, True))
#: Prompt length, in tokens, if none was measured and no limit is set.
_ASSUMED_PROMPT = 512
_DTYPE_BYTES = {"float32": FP32, "auto": BF16, "bfloat16": BF16, "float16": BF16}
#: Allocated / requested memory. Real runs took up to 9 % more than requested
#: (benchmarks/memory_estimate.py).
_ALLOCATOR = 1.12
#: Bytes per quantized weight, including its scales.
_QUANTISED = {"load_in_4bit": 0.56, "load_in_8bit": 1.06}


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes on one rank, with one entry per setup of `SETUPS`.

    Attributes:
        columns: bytes by purpose. They are not all allocated at the same time.
        peaks: peak memory; the sum of the column if `complete` is false.
        prompts: the assumed prompt length and its source, in words.
        complete: whether the student's configuration was available. Without it the memory of
            activations, loss, sampling and evaluation is unknown.
    """

    columns: list[dict[str, int]]
    peaks: list[int]
    prompts: str
    complete: bool


def estimate_memory(settings: RunSettings, longest: int | None) -> MemoryEstimate | None:
    """Memory of a run; `None` if the size of a model is unknown.

    Args:
        longest: tokens of the longest prompt. `None`: not measured.
    """
    opd, effopd = settings.opd, settings.effopd
    prompt, prompt_source = _prompt_length(settings, longest)
    student = _size(str(settings.model.model_name_or_path), opd)
    frozen_sizes = [
        _size(name, opd)
        for name in (opd.teacher_model_name_or_path, opd.reference_model_name_or_path)
        if name and opd.holds_teacher
    ]
    others = [size for size in frozen_sizes if size is not None]
    if student is None or len(others) < len(frozen_sizes):
        return None
    student_bytes, frozen_bytes = (_weight_bytes(init) for init in loading_arguments(settings.model, opd))
    adapter, trained = _adapter(settings, student)
    columns = [
        model_state_bytes(
            student,
            sum(size.parameters for size in others) * frozen_bytes,
            ranks=ranks,
            sharded=sharded,
            moved=student.selected(str(effopd.parameters)) if effopd.enabled else None,
            anchor_here=effopd.anchor_device is None,
            trained=trained,
            weight_bytes=next(
                (size for name, size in _QUANTISED.items() if getattr(settings.model, name)), student_bytes
            ),
            optim=str(getattr(opd.optim, "value", opd.optim)),
        )
        | {"process": PROCESS}
        for _, ranks, sharded in SETUPS
    ]
    if student.config is None:
        return MemoryEstimate(columns, [sum(column.values()) for column in columns], prompt_source, False)
    step = step_memory(
        student.config,
        others[0].config if others else None,
        step_shape(settings, prompt),
        attention=settings.model.attn_implementation,
        adapter=adapter,
    )
    peaks = [_peak(column, step, accumulates=opd.gradient_accumulation_steps > 1) for column in columns]
    parts = {name: getattr(step, name) for name in ("sampling", "activations", "loss", "evaluation")}
    shown = {name: value for name, value in parts.items() if value}
    return MemoryEstimate([column | shown for column in columns], peaks, prompt_source, True)


def _peak(column: Mapping[str, int], step: StepMemory, *, accumulates: bool) -> int:
    """Peak bytes: permanent memory plus the larger of a step and a search, × `_ALLOCATOR`."""
    gradients, candidate = column["gradients"], column.get("candidate", 0)
    held = sum(column.values()) - gradients - candidate
    search = candidate + max(step.loss, step.sampling) if candidate else 0
    return round(_ALLOCATOR * (held + max(step.peak(gradients, accumulates), search)))


def _prompt_length(settings: RunSettings, longest: int | None) -> tuple[int, str]:
    """Tokens of the longest prompt, and the source of this number."""
    limit = settings.task.max_prompt_length
    if longest is not None:
        return longest, f"longest prompt: {longest} tokens"
    if limit:
        return limit, f"prompts of up to {limit} tokens, --max_prompt_length"
    return _ASSUMED_PROMPT, f"prompts not measured: {_ASSUMED_PROMPT} tokens assumed"


def step_shape(settings: RunSettings, prompt: int) -> StepShape:
    """Shapes of a rank's training and evaluation batches.

    Args:
        prompt: tokens of the longest prompt.
    """
    opd = settings.opd
    return StepShape(
        rows=opd.per_device_train_batch_size,
        prompt=prompt,
        answer=opd.max_completion_length or 0,
        eval_rows=opd.per_device_eval_batch_size if evaluates(opd) else 0,
        health_tokens=opd.health_tokens,
        checkpointing=bool(opd.activation_checkpointing),
        bf16=bool(opd.bf16 or opd.fp16),
        triton=is_triton_available() and torch.cuda.is_available() and not opd.use_cpu,
    )


def _size(name: str, opd: Any) -> ModelSize | None:
    return model_size(name, trust_remote_code=opd.trust_remote_code)


def _weight_bytes(init: Mapping[str, Any]) -> int:
    return _DTYPE_BYTES.get(str(init.get("dtype", "float32")).removeprefix("torch."), FP32)


def _adapter(settings: RunSettings, student: ModelSize) -> tuple[Any, int | None]:
    """(PEFT configuration, number of parameters it trains); (None, None) without adapters.

    1 % of the parameters is assumed if the student's configuration is not available.
    """
    config = adapter_config(settings.model)
    if config is None:
        return None, None
    if student.config is None:
        return config, student.parameters // 100
    return config, trained_parameters(config, model_of("model", "", student.config))
