"""What distillation and RL runs check alike before anything is loaded: packages, folders, the
checkpoint to resume, disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.trainer_utils import SaveStrategy
from trl import ModelConfig

from effopd.errors import CheckpointError, ConfigError
from effopd.launch.host_settings import check_host_settings
from effopd.launch.preflight import check_disk, check_model_name
from effopd.launch.run_models import NamedModel
from effopd.models.folders import check_whole_model
from effopd.runs.best_model import check_metric
from effopd.runs.checkpoints import check_kind
from effopd.runs.records import metric_names
from effopd.runs.run_dir import RunDir, in_trajectory, step_of_checkpoint


def check_run(model: ModelConfig, args: Any, names: Mapping[str, str | None]) -> None:
    """Model names, by the flags they are given with, packages, and the folder or checkpoint that a
    run starts from.
    """
    for flag, name in names.items():
        check_model_name(flag, name)
        check_whole_model(flag, str(name))
    check_host_settings(model, args)
    run_dir, resume = RunDir(args.output_dir), resume_argument(args)
    run_dir.refuse_unwritable()
    try:
        if checkpoint := run_dir.to_resume(resume):
            check_kind(checkpoint, adapter=model.use_peft)
    except CheckpointError as error:
        raise CheckpointError(f"--resume_from_checkpoint: {error}") from error
    check_metric(args, metric_names(teacher=hasattr(args, "teacher_model_name_or_path"), greedy=args.eval_greedy))
    if not resume:
        run_dir.refuse_overwrite()


def resume_argument(opd: Any) -> str | bool | None:
    """`resume_from_checkpoint` with the words of a command line understood.

    Raises:
        ConfigError: an empty text.
    """
    value = opd.resume_from_checkpoint
    if isinstance(value, str) and not value.strip():
        raise ConfigError("--resume_from_checkpoint: expected true, or the folder of a checkpoint, got nothing.")
    return {"true": True, "false": None}.get(str(value).lower(), value)


def check_space(
    model: ModelConfig, args: Any, models: Sequence[NamedModel], prompts: int, batch: int, *, effopd: bool
) -> None:
    """Refuse a run whose checkpoints and trajectory will not fit on the disk. Adapters are small:
    they are not counted.

    Raises:
        CheckpointError: less is free than a full set takes, without what the run has there already.
    """
    if model.use_peft:
        return
    steps = args.max_steps if args.max_steps > 0 else math.ceil(prompts / batch * args.num_train_epochs)
    run_dir = RunDir(args.output_dir)
    checkpoint = run_dir.to_resume(resume_argument(args))
    done = step_of_checkpoint(checkpoint) if checkpoint else 0
    checkpoints = 0
    if done < steps and args.save_strategy != SaveStrategy.NO:
        every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
        checkpoints = max(1, math.ceil(steps / every)) if args.save_strategy == SaveStrategy.STEPS else 1
        checkpoints = 1 + min(checkpoints, args.save_total_limit or checkpoints)  # one more while it is being written
    check_disk(
        args.output_dir,
        models[0].meta.num_parameters(),
        checkpoints=checkpoints,
        models=1 + sum(in_trajectory(args.trajectory, step, steps) for step in range(steps + 1)),
        optimizer=not args.save_only_model,
        effopd=effopd,
        held=run_dir.held(done),
    )
