"""Checks on resume: errors for a wrong checkpoint, warnings where the resumed run will differ."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformers.trainer import SCALER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType

from effopd.common.distributed import raise_on_all_ranks, rank, world_size
from effopd.distill.trl_host.hooks import SCALER, HostHooks
from effopd.errors import CheckpointError
from effopd.extrapolate.saved_state import STATE_FILE
from effopd.runs.checkpoints import LEDGER_FILE, SETTINGS_FILE, check_complete, check_kind, reading
from effopd.runs.ledger import CostLedger

logger = logging.getLogger(__name__)

#: Prefixes of settings that do not affect the trained weights.
_HARMLESS = (
    "_", "output_dir", "do_", "log_", "logging_", "save_", "eval_", "hub_", "push_", "report_to", "run_name",
    "project", "trackio",
    "disable_tqdm", "load_best", "metric_for", "greater_is", "dataloader_num", "dataloader_pin",
    "dataloader_persistent",
    "dataloader_prefetch", "resume_", "restore_", "skip_memory", "include_", "trajectory", "ddp_",
    "local_rank",
    "debug", "per_device_eval", "num_completions", "wandb", "health_tokens", "prediction_loss", "batch_eval",
    "enable_jit",
    "torch_empty_cache", "use_cpu", "trust_remote", "teacher_offload", "teacher_shard", "teacher_server",
    "teachers_in_memory", "fp16_full", "bf16_full", "label_names", "remove_unused",
)  # fmt: skip
#: Settings that the checkpoint's optimizer state overrides.
_IN_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optimizer_args")
#: Settings that decide which state a checkpoint has.
_WITH_STATE = ("optim", "optimizer_class", "k_step_lookahead", "average_weights")
_LENGTH = ("max_steps", "num_train_epochs")
#: Schedules that do not depend on the length of training.
_ENDLESS = (
    SchedulerType.CONSTANT,
    SchedulerType.CONSTANT_WITH_WARMUP,
    SchedulerType.INVERSE_SQRT,
    SchedulerType.REDUCE_ON_PLATEAU,
    SchedulerType.GREEDY,
)


# -- settings --------------------------------------------------------------------------------------


def settings_that_matter(args: Any) -> dict[str, Any]:
    """Training arguments that affect the trained weights, as JSON-ready values."""
    lasting = args.lr_scheduler_type in _ENDLESS and getattr(args, "rollout_horizon", "full") != "popd"
    lasting = lasting and getattr(args, "curriculum", "none") == "none"
    lasting = lasting and not 0 < args.warmup_steps < 1  # a share of the steps
    values = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(args)
        if not field.name.startswith(_HARMLESS) and not (lasting and field.name in _LENGTH)
    }
    return json.loads(json.dumps(values, default=lambda value: getattr(value, "value", None) or str(value)))


def compare_settings(checkpoint: Path, args: Any) -> None:
    """Warn about settings that differ from the checkpoint's; no check if it has no settings file.

    Raises:
        CheckpointError: the checkpoint has the state of a different optimizer, or costs in seconds
            of another clock.
    """
    if not (checkpoint / SETTINGS_FILE).is_file():
        return
    with reading(checkpoint, SETTINGS_FILE):
        before = json.loads((checkpoint / SETTINGS_FILE).read_text())
        now = settings_that_matter(args)
        changed = {name: (before[name], now[name]) for name in now if name in before and before[name] != now[name]}
    for name in (each for each in _WITH_STATE if each in changed):
        what, (old, new) = "the optimizer" if name == "optim" else name, changed[name]
        raise CheckpointError(
            f"{checkpoint} has the state of {what} {old!r}, got --{name} {new}. "
            "Resume with the run's optimizer, or start a new run from its weights: "
            f"--model_name_or_path {checkpoint}."
        )
    if "cost_clock" in changed:
        old, new = changed["cost_clock"]
        raise CheckpointError(
            f"{checkpoint} has costs in seconds of the clock {old!r}, got --cost_clock {new}. Their sum would mean "
            f"nothing. Resume with --cost_clock {old}."
        )
    if not changed or rank() > 0:
        return
    text = ", ".join(f"{name} {old} → {new}" for name, (old, new) in changed.items())
    stay = [name for name in _IN_OPTIMIZER if name in changed]
    logger.warning(
        "Settings differ from those of %s: %s. This run will differ from an uninterrupted one.%s",
        checkpoint,
        text,
        f" Without effect: {', '.join(stay)}; the optimizer keeps the checkpoint's values." if stay else "",
    )


def _unequal(args: Any, checkpoint: Path, *, looks_ahead: bool) -> Iterator[str]:
    """Settings whose state is not in a checkpoint, and state that no setting reads."""
    if (checkpoint / STATE_FILE).is_file() and not looks_ahead:
        yield f"{checkpoint} was written with a look-ahead, and this run has none"
    if args.ignore_data_skip:
        yield "ignore_data_skip restarts the epoch's prompts"
    if getattr(args, "sync_ref_model", False):
        yield "sync_ref_model restarts the reference from the run's initial model"


def check_engine(checkpoint: Path, stage: int | None, processes: int) -> None:
    """Check that a checkpoint was written under DeepSpeed, or without it, as this run needs it.

    Args:
        stage: ZeRO stage of this run; `None`: no DeepSpeed.
        processes: number of processes of this run.

    Raises:
        CheckpointError: it was written by another engine, or by another number of processes or
            ZeRO stage, between which DeepSpeed does not convert.
    """
    states = list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt"))
    if not states and stage is None:
        return
    third = any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt"))
    saved = f"DeepSpeed ZeRO-{3 if third else '1 or -2'} on {len(states)} process(es)" if states else "no DeepSpeed"
    now = "no DeepSpeed" if stage is None else f"DeepSpeed ZeRO-{stage} on {processes} process(es)"
    if not states or stage is None or (stage == 3) != third or len(states) != processes:
        raise CheckpointError(
            f"{checkpoint} was written with {saved}, and this run has {now}. Resume with the launcher of the run, or "
            f"start a new run from its weights: --model_name_or_path {checkpoint}."
        )


def compare_processes(checkpoint: Path, world_size: int) -> None:
    """Warn if the checkpoint's random states are for another number of processes."""
    states = len(list(checkpoint.glob("rng_state*.pth")))
    if states != world_size:
        logger.warning(
            "%s was written by %d process(es), and there are %d now. Random states cannot be restored, so this run "
            "will differ from an uninterrupted one.",
            checkpoint,
            states,
            world_size,
        )


# -- the trainer's part ----------------------------------------------------------------------------


class ResumeMixin(HostHooks):
    """The part of `RunMixin` that reads checkpoints; raises or warns where the host is silent."""

    ledger: CostLedger
    resumed_from: Path | None
    kept: Any
    _recall_best: Any

    def _check_resume(self, checkpoint: Path) -> None:
        """Check the checkpoint before anything is loaded or written.

        Raises:
            CheckpointError: adapter or full weights, optimizer or look-ahead settings do not match.
        """
        check_kind(checkpoint, adapter=hasattr(self.accelerator.unwrap_model(self.model), "peft_config"))
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        check_engine(checkpoint, None if plugin is None else plugin.zero_stage, self.args.world_size)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "check_resume"):
                callback.check_resume(checkpoint)
        compare_settings(checkpoint, self.args)
        looks = any(hasattr(callback, "look_ahead") for callback in self.callback_handler.callbacks)
        for why in _unequal(self.args, checkpoint, looks_ahead=looks) if rank() == 0 else ():
            logger.warning("%s, so this run will differ from an uninterrupted one.", why)
        self._load_ledger(checkpoint)

    def _load_ledger(self, checkpoint: Path) -> None:
        path = checkpoint / LEDGER_FILE
        if not path.is_file() and rank() == 0:
            logger.warning("%s has no costs (%s). Costs are counted from this step on.", checkpoint, LEDGER_FILE)
        if not path.is_file():
            return
        with reading(checkpoint, LEDGER_FILE):
            saved = json.loads(path.read_text())
            if len(saved) == world_size():
                self.ledger.load_state_dict(saved[rank()])
            else:  # another number of processes: rank 0 takes over all tokens
                self.ledger.reset()  # the saved totals have what is charged before training
                for state in saved:
                    self.ledger.add(state, tokens=rank() == 0)

    def around_state(self, initialize, checkpoint, max_steps):
        with reading(checkpoint, TRAINER_STATE_NAME):
            trained = initialize()
        self.kept = None
        if self.resumed_from is not None:
            finished = self.state.global_step >= max_steps
            raise_on_all_ranks(partial(check_complete, self.resumed_from, finished=finished))
            if not finished and rank() == 0:
                compare_processes(self.resumed_from, self.args.world_size)
            self._recall_best()
        return trained

    def around_load(self, part, checkpoint, load):
        with reading(checkpoint, part):
            scaled = part == SCALER and getattr(self.accelerator, "scaler", None) is not None
            if scaled and checkpoint is not None and not (Path(checkpoint) / SCALER_NAME).is_file():
                logger.warning("%s has no state of the fp16 gradient scaler, so the scaler restarts.", checkpoint)
            load()

    def check_loaded(self, missing, unexpected) -> None:
        """Check the loaded names; a missing name of a tied tensor is not an error.

        Raises:
            CheckpointError: the checkpoint lacks tensors of this model, or has unknown ones.
        """
        tensors = self.model.state_dict(keep_vars=True)
        loaded = {_place(tensor) for name, tensor in tensors.items() if name not in missing}
        lacking = [name for name in missing if _place(tensors.get(name)) not in loaded]
        groups = (("missing", lacking), ("unknown", list(unexpected)))
        wrong = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in groups if names]
        if wrong:
            raise CheckpointError(
                f"{self.resumed_from or self.state.best_model_checkpoint} belongs to another model: "
                f"{' and '.join(wrong)} tensors. Resume with the run's model."
            )


def _place(tensor: Any) -> Any:
    return None if tensor is None else (tensor.device, tensor.data_ptr(), tensor.shape)
