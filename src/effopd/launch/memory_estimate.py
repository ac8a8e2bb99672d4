"""Estimated memory of a run per rank, from its settings: bytes by purpose, and their peak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import is_triton_available
from trl import ModelConfig

from effopd.common.host_values import name_of
from effopd.launch.adapters import adapter_config, trained_parameters
from effopd.launch.meta_model import model_of
from effopd.launch.model_size import ModelSize
from effopd.launch.model_states import FP32, REPLICATED, Sharding, fsdp2, model_state_bytes, sampled_whole, zero
from effopd.launch.opd import RunSettings
from effopd.launch.prompts import evaluates
from effopd.launch.rl import RLRunSettings, teacher_of
from effopd.launch.run_models import STAGES, NamedModel, RunSizes, frozen_models, loading_arguments, run_sizes
from effopd.launch.step_memory import PROCESS, StepMemory, StepShape, step_memory
from effopd.launch.teacher_memory import DTYPE_BYTES, QUANTIZED, TeacherSize, dtype_of, quantization_of

#: Prompt length, in tokens, if none was measured and no limit is set.
_ASSUMED_PROMPT = 512
#: Allocated / requested memory. Real runs took up to 9 % more than requested
#: (benchmarks/memory_estimate.py).
_ALLOCATOR = 1.12


@dataclass(frozen=True)
class Setup:
    """Number of ranks, and how they share the student.

    Attributes:
        sharded: whether FSDP2 shards parameters, gradients and optimizer states.
        zero: stage of DeepSpeed ZeRO; 0: DeepSpeed is not used.
    """

    heading: str
    ranks: int = 1
    sharded: bool = False
    zero: int = 0

    def sharding(self, *, half: bool) -> Sharding:
        """Which model states the ranks share.

        Args:
            half: whether the run trains in bf16 or fp16.
        """
        if self.zero:
            return zero(self.zero, self.ranks, half=half)
        return fsdp2(self.ranks) if self.sharded else REPLICATED


#: The estimated setups.
SETUPS = (
    Setup("1 GPU, or DDP"),
    Setup("8 × FSDP2", 8, sharded=True),
    Setup("32 × FSDP2", 32, sharded=True),
    *(Setup(f"8 × ZeRO {stage}", 8, zero=stage) for stage in (1, 2, 3)),
)
#: Memory of ZeRO that depends on settings of DeepSpeed.
NOT_COUNTED = (
    "ZeRO, not counted: DeepSpeed's communication buckets and offload, and weights that stage 3 keeps gathered "
    "beyond two layers."
)


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


def sizes_of(settings: RunSettings, models: Sequence[NamedModel] = ()) -> RunSizes:
    """Sizes of the student, the teachers and the reference of a run.

    Args:
        models: those on the meta device, the student first; `model_size` measures the others.
    """
    return run_sizes(settings.model, frozen_models(settings.opd), settings.opd, models)


def estimate_memory(
    settings: RunSettings, longest: int | None, sizes: RunSizes | None = None
) -> MemoryEstimate | None:
    """Memory of a run; `None` if the size of a model is unknown.

    Args:
        longest: tokens of the longest prompt. `None`: not measured.
        sizes: sizes of the models. `None`: those of `sizes_of(settings)`.
    """
    opd, effopd = settings.opd, settings.effopd
    prompt, prompt_source = _prompt_length(settings, longest)
    sizes = sizes or sizes_of(settings)
    student, frozen_sizes = sizes.student, _held(sizes.frozen)
    others = [size for size in frozen_sizes if size is not None]
    if student is None or len(others) < len(frozen_sizes):
        return None
    frozen_init = loading_arguments(settings.model, opd)[1]
    measured = [TeacherSize.of(size) for size in others]
    if (opd.teacher_offload or opd.teacher_shard) and any(each.layers is None for each in measured):
        how = "offloaded" if opd.teacher_offload else "sharded"
        prompt_source += f"; the {how} teacher counts as whole: its configuration is not on disk"
    return _estimated(
        settings,
        opd,
        student,
        [_held_bytes(opd, measured, frozen_init, setup) for setup in SETUPS],
        others[0].config if others else None,
        step_shape(settings, prompt),
        prompt_source,
        adapter=_adapter(settings.model, student, sizes.trained),
        visiting=_frozen_bytes(opd, measured, frozen_init)[1],
        moved=student.selected(str(effopd.parameters)) if effopd.enabled else None,
        anchor_here=effopd.anchor_device is None,
    )


def estimate_rl_memory(
    settings: RLRunSettings, longest: int | None, sizes: RunSizes | None = None
) -> MemoryEstimate | None:
    """Memory of a reinforcement-learning run; `None` if the size of a model is unknown.

    All answers of a generation batch are sampled at once, so sampling has `steps_per_generation`
    times the rows of a forward pass. The loss is counted as that of `effopd train`, which has more
    tiles of logits, so the estimate is an upper bound. The frozen model, in row `frozen`, is the
    copy of the initial model for the KL penalty, or the teacher of dGRPO.

    Args:
        longest: tokens of the longest prompt. `None`: not measured.
        sizes: sizes of the models. `None`: those of `model_size`.
    """
    rl = settings.rl
    prompt, prompt_source = _prompt_length(settings, longest)
    sizes = sizes or run_sizes(settings.model, teacher_of(rl), rl)
    student, teacher = sizes.student, next(iter(sizes.frozen.values()), None)
    student_init, teacher_init = loading_arguments(settings.model, rl)
    frozen = teacher if sizes.frozen else student if rl.beta and not settings.model.use_peft else None
    if student is None or (sizes.frozen and frozen is None):
        return None
    dtype = dtype_of({"dtype": "auto"} | teacher_init if sizes.frozen else student_init)
    shape = StepShape(
        rows=rl.per_device_train_batch_size,
        prompt=prompt,
        answer=rl.max_completion_length or 0,
        eval_rows=rl.per_device_eval_batch_size if evaluates(rl) else 0,
        checkpointing=bool(rl.activation_checkpointing),
        bf16=bool(rl.bf16 or rl.fp16),
        triton=_triton(rl),
        sampled=rl.per_device_train_batch_size * rl.steps_per_generation,
    )
    held = 0 if frozen is None else DTYPE_BYTES[dtype] * frozen.parameters
    config = frozen.config if frozen is not None else None
    adapter = _adapter(settings.model, student, sizes.trained)
    estimate = _estimated(settings, rl, student, [held] * len(SETUPS), config, shape, prompt_source, adapter=adapter)
    for column in estimate.columns:
        bytes_held = column.pop("teacher")
        column |= {"frozen": bytes_held} if bytes_held else {}
    return estimate


def _estimated(
    settings: RunSettings | RLRunSettings,
    args: Any,
    student: ModelSize,
    frozen: Sequence[int],
    teacher: Any,
    shape: StepShape,
    prompts: str,
    *,
    adapter: tuple[Any, int | None],
    visiting: int = 0,
    moved: int | None = None,
    anchor_here: bool = True,
) -> MemoryEstimate:
    """Memory of a run.

    Args:
        frozen: bytes of the frozen models, one entry per setup of `SETUPS`.
        teacher: configuration of the frozen model that scores. `None`: none, or not available.
        prompts: the assumed prompt length and its source, in words.
        adapter: PEFT configuration and number of parameters it trains, as `_adapter` returns them.
        visiting: further bytes while an offloaded teacher is in use.
        moved: number of parameters moved by the look-ahead without adapters. `None`: no look-ahead.
        anchor_here: as for `model_state_bytes`.
    """
    student_bytes = DTYPE_BYTES.get(dtype_of(loading_arguments(settings.model, args)[0]), FP32)
    quantized = (size for name, size in QUANTIZED.items() if getattr(settings.model, f"load_in_{name}"))
    weight_bytes = next(quantized, student_bytes)
    peft_config, trained = adapter
    given: dict[str, Any] = {
        "moved": moved if trained is None or moved is None else trained,
        "anchor_here": anchor_here,
        "trained": trained,
        "weight_bytes": weight_bytes,
        "optim": name_of(args.optim),
    }
    half = bool(args.bf16 or args.fp16)
    columns = [
        model_state_bytes(student, held, setup.sharding(half=half), **given) | {"process": PROCESS}
        for setup, held in zip(SETUPS, frozen, strict=True)
    ]
    if student.config is None:
        return MemoryEstimate(columns, [sum(column.values()) for column in columns], prompts, False)
    attention = settings.model.attn_implementation
    step = step_memory(student.config, teacher, shape, attention=attention, adapter=peft_config)
    accumulates = args.gradient_accumulation_steps > 1
    whole = sampled_whole(student, args)
    steps = [step.sampled_with(whole) if setup.zero == 3 else step for setup in SETUPS]
    peaks = [
        _peak(column, each, accumulates=accumulates, visiting=visiting, mixed=shape.mixed)
        for column, each in zip(columns, steps, strict=True)
    ]
    shown = [_shown(each) | ({"teacher in use": visiting} if visiting else {}) for each in steps]
    return MemoryEstimate([a | b for a, b in zip(columns, shown, strict=True)], peaks, prompts, True)


def _shown(step: StepMemory) -> dict[str, int]:
    """Parts of a step that the table shows."""
    parts = {name: getattr(step, name) for name in ("sampling", "activations", "loss", "evaluation")}
    return {name: value for name, value in parts.items() if value}


def _held(sizes: Mapping[str, ModelSize | None]) -> list[ModelSize | None]:
    """Sizes of the frozen models held at the same time: of a curriculum's teachers, the largest."""
    if not any(flag.startswith(STAGES) for flag in sizes):
        return list(sizes.values())
    teachers = {flag: size for flag, size in sizes.items() if "teacher" in flag}
    known = [size for size in teachers.values() if size is not None]
    largest = max(known, key=lambda size: size.parameters) if len(known) == len(teachers) else None
    return [largest, *(size for flag, size in sizes.items() if flag not in teachers)]


def _frozen_bytes(opd: Any, sizes: Sequence[TeacherSize], init: Mapping[str, Any], ranks: int = 1) -> tuple[int, int]:
    """(bytes of the frozen models at all times, further bytes while an offloaded one is in use).

    Models whose configuration is not available count as whole and always in memory.

    Args:
        ranks: number of ranks that share the teacher's layers with `teacher_shard`.
    """
    dtype, quantization = dtype_of(init), quantization_of(opd, init)
    if opd.teacher_shard:
        return sum(_known(size.sharded(dtype, ranks), size.weights(dtype)) for size in sizes), 0
    if opd.teacher_sources and opd.teachers_in_memory == "one":
        sizes = [max(sizes, key=lambda size: size.parameters)]  # several teachers and no reference
    each = [size.weights(dtype, quantization) for size in sizes]
    if not opd.teacher_offload:
        return sum(each), 0
    rest = [_known(size.at_rest(dtype), whole) for size, whole in zip(sizes, each, strict=True)]
    return sum(rest), max((whole - part for whole, part in zip(each, rest, strict=True)), default=0)


def _known(part: int | None, whole: int) -> int:
    return whole if part is None else part


def _held_bytes(opd: Any, sizes: Sequence[TeacherSize], init: Mapping[str, Any], setup: Setup) -> int:
    """Bytes of the frozen models in a setup; DeepSpeed casts them to the precision of the run."""
    if setup.zero and (opd.bf16 or opd.fp16):
        init = {**init, "dtype": "bfloat16"}
    return _frozen_bytes(opd, sizes, init, setup.ranks if setup.sharded else 1)[0]


def teacher_choices(settings: RunSettings, sizes: RunSizes | None = None) -> str:
    """GB of the teachers' weights by choice of `--teacher_…`; "": no teacher, or unknown size.

    The first number is that of the teachers that are in memory at the same time.

    Args:
        sizes: as for `estimate_memory`.
    """
    opd = settings.opd
    frozen = (sizes or sizes_of(settings)).frozen
    teachers = [size for flag, size in frozen.items() if not flag.startswith("--reference")]
    if not teachers or None in teachers:
        return ""
    _, init = loading_arguments(settings.model, opd)
    dtype, quantization = dtype_of(init), quantization_of(opd, init)
    measured = [TeacherSize.of(size) for size in teachers if size is not None]
    weights = [each.weights(dtype, quantization) for each in measured]
    chosen = max(weights) if opd.stage_teachers or opd.teachers_in_memory == "one" else sum(weights)
    totals: dict[str, int | None] = {}
    for name in measured[0].choices(dtype):
        known = [value for each in measured if (value := each.choices(dtype)[name]) is not None]
        totals[name] = sum(known) if len(known) == len(measured) else None
    if len(measured) > 1:
        totals["one in memory"] = max(weights)
    kind = f"{quantization.removesuffix('bit')} bits" if quantization else dtype
    choices = ", ".join(f"{name}: {value / 1e9:,.3g}" for name, value in totals.items() if value is not None)
    unknown = " and ".join(name for name, value in totals.items() if value is None)
    unknown += ": unknown until the model's configuration is on disk" if unknown else ""
    return f"{chosen / 1e9:,.3g} GB in {kind}. Choices, GB: {choices}" + (f". {unknown}" if unknown else "")


def _peak(
    column: Mapping[str, int], step: StepMemory, *, accumulates: bool, visiting: int = 0, mixed: bool = False
) -> int:
    """Peak bytes: permanent memory plus the largest of a step, a search and an offloaded teacher's
    weights, × `_ALLOCATOR`.

    Offloaded weights are in memory before the student's activations are saved, and while the
    teacher samples along (`mixed`).
    """
    gradients, candidate = column["gradients"], column.get("candidate", 0)
    held = sum(column.values()) - gradients - candidate
    search = candidate + max(step.loss, step.sampling) if candidate else 0
    in_use = visiting + max(gradients * accumulates + candidate, step.sampling * mixed)
    return round(_ALLOCATOR * (held + max(step.peak(gradients, accumulates), search, in_use if visiting else 0)))


def _prompt_length(settings: RunSettings | RLRunSettings, longest: int | None) -> tuple[int, str]:
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
        rows=opd.per_device_train_batch_size // opd.num_mini_batches,
        prompt=prompt,
        answer=opd.max_completion_length or 0,
        sampled=opd.per_device_train_batch_size * opd.gradient_accumulation_steps,
        eval_rows=opd.per_device_eval_batch_size if evaluates(opd) else 0,
        health_tokens=opd.health_tokens,
        checkpointing=bool(opd.activation_checkpointing),
        bf16=bool(opd.bf16 or opd.fp16),
        triton=_triton(opd),
        mixed=opd.teacher_mixed_alpha > 0,
    )


def _triton(args: Any) -> bool:
    """Whether the loss uses Triton kernels."""
    return is_triton_available() and torch.cuda.is_available() and not args.use_cpu


def _adapter(model: ModelConfig, student: ModelSize, counted: int | None) -> tuple[Any, int | None]:
    """(PEFT configuration, number of parameters it trains); (None, None) without adapters.

    1 % of the parameters is assumed if the student's configuration is not available.

    Args:
        counted: number of trained parameters. `None`: not counted yet.
    """
    config = adapter_config(model)
    if config is None:
        return None, None
    if counted is not None:
        return config, counted
    if student.config is None:
        return config, student.parameters // 100
    return config, trained_parameters(config, model_of("model", "", student.config))
