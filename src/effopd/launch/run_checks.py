"""Checks shared by distillation and RL runs: packages, folders, resumed checkpoint, disk space."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_utils import SaveStrategy
from trl import ModelConfig

from effopd.distill.optimizers.settings import saved_copies
from effopd.errors import CheckpointError, ConfigError
from effopd.launch.host_settings import check_host_settings
from effopd.launch.preflight import check_disk, check_model_name
from effopd.launch.run_models import NamedModel
from effopd.models.folders import check_whole_model
from effopd.runs.best_model import check_metric
from effopd.runs.checkpoints import check_kind
from effopd.runs.records import CONFIG, metric_names
from effopd.runs.run_dir import RunDir, in_trajectory, step_of_checkpoint


def check_run(model: ModelConfig, args: Any, names: Mapping[str, str | None]) -> None:
    """Check model names, host settings, packages, and the run directory or resumed checkpoint.

    Args:
        names: flag → model folder or Hub id.

    Raises:
        EffOPDError: a check failed.
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
    teacher = getattr(args, "holds_teacher", False)  # also that of evaluations
    check_metric(args, metric_names(teacher=teacher, greedy=args.eval_greedy))
    if not resume:
        run_dir.refuse_overwrite()


def check_folder_of_config(config: Path | None, args: Any) -> None:
    """Check that a resume by a file in a run's folder resumes that run.

    The `output_dir` in a run's `config.yaml` can be relative, and the run can have been moved.

    Args:
        config: the file after `--config`; `None`: there is none.
        args: settings whose `output_dir` is that of the file.

    Raises:
        ConfigError: `resume_from_checkpoint` is true, the folder of the file holds a run, and
            `output_dir` is another folder.
    """
    if config is None or resume_argument(args) is not True:
        return
    folder, output = config.parent.resolve(), Path(args.output_dir).resolve()
    used = RunDir(folder).used() if (folder / CONFIG).is_file() else []
    if not used or folder == output:
        return
    start = Path(*folder.parts[: len(folder.parts) - len(Path(args.output_dir).parts)])
    first = f"`cd {shlex.quote(str(start))}` first, or " * (start / args.output_dir == folder)
    raise ConfigError(
        f"--resume_from_checkpoint true: {config} lies in the folder of a run, {folder} ({', '.join(used)}), but its "
        f"output_dir {args.output_dir} is another folder, {output}. To resume the run, {first}add "
        f"--output_dir {shlex.quote(str(folder))}. To start a run of its own, add --output_dir with another folder."
    )


def resume_argument(opd: Any) -> str | bool | None:
    """Value of `resume_from_checkpoint`: "true" → `True`, "false" → `None`, otherwise unchanged.

    Raises:
        ConfigError: the value is an empty string.
    """
    value = opd.resume_from_checkpoint
    if isinstance(value, str) and not value.strip():
        raise ConfigError("--resume_from_checkpoint: expected true, or the folder of a checkpoint, got nothing.")
    return {"true": True, "false": None}.get(str(value).lower(), value)


def check_space(
    model: ModelConfig, args: Any, models: Sequence[NamedModel], prompts: int, batch: int, *, effopd: bool
) -> None:
    """Check that the checkpoints and trajectory of a run fit on the disk.

    Runs with adapters are not checked, because adapters are small.

    Args:
        models: the student first.
        prompts: number of training prompts.
        batch: prompts per step.
        effopd: whether checkpoints contain an anchor.

    Raises:
        CheckpointError: there is too little free space for the files not yet on disk.
    """
    if model.use_peft:
        return
    steps = args.max_steps if args.max_steps > 0 else math.ceil(prompts / batch * args.num_train_epochs)
    if args.max_steps <= 0:
        steps *= getattr(args, "updates_per_rollouts", 1)
    run_dir = RunDir(args.output_dir)
    checkpoint = run_dir.to_resume(resume_argument(args))
    done = step_of_checkpoint(checkpoint) if checkpoint else 0
    checkpoints = 0
    if done < steps and args.save_strategy != SaveStrategy.NO:
        every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
        checkpoints = max(1, math.ceil(steps / every)) if args.save_strategy == SaveStrategy.STEPS else 1
        limit = max(args.save_total_limit or checkpoints, 2 if args.load_best_model_at_end else 1)
        checkpoints = 1 + min(checkpoints, limit)  # + 1 that is being written
    check_disk(
        args.output_dir,
        models[0].meta.num_parameters(),
        checkpoints=checkpoints,
        models=1 + sum(in_trajectory(args.trajectory, step, steps) for step in range(steps + 1)),
        optimizer=not args.save_only_model,
        copies=saved_copies(args),
        effopd=effopd,
        held=run_dir.held(done),
    )
