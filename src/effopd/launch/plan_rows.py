"""Rows of a dry run's plan on objective, optimizer, adapter, use of rollouts, and first step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from trl import ModelConfig

from effopd.common.host_values import name_of
from effopd.distill.optimizers.settings import default_of
from effopd.distill.scoring import rollouts_per_update
from effopd.launch.adapters import adapter_config
from effopd.launch.model_size import ModelSize
from effopd.launch.model_states import BF16, FP32
from effopd.launch.run_checks import resume_argument
from effopd.launch.run_models import loading_arguments
from effopd.launch.teacher_memory import DTYPE_BYTES, dtype_of
from effopd.runs.run_dir import RunDir, step_of_checkpoint

_BETAS = {0.0: " (forward KL)", 1.0: " (reverse KL)"}
#: Setting → its default; a setting with another value is part of the objective.
_OBJECTIVE = {
    "normalize_beta": False, "baseline": "none", "samples_per_prefix": 1, "highest_entropy_share": 1.0,
    "entropy_advantage": False, "token_mask": "none", "loss_weighting": "token", "lmbda": 1.0,
    "teacher_mixed_alpha": 0.0, "lambda_extrapolation": 1.0,
}  # fmt: skip


def objective_text(opd: Any) -> str:
    """Loss, beta, and the settings of the objective that differ from their defaults."""
    parts = [f"loss_type {opd.loss_type}"]
    if opd.loss_type == "full":
        parts[0] += f", beta {opd.beta:g}{_BETAS.get(opd.beta, '')}"
    elif opd.loss_type == "teacher_top_k":
        parts.append(f"teacher_top_k {opd.teacher_top_k}")
    elif opd.loss_type == "negative_advantage":
        parts.append(f"negative_advantage {opd.negative_advantage:g}")
    changed = {name: getattr(opd, name) for name, usual in _OBJECTIVE.items() if getattr(opd, name) != usual}
    parts += [f"{name} {_shown(value)}" for name, value in changed.items()]
    return ", ".join(parts)


def optimizer_rows(args: Any) -> Iterator[tuple[str, str]]:
    """Optimizer with its arguments and schedule, k-step Lookahead, and average of the weights."""
    if args.optimizer_class is not None:
        name, arguments = args.optimizer_class, args.optimizer_args
    else:
        name, arguments = name_of(args.optim), args.optim_args
    parts = [f"{name} {_shown(arguments)}" if arguments else str(name)]
    names = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
    parts += [f"{each} {_shown(getattr(args, each))}" for each in names if getattr(args, each) != default_of(each)]
    schedule = f"schedule {name_of(args.lr_scheduler_type)}"
    if args.lr_scheduler_kwargs:
        schedule += f" {_shown(args.lr_scheduler_kwargs)}"
    if 0 < args.warmup_steps < 1:
        schedule += f" after a warm-up of {args.warmup_steps:.3g} of the steps"
    elif args.warmup_steps:
        schedule += f" after a warm-up of {args.warmup_steps:,.0f} step(s)"
    yield "optimizer", "; ".join([*parts, schedule])
    if args.k_step_lookahead:
        yield "k-step Lookahead", f"every {args.k_step_lookahead} steps, {args.k_step_lookahead_alpha:g} of the way"
    if args.average_weights != "none":
        saved = "evaluated and saved" if args.save_average else "evaluated; the trained weights are saved"
        yield "average of weights", f"{args.average_weights}, decay {args.average_decay:g}; {saved}"


def rollouts_used_text(opd: Any, replay: int | None) -> str:
    """Updates per batch of rollouts, and replay; "" for one update without replay.

    Args:
        replay: as returned by `replay_bytes`.
    """
    if opd.updates_per_rollouts == 1:
        return ""
    text = f"{opd.updates_per_rollouts} updates per batch"
    if opd.num_mini_batches > 1:
        text += f", each on one of {opd.num_mini_batches} parts ({rollouts_per_update(opd):,} prompts)"
    if opd.replay_batches:
        text += f", the last one on one of the last {opd.replay_batches} batches (replay)"
        text += "" if replay is None else f"; up to {replay / 1e9:,.3g} GB of host memory per process"
    return text


def replay_bytes(model: ModelConfig, opd: Any, frozen: Mapping[str, ModelSize | None]) -> int | None:
    """Largest host memory of replay per process: the teacher's hidden states of older batches.

        (batches − 1) × rows × answer tokens × hidden size × bytes

    `None`: no replay, or unknown: a teacher's configuration is not available, or its predictions
    are no hidden states of its own.

    Args:
        frozen: flag → size of a teacher or reference.
    """
    configs = [None if size is None else size.config for size in frozen.values()]
    if not opd.replay_batches or opd.served or opd.lambda_extrapolation != 1 or not configs or None in configs:
        return None
    width = max(config.get_text_config().hidden_size for config in configs if config is not None)
    rows = opd.per_device_train_batch_size * opd.gradient_accumulation_steps
    each = BF16 if opd.bf16 or opd.fp16 else DTYPE_BYTES.get(dtype_of(loading_arguments(model, opd)[1]), FP32)
    return int((opd.replay_batches - 1) * rows * opd.max_completion_length * width * each)


def adapter_text(model: ModelConfig, trained: int | None) -> str:
    """LoRA's rank, alpha, targets and number of trained parameters; "" without an adapter.

    Args:
        trained: number of parameters that the adapter trains. `None`: not counted.
    """
    config = adapter_config(model)
    if config is None:
        return ""
    names = config.target_modules
    if isinstance(names, str):
        targets = names
    else:
        targets = ", ".join(sorted(names)) if names else "PEFT's choice for this model"
    parts = [f"LoRA r {config.r}, alpha {config.lora_alpha:g}", f"on {targets}"]
    parts += [f"{trained:,} trained parameters"] * (trained is not None)
    return "; ".join(parts)


def start_text(args: Any) -> str:
    """Where the run starts: at step 0, or at the step of the checkpoint that it resumes."""
    resume = resume_argument(args)
    checkpoint = RunDir(args.output_dir).to_resume(resume)
    if checkpoint is not None:
        return f"resumes from step {step_of_checkpoint(checkpoint):,} ({checkpoint})"
    return "at step 0" + (" (--resume_from_checkpoint: there is no checkpoint yet)" if resume else "")


def _shown(value: Any) -> str:
    """A value of a setting: `{"r": 0.5}`, 0.1, true."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
