"""`RunMixin`: run directory, cost ledger, task evaluation and safe resume for all trainers.

`OPDTrainer` and the reinforcement-learning trainers share it, so their rows, checkpoints,
trajectories, accuracies and seconds are comparable. Rollouts and losses stay with the host.

Differs from TRL: checkpoints go to `checkpoints/step-000008`, written atomically. The data order of
later epochs survives a resume; TRL's sampler restarts its permutations. If the padding is an end
token, its embedding is trained as that of any other token.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerControl
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from effopd.common.distributed import all_gather_object, broadcast_from_rank0, raise_on_all_ranks
from effopd.common.files import write_atomically
from effopd.common.isolation import isolated_rng
from effopd.distill.best_model_mixin import BestModelMixin
from effopd.distill.callback import EffOPDCallback
from effopd.distill.config import RunArguments
from effopd.distill.dataset import check_eval_task
from effopd.distill.eval_spacing import LogSpacedEvaluation
from effopd.distill.exact_resume import EpochCallback, EpochSampler, TerminationCallback
from effopd.distill.optimizers.mixin import AverageCallback, OptimizerMixin
from effopd.distill.resuming import ResumeMixin, settings_that_matter
from effopd.distill.run_inputs import InputsCallback
from effopd.distill.run_record import RecordCallback
from effopd.distill.saving import rehearse, save_failed, tidy_generation_config
from effopd.distill.trl_host.state import log_evaluation
from effopd.errors import CompatibilityError, EffOPDError, finite_predictions
from effopd.models.end_tokens import train_end_tokens
from effopd.models.files import absolute_base
from effopd.models.sampler_check import ignore_sampling_defaults
from effopd.runs.best_model import HOST_DIRECTIONS, Kept, check_metric
from effopd.runs.checkpoints import LEDGER_FILE, SETTINGS_FILE
from effopd.runs.console import end_bars, in_lines, say
from effopd.runs.ledger import CLOCKS, CostLedger, LedgerCallback, StartLedgerCallback
from effopd.runs.missing_answers import AnswerWatch
from effopd.runs.model_card import LookAhead, model_card
from effopd.runs.records import Costs, metric_names
from effopd.runs.run_dir import RunDir, in_trajectory
from effopd.runs.writer import RunDirCallback
from effopd.tasks.base import Task
from effopd.tasks.prompts import prompt_ids

logger = logging.getLogger(__name__)


class RunMixin(OptimizerMixin, BestModelMixin, ResumeMixin):
    """Mixin with the features shared by all trainers.

    It comes before the hooks and the host: `class OPDTrainer(RunMixin, DistillationHooks,
    DistillationTrainer)`. The trainer calls `_open_run` before and `_attach_run` after its host's
    `__init__`, and defines `_measure_task`.

    Attributes:
        ledger: the run's `CostLedger`; logged with every step as `cost/…`.
        run_dir: the run directory.
        task_name: name of the training task in the model card.
        costs: the ledger's totals over all processes when last logged, or at the end of training.
        resumed_from: the checkpoint that training resumes from, if any.
        kept: with `load_best_model_at_end`, the step whose weights the trained model has; `None`:
            the last step.
        eval_task: task of the evaluations; `None`: the host's own evaluation.
    """

    def _open_run(self, args: RunArguments, eval_task: Task | None) -> None:
        check_eval_task(eval_task)
        self.eval_task, self.ledger = eval_task, CostLedger(CLOCKS[args.cost_clock])
        self.task_name: str | None = None if eval_task is None else eval_task.name
        self.run_dir = RunDir(args.output_dir)  # type: ignore[attr-defined]  # the host's config has it
        self.run_dir.refuse_unwritable()  # before the host creates it
        self.answer_watch = AnswerWatch(limit=args.max_completion_length)  # type: ignore[attr-defined]
        self.resumed_from: Path | None = None
        self.kept: Kept | None = None
        self._saving = False
        self.costs = Costs()
        self._epochs = EpochCallback()

    def _attach_run(self) -> None:
        self._check_prompting()
        self._check_given_optimizer()
        check_metric(self.args, self.eval_metrics())
        train_end_tokens(self.accelerator.unwrap_model(self.model), self.eos_token_ids)
        tidy_generation_config(self.accelerator.unwrap_model(self.model))
        absolute_base(self.accelerator.unwrap_model(self.model))
        self.callback_handler.callbacks = in_lines(self.callback_handler.callbacks)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, JITCheckpointCallback) and callback.jit_manager is not None:
                self.add_callback(TerminationCallback(callback.jit_manager))
                callback.jit_manager = None  # keep only the host's signal handler
        self.add_callback(self._epochs)
        if self.args.eval_log_spacing:
            self.add_callback(LogSpacedEvaluation())
        if self.args.average_weights != "none":
            self.callback_handler.callbacks.insert(0, AverageCallback(self))
        self.callback_handler.callbacks.insert(0, LedgerCallback(self.ledger))
        self.add_callback(RunDirCallback(self.run_dir, self._rehearse))
        self.add_callback(InputsCallback(self))
        self.add_callback(StartLedgerCallback(self.ledger))

    def _check_prompting(self) -> None:
        """Check tokenizer and first prompt early; the host fails only at the first rollouts.

        Raises:
            CompatibilityError: the tokenizer has no pad or end token, or plain prompts end with an
                end token.
            TaskError: the chat template rejects the first prompt.
        """
        tokenizer = self.text_tokenizer
        if tokenizer.pad_token_id is None or None in self.eos_token_ids:
            ends = [tokenizer.convert_ids_to_tokens(i) for i in self.eos_token_ids if i is not None]
            raise CompatibilityError(
                f"the tokenizer of '{tokenizer.name_or_path}' has no end token: expected one, to end answers and pad "
                f"rows. Set tokenizer.eos_token (the model declares {ends or 'none'})."
            )
        data = self.train_dataset
        plain = not (self.reads_images or getattr(self, "tools", None)) and hasattr(data, "__len__")
        if plain and len(data) and "prompt" in (getattr(data, "column_names", None) or ()):
            prompt_ids(
                tokenizer, data[0]["prompt"], self.args.chat_template_kwargs, origin="row 0 of the training set"
            )

    def add_callback(self, callback) -> None:
        """Add a callback before those that write to the run directory, and the clock's start.

        These stay last, so that their set-up is not charged.
        """
        super().add_callback(callback)
        writing = (TerminationCallback, RunDirCallback, RecordCallback)
        self.callback_handler.callbacks.sort(
            key=lambda each: (isinstance(each, StartLedgerCallback), isinstance(each, writing))
        )

    @property
    def terminated(self) -> bool:
        """Whether SIGTERM stopped the last training early (`enable_jit_checkpoint`)."""
        callbacks = self.callback_handler.callbacks
        return any(isinstance(callback, TerminationCallback) and callback.stopped for callback in callbacks)

    def _measure_task(self, task: Task) -> tuple[dict[str, float], int]:
        """Metrics of an evaluation, without prefix, and number of tokens generated."""
        raise NotImplementedError

    def eval_metrics(self) -> list[str]:
        """Names of this trainer's evaluation metrics, without the prefix `eval_`."""
        if self.eval_task is not None:
            return metric_names(teacher=hasattr(self, "teacher_model"), greedy=self.args.eval_greedy)
        if isinstance(self.eval_dataset, dict):
            return [f"{part}_{name}" for part in self.eval_dataset for name in HOST_DIRECTIONS]
        return list(HOST_DIRECTIONS)

    # -- data order --------------------------------------------------------------------------------

    def train_sampler(self, sampler):
        sampler.repeat_count *= getattr(self.args, "updates_per_rollouts", 1)  # steps that share rollouts
        self._epochs.sampler = EpochSampler(sampler)
        return self._epochs.sampler

    # -- rollout, logging and evaluation -----------------------------------------------------------

    def around_rollouts(self, sample):
        category = "rollout" if self.model.training else "eval"
        with self.ledger.track(category), finite_predictions(), self.at_sampling_weights():
            return super().around_rollouts(sample)

    def answers_sampled(self, answers):
        self.ledger.count("rollout" if self.model.training else "eval", generated=sum(map(len, answers)))

    def around_turn(self, generate, prompt_ids, *, multimodal):
        with ignore_sampling_defaults(self.accelerator.unwrap_model(self.model)):  # unset settings are off
            return super().around_turn(generate, prompt_ids, multimodal=multimodal)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the cost ledger added to every training row."""
        if "loss" in logs:
            logs.update(self._costs())
        super().log(logs, start_time)

    def _costs(self) -> dict[str, float]:
        """The ledger's totals: tokens summed over processes, seconds of the slowest."""
        rows = all_gather_object(self.ledger.snapshot())
        totals = {name: (sum if name.endswith("_tokens") else max)(row[name] for row in rows) for name in rows[0]}
        self.costs = Costs.from_row(totals)
        return totals

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluate `eval_task`; with no task or an explicit dataset, run the host's evaluation.

        Both sample with `args.eval_seed` and leave the random numbers of training as they were.
        """
        if self.eval_task is None or eval_dataset is not None:
            seed = self.args.eval_seed + self.args.process_index  # ranks must not share sampling noise
            with self.ledger.track("eval"), self.at_evaluated_weights(), isolated_rng(seed):
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        with self.ledger.track("eval"), self.at_evaluated_weights():
            metrics, generated = self._measure_task(self.eval_task)
        if self.accelerator.is_main_process:  # the count covers all ranks
            self.ledger.count("eval", generated=generated)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        row = metrics | self._costs()
        log_evaluation(self, metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, row)
        return metrics

    # -- saving and resuming -----------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train, or load the model of a run that has already reached its last step.

        Args:
            resume_from_checkpoint: `True`: the run directory's newest complete checkpoint, or the
                start of the run if there is none yet; a path: that checkpoint.

        Raises:
            CheckpointError: a fresh start into a directory that holds a run, a path that is not a
                checkpoint, or a checkpoint with other settings. Nothing has been written.
        """
        checkpoint = self.resumed_from = self.run_dir.to_resume(resume_from_checkpoint)
        if not resume_from_checkpoint:
            raise_on_all_ranks(self.run_dir.refuse_overwrite)  # no rank writes before all have checked
        if checkpoint is not None:
            raise_on_all_ranks(partial(self._check_resume, checkpoint))
            self.args.eval_on_start = False  # the interrupted run has already evaluated
        elif resume_from_checkpoint and self.is_world_process_zero():
            say(f"no checkpoint in {self.run_dir.root.resolve()}: starting at step 0")
        self._settled = False
        try:
            output = super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
        finally:
            end_bars(self.callback_handler.callbacks)
        self.settle()
        self._costs()
        self._say_kept()
        return output

    def around_epoch(self, run):
        """Run an epoch, unless the step limit is reached; the host checks only after a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self.state.global_step == 0:
            with self.ledger.paused():  # set-up
                self._save_trajectory()
        run()

    def checkpoint_root(self) -> Path | None:
        return self.run_dir.staging if self._saving else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; with FSDP's SHARDED_STATE_DICT, gather it unless this is a checkpoint.

        The host writes no model then. Checkpoints hold shards instead, but a trajectory and the
        final model need whole weights.
        """
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        kind = None if plugin is None or self._saving else plugin.state_dict_type
        if kind is not None:
            plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            if kind is not None:
                plugin.set_state_dict_type(kind)
        if Path(output_dir or self.args.output_dir) == self.run_dir.root:
            self.create_model_card()  # replaces PEFT's card

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """Write the run directory's `README.md` in place of TRL's card; the host's arguments."""
        if self.is_world_process_zero():
            name = model_name or self.run_dir.root.resolve().name
            try:  # a failing card must not lose the weights saved with it
                words = [tags] if isinstance(tags, str) else tags or []
                card = model_card(self, name, dataset_name, words, self._look_ahead())
                self.run_dir.root.mkdir(parents=True, exist_ok=True)
                write_atomically(self.run_dir.root / "README.md", card.save)
            except Exception as error:
                logger.warning("The model card was not written: %s: %s", type(error).__name__, error)

    def _look_ahead(self) -> LookAhead | None:
        """The look-ahead as the card describes it; `None`: the run has none."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EffOPDCallback):
                config = callback.config
                text = config.rules.help.removeprefix("ours: ")
                return LookAhead(config.strategy, text, bool(config.adapt_learning_rate))
        return None

    def save_final(self) -> None:
        """Save the model and its card into the run directory.

        Raises:
            CheckpointError: the model cannot be saved; the message names the rescued weights.
        """
        try:
            raise_on_all_ranks(partial(self.save_model, str(self.run_dir.root)))
        except EffOPDError:
            raise
        except Exception as error:
            raise save_failed(self, "the final model", error) from error

    def _rehearse(self) -> None:
        raise_on_all_ranks(partial(rehearse, self) if self.args.should_save else lambda: None)

    def around_checkpoint(self, write):
        try:
            self._publish_checkpoint(write)
        except EffOPDError:
            raise
        except Exception as error:
            if self.args.should_save:
                self.run_dir.clear_staging()
            raise save_failed(self, f"step {self.state.global_step}", error) from error

    def _publish_checkpoint(self, write: Callable[[], None]) -> None:
        step, best = self.state.global_step, self.state.best_model_checkpoint
        if self.args.should_save:
            self.run_dir.fresh_staging()
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            with self.at_evaluated_weights():
                write()
        finally:
            self._saving = False
            self.state.best_model_checkpoint = best  # the host sets a path in the staging folder
        staged, final = self.run_dir.staging / f"checkpoint-{step}", self.run_dir.checkpoint(step)
        ledgers = all_gather_object(self.ledger.state_dict())
        self.accelerator.wait_for_everyone()
        self.save_trained(staged)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "save_state"):
                callback.save_state(staged)
        if self.state.best_global_step is not None:
            better = self.run_dir.checkpoint(self.state.best_global_step)
            if broadcast_from_rank0(
                better == final or better.is_dir()
            ):  # a step may have been evaluated and not saved
                self.state.best_model_checkpoint = str(better)
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            write_atomically(staged / LEDGER_FILE, lambda path: path.write_text(json.dumps(ledgers, indent=1)))
            settings = json.dumps(settings_that_matter(self.args), indent=1)
            write_atomically(staged / SETTINGS_FILE, lambda path: path.write_text(settings))
            self.run_dir.publish(staged, final)
            best = self.state.best_model_checkpoint
            self.run_dir.rotate(self.args.save_total_limit, Path(best) if best else None)
        self.accelerator.wait_for_everyone()

    def around_step_end(self, report):
        self._save_trajectory()
        report()

    def _save_trajectory(self) -> None:
        step = self.state.global_step
        wanted = in_trajectory(self.args.trajectory, step, self.state.max_steps)
        if not wanted or broadcast_from_rank0(self.run_dir.trajectory(step).exists()):
            return
        staged = self.run_dir.staging / "trajectory"
        if self.args.should_save:
            self.run_dir.fresh_staging()
        self.accelerator.wait_for_everyone()
        with self.at_evaluated_weights():
            self.save_model(str(staged), _internal_call=True)  # on every rank: sharded weights are gathered for it
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.run_dir.publish(staged, self.run_dir.trajectory(step))
