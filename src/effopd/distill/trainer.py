"""`OPDTrainer`: TRL's `DistillationTrainer` with the paper's loss, accuracy evaluation, health, costs, safe resume.

    sample (TRL) → teacher → loss → optimizer step → look ahead (callback) → log → evaluate → save

Departures from TRL: vocabularies that differ only in padding rows are accepted; checkpoints go to
`checkpoints/step-000008` and appear there whole or not at all; the data order of a later epoch survives a resume (TRL's
sampler restarts its permutations); `bf16=True` holds on one process too. Left out: a remote teacher, and what TRL
itself refuses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainerCallback, TrainerControl
from transformers.trainer import TRAINER_STATE_NAME
from trl import DistillationTrainer
from trl.models import prepare_deepspeed
from trl.trainer.utils import RepeatSampler, create_model_from_path

from effopd.distill.config import OPDConfig
from effopd.distill.divergence import (
    Head,
    full_loss,
    sampled_loss,
    shared_vocab_size,
    token_logprobs,
)
from effopd.distill.health import health_metrics, spread_subset
from effopd.distill.ledger import CostLedger
from effopd.distill.run_dir import RunDir, RunDirCallback, in_trajectory
from effopd.distill.task_eval import evaluate_task
from effopd.errors import CheckpointError, ConfigError
from effopd.files import write_atomically
from effopd.tasks.base import Task

LEDGER_FILE = "effopd_ledger.json"
_MULTIMODAL_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class EpochRepeatSampler(RepeatSampler):
    """TRL's `RepeatSampler` whose permutation is a function of (seed, epoch); epoch 0 is TRL's own order."""

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch, also the one a resume starts in."""
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed + epoch)


class _LedgerCallback(TrainerCallback):
    """Opens `update` for the length of an optimizer step. Must run before every other callback."""

    def __init__(self, ledger: CostLedger):
        self._ledger = ledger

    def on_step_begin(self, args, state, control, **kwargs):
        self._ledger.push("update")

    def on_step_end(self, args, state, control, **kwargs):
        self._ledger.pop()

    def on_train_end(self, args, state, control, **kwargs):
        self._ledger.stop()


class _StartLedgerCallback(TrainerCallback):
    """Starts the clock when training starts. Set-up before it (loading, checks) is not part of any comparison."""

    def __init__(self, ledger: CostLedger):
        self._ledger = ledger

    def on_train_begin(self, args, state, control, **kwargs):
        self._ledger.start()


class OPDTrainer(DistillationTrainer):
    """On-policy distillation: the student answers, the teacher grades every token.

    Takes everything `trl.DistillationTrainer` takes, and:

    Args:
        args: an `OPDConfig`.
        eval_task: examples with answers. When given, an evaluation samples answers to them and reports `eval_kl`
            (exact reverse KL to the teacher, nats per token, on those very answers; also as `eval_loss`),
            `eval_accuracy` at `eval_temperature` and `eval_accuracy_greedy`, each with a 95 % interval. Without it,
            evaluation is TRL's.

    Attributes:
        ledger: the `CostLedger` of the run; logged with every step as `cost/…`.

    Raises:
        CompatibilityError: a model has fewer vocabulary rows than the tokenizer has tokens.
        ConfigError: no teacher, or the teacher is the student object itself.

    Source: arXiv 2605.11739, section 2 (objective); health metrics after arXiv 2604.13016.
    """

    _tag_names: ClassVar = ["trl", "effopd", "on-policy-distillation"]

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: OPDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        *positional: Any,
        eval_task: Task | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else OPDConfig()
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        if teacher_model is None or (teacher_model is model and isinstance(model, PreTrainedModel)):
            raise ConfigError(
                "OPDTrainer needs a teacher of its own: expected a path or a model object other than the student, got "
                f"{'none' if teacher_model is None else 'the student object itself, which would be trained too'}. "
                "Pass teacher_model, or --teacher_model_name_or_path."
            )
        self.eval_task, self.ledger, self.run_dir = eval_task, CostLedger(), RunDir(args.output_dir)
        self.resumed_from: Path | None = None
        self._saving = False
        self._health_rows: dict[str, torch.Tensor] | None = None
        if eval_task is not None and eval_dataset is None:
            eval_dataset = eval_task.to_dataset()
        super().__init__(model, None, args, train_dataset, eval_dataset, *positional, **kwargs)
        self._check_student()
        self.teacher_model = self._prepare_teacher(teacher_model)
        self.vocab_size = shared_vocab_size(
            self.accelerator.unwrap_model(self.model),
            self.accelerator.unwrap_model(self.teacher_model),
            len(self._tokenizer),
        )
        self.callback_handler.callbacks.insert(0, _LedgerCallback(self.ledger))
        self.add_callback(RunDirCallback(self.run_dir))
        self.add_callback(_StartLedgerCallback(self.ledger))

    def _check_student(self) -> None:
        if self.args.loss_type == "sampled" and self.tools:
            raise ConfigError("loss_type='sampled' does not support tools; use loss_type='full'.")

    def _prepare_teacher(self, teacher: str | PreTrainedModel) -> PreTrainedModel:
        """Load (like TRL) and place the teacher: frozen, in eval mode, its own dtype."""
        if isinstance(teacher, str):
            init = dict(self.args.teacher_model_init_kwargs or {})
            dtype = init.get("dtype")
            init["dtype"] = dtype if dtype in ("auto", None) else getattr(torch, dtype)
            init.setdefault("trust_remote_code", self.args.trust_remote_code)
            if self.args.teacher_model_revision is not None:
                init.setdefault("revision", self.args.teacher_model_revision)
            if self.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
                init["device_map"] = None
            teacher = create_model_from_path(teacher, **init)
        elif self.args.teacher_model_init_kwargs is not None:
            raise ConfigError("teacher_model_init_kwargs is for a teacher given by path; got a model object.")
        teacher.requires_grad_(False)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    # -- data order ---------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        return EpochRepeatSampler(
            data_source=sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
        )

    # -- sample → teacher → loss --------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        category = "rollout" if self.model.training else "eval"
        with self.ledger.track(category):
            output = super()._generate_and_score_completions(inputs)
        self.ledger.count(category, generated=int(output["completion_mask"].sum()))
        return output

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        # On one process TRL's forward redirection replaces the forward that accelerate had wrapped, so `bf16=True`
        # would silently train in fp32; entering autocast here is harmless where it is on already.
        with self.accelerator.autocast():
            return self._loss_of(unwrapped_student, inputs, num_items_in_batch)

    def _loss_of(self, unwrapped_student, inputs, num_items_in_batch):
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        keep = inputs["completion_ids"].size(1)
        multimodal = {key: inputs[key] for key in _MULTIMODAL_KEYS if key in inputs}
        h_student = self._get_last_hidden_state(unwrapped_student, input_ids, attention_mask, keep, **multimodal)
        h_teacher, teacher_head = self._teacher_forward(input_ids, attention_mask, keep, multimodal)
        student_head = Head.of(unwrapped_student, self.vocab_size)
        device = student_head.weight.device
        h_student, h_teacher, mask = h_student.to(device), h_teacher.to(device), mask.to(device)
        if self.model.training:
            self.ledger.count("update", forward=int(attention_mask.sum()))
            ids = inputs["completion_ids"].to(device)
            if self._keep_for_health(h_student, h_teacher, ids, mask) and not (multimodal or self.use_vllm):
                self._log_sampler_gap(unwrapped_student, input_ids, attention_mask, h_student, ids, mask)
        if self.args.loss_type == "sampled":
            loss, entropy, count = sampled_loss(
                h_student, h_teacher, student_head, teacher_head, inputs["completion_ids"].to(device), mask,
                self.temperature, num_items_in_batch,
            )  # fmt: skip
        else:
            loss, entropy, count = full_loss(
                h_student, h_teacher, student_head, teacher_head, mask, self.beta, self.temperature, num_items_in_batch
            )
        return loss, entropy.detach(), count

    def _teacher_forward(self, input_ids, attention_mask, keep, multimodal):
        category = "teacher" if self.model.training else "eval"
        self.teacher_model.eval()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with self.ledger.track(category), torch.no_grad():
            hidden = self._forward_redirection(
                self.teacher_model, teacher, self._get_last_hidden_state, teacher, input_ids, attention_mask, keep,
                **multimodal,
            )  # fmt: skip
        self.ledger.count(category, forward=int(attention_mask.sum()))
        return hidden, Head.of(teacher, self.vocab_size)

    # -- health -------------------------------------------------------------------------------------------------

    def _keep_for_health(self, h_student, h_teacher, completion_ids, mask) -> bool:
        """Remember a few positions of the first micro-batch of a logged step; measured after the wrapped forward has
        returned. Says whether this was that micro-batch."""
        due = (self.state.global_step + 1) % max(int(self.state.logging_steps or 1), 1) == 0
        if not due or not self.args.health_tokens or self._health_rows is not None or not bool(mask.any()):
            return False
        index, position = spread_subset(mask, self.args.health_tokens)
        self._health_rows = {
            "student": h_student.detach().flatten(0, 1)[index],
            "teacher": h_teacher.flatten(0, 1)[index],
            "targets": completion_ids.reshape(-1)[index],
            "position": position,
        }
        return True

    @torch.no_grad()
    def _log_sampler_gap(self, student, input_ids, attention_mask, h_student, completion_ids, mask) -> None:
        """Mean |log π_sampler(y) − log π_train(y)| (nats) of the batch's first rollout. The sampler is the same model
        outside of autocast; for vLLM the host hands over no sampler log-probs, so nothing is logged there."""
        with torch.autocast(h_student.device.type, enabled=False):
            hidden = self._get_last_hidden_state(student, input_ids[:1], attention_mask[:1], completion_ids.size(1))
        valid, head = mask[0] != 0, Head.of(student, self.vocab_size)
        targets = completion_ids[0][valid]
        with torch.autocast(h_student.device.type, enabled=False):
            sampler, _ = token_logprobs(hidden[0][valid], head, targets, self.temperature)
        train, _ = token_logprobs(h_student.detach()[0][valid], head, targets, self.temperature)
        gap = float((sampler - train).abs().mean()) if bool(valid.any()) else 0.0
        self._metrics["train"]["health/sampler_logp_gap"].append(gap)

    def _log_health(self) -> None:
        rows, self._health_rows = self._health_rows, None
        if rows is None:
            return
        with torch.no_grad():
            heads = [
                Head.of(self.accelerator.unwrap_model(m), self.vocab_size) for m in (self.model, self.teacher_model)
            ]
            student = heads[0].logits(rows["student"], self.temperature)
            teacher = heads[1].logits(rows["teacher"], self.temperature)
            metrics = health_metrics(student, teacher, rows["targets"], rows["position"])
        for name, value in metrics.items():
            self._metrics["train"][f"health/{name}"].append(value)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch; measures health after the last one of an optimizer step."""
        output = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._log_health()
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with the cost ledger in every training row."""
        if "loss" in logs:
            logs.update(self.ledger.snapshot())
        super().log(logs, start_time)

    # -- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluate `eval_task` (see the class), or like TRL if there is none or another dataset is passed."""
        if self.eval_task is None or eval_dataset is not None:
            with self.ledger.track("eval"):
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        with self.ledger.track("eval"):
            metrics, generated = evaluate_task(
                self.accelerator.unwrap_model(self.model),
                self.accelerator.unwrap_model(self.teacher_model),
                self._tokenizer,
                self.eval_task,
                self.args,
                vocab_size=self.vocab_size,
                autocast=self.accelerator.autocast,
            )
        self.ledger.count("eval", generated=generated)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self._metrics["eval"].clear()
        row = metrics | self.ledger.snapshot()
        super(DistillationTrainer, self).log(dict(metrics))  # TRL would log the training metrics here too
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, row)
        return metrics

    # -- saving and resuming ------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train. `resume_from_checkpoint=True` continues from the newest complete checkpoint of the run directory
        (from the start if the run was killed before its first); a path continues from that one.

        Raises:
            CheckpointError: a fresh start into a directory that holds a run, or a checkpoint path that is none.
        """
        if resume_from_checkpoint is True:
            checkpoint = self.run_dir.last_checkpoint()
        elif resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
        else:
            checkpoint = None
            self.run_dir.refuse_overwrite()
        if checkpoint is not None:
            if not (checkpoint / TRAINER_STATE_NAME).is_file():
                raise CheckpointError(
                    f"{checkpoint} is no checkpoint: expected a folder with {TRAINER_STATE_NAME}, such as "
                    f"{self.run_dir.checkpoint(8)}."
                )
            self._load_ledger(checkpoint)
            self.resumed_from = checkpoint
            self.args.eval_on_start = False  # the run has started before; its rows are there
        else:
            self._save_trajectory()
        return super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)

    def _load_ledger(self, checkpoint: Path) -> None:
        path = checkpoint / LEDGER_FILE
        if path.exists():
            self.ledger.load_state_dict(json.loads(path.read_text()))

    def _get_output_dir(self, trial):
        return str(self.run_dir.staging) if self._saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        step = self.state.global_step
        if self.args.should_save:
            self.run_dir.fresh_staging()
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        staged, final = self.run_dir.staging / f"checkpoint-{step}", self.run_dir.checkpoint(step)
        if self.args.should_save:
            for callback in self.callback_handler.callbacks:
                if hasattr(callback, "save_state"):
                    callback.save_state(staged)
            if self.state.best_global_step is not None:
                self.state.best_model_checkpoint = str(self.run_dir.checkpoint(self.state.best_global_step))
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            write_atomically(
                staged / LEDGER_FILE, lambda path: path.write_text(json.dumps(self.ledger.state_dict(), indent=1))
            )
            self.run_dir.publish(staged, final)
            best = self.state.best_model_checkpoint
            self.run_dir.rotate(self.args.save_total_limit, Path(best) if best else None)
        self.accelerator.wait_for_everyone()

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self._save_trajectory()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_trajectory(self) -> None:
        step = self.state.global_step
        wanted = in_trajectory(self.args.trajectory, step, self.state.max_steps)
        if not wanted or not self.args.should_save or self.run_dir.trajectory(step).exists():
            return
        staged = self.run_dir.fresh_staging() / "trajectory"
        self.save_model(str(staged), _internal_call=True)
        self.run_dir.publish(staged, self.run_dir.trajectory(step))
