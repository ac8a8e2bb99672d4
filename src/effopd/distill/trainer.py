"""`OPDTrainer`: TRL's `DistillationTrainer` with the paper's loss, accuracy evaluation, health, costs, safe resume.

    sample (TRL) → teacher → loss → optimizer step → look ahead (callback) → log → evaluate → save

Departures from TRL: vocabularies that differ only in padding rows are accepted, and rows that one model lacks are never
sampled; logits are what each model's own forward makes of its hidden states (`effopd.models.logit_path`), and padding changes no
row; `bf16=True` holds on one process too; and those of `RunMixin`. Left out: a remote teacher, and what TRL itself refuses.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from trl import DistillationTrainer
from trl.models import prepare_deepspeed
from trl.trainer.utils import create_model_from_path

from effopd.distill.config import OPDConfig
from effopd.distill.dataset import check_dataset
from effopd.distill.divergence import (
    MULTIMODAL_KEYS,
    Head,
    full_loss,
    kernel_dtype,
    mixture_head,
    mixture_hidden,
    sampled_loss,
    shared_vocab_size,
)
from effopd.distill.evaluate_student import evaluate_task
from effopd.distill.health import health_metrics, spread_subset
from effopd.distill.horizon import HorizonCallback
from effopd.distill.rollouts import RolloutMixin
from effopd.distill.run_dir_mixin import RunMixin
from effopd.distill.teacher_kl import rollouts_a_step
from effopd.errors import ConfigError, NonFiniteLossError
from effopd.models.checks import check_models
from effopd.models.logit_path import completion_hidden_states
from effopd.tasks.base import Task


class OPDTrainer(RunMixin, RolloutMixin, DistillationTrainer):
    """On-policy distillation: the student answers, the teacher grades every token.

    Takes everything `trl.DistillationTrainer` takes, and:

    Args:
        args: an `OPDConfig`.
        eval_task: examples with answers. When given, an evaluation samples answers to them and reports `eval_kl`
            (exact reverse KL to the teacher, nats per token, on those very answers; also as `eval_loss`),
            `eval_accuracy` at `eval_temperature` and `eval_accuracy_greedy`, each with a 95 % interval. Without it,
            evaluation is TRL's (the loss against the teacher, without a reference).
        reference_model: ExOPD's reference (with `args.lambda_extrapolation` ≠ 1); default: the one `args` names.

    Attributes:
        ledger: the `CostLedger` of the run; logged with every step as `cost/…`.

    Raises:
        CompatibilityError: a model has fewer vocabulary rows than the tokenizer has tokens; its logits have a form whose
            divergence cannot be computed; or it is not causal.
        ConfigError: no teacher, or the teacher is the student object itself; λ ≠ 1 without a reference, or a reference
            without λ.

    Source: arXiv 2605.11739, section 2 (objective); ExOPD 2602.12125; health metrics after 2604.13016.
    """

    _tag_names: ClassVar = ["trl", "effopd", "on-policy-distillation"]
    _host = DistillationTrainer

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: OPDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        *positional: Any,
        eval_task: Task | None = None,
        reference_model: str | PreTrainedModel | None = None,
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
        reference_model = reference_model if reference_model is not None else args.reference_model_name_or_path
        self._check_reference(reference_model, model, args)
        check_dataset(train_dataset, rollouts_a_step(args))
        self._open_run(args, eval_task)
        self._health_rows: dict[str, torch.Tensor] | None = None
        if eval_task is not None and eval_dataset is None:
            eval_dataset = eval_task.to_dataset()
        super().__init__(model, None, args, train_dataset, eval_dataset, *positional, **kwargs)
        self._check_student()
        self.teacher_model = self._prepare_frozen(teacher_model, "teacher")
        self.reference_model = None if reference_model is None else self._prepare_frozen(reference_model, "reference")
        student = self.accelerator.unwrap_model(self.model)
        self.vocab_size = min(
            shared_vocab_size(student, self.accelerator.unwrap_model(other), len(self._tokenizer), role)
            for role, other in (("teacher", self.teacher_model), ("reference", self.reference_model))
            if other is not None
        )
        self._mixture_head: Head | None = None
        check_models(
            student, {"teacher": self.teacher_model, "reference": self.reference_model}, generates=not self.use_vllm
        )
        self._open_rollouts()
        self._attach_run()
        if args.rollout_horizon != "full":
            self.add_callback(HorizonCallback(self))

    @staticmethod
    def _check_reference(reference, student, args: OPDConfig) -> None:
        if (reference is None) != (args.lambda_extrapolation == 1):
            raise ConfigError(
                f"ExOPD takes lambda_extrapolation other than 1 and a reference model, got {args.lambda_extrapolation} "
                f"and {'none' if reference is None else 'one'}. Set --reference_model_name_or_path (the student's "
                "start, or the teacher's base before RL), or leave both out."
            )
        if reference is student and isinstance(student, PreTrainedModel):  # one path twice is two models
            raise ConfigError(
                "the reference model is the student object itself, which is trained: expected a frozen copy."
            )

    def _check_student(self) -> None:
        if self.args.loss_type == "sampled" and self.tools:
            raise ConfigError("loss_type='sampled' does not support tools; use loss_type='full'.")

    def _prepare_frozen(self, teacher: str | PreTrainedModel, role: str) -> PreTrainedModel:
        """Load (like TRL) and place the teacher, or the reference: frozen, in eval mode, its own dtype."""
        if isinstance(teacher, str):
            init = dict(self.args.teacher_model_init_kwargs or {})
            if role == "reference":
                init.pop("revision", None)  # the teacher's
            dtype = init.get("dtype")
            init["dtype"] = dtype if dtype in ("auto", None) else getattr(torch, dtype)
            init.setdefault("trust_remote_code", self.args.trust_remote_code)
            if role == "teacher" and self.args.teacher_model_revision is not None:
                init.setdefault("revision", self.args.teacher_model_revision)
            if self.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
                init["device_map"] = None
            teacher = create_model_from_path(teacher, **init)
        elif self.args.teacher_model_init_kwargs is not None and role == "teacher":
            raise ConfigError("teacher_model_init_kwargs is for a teacher given by path; got a model object.")
        teacher.requires_grad_(False)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    # -- sample → teacher → loss --------------------------------------------------------------------------------

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        # On one process TRL's forward redirection replaces the forward that accelerate had wrapped, so `bf16=True`
        # would silently train in fp32; entering autocast here is harmless where it is on already.
        # Compiled adapters are unwrapped: TRL asks for the type, and would take them for a model without a backbone.
        student = getattr(unwrapped_student, "_orig_mod", unwrapped_student)
        with self.accelerator.autocast():
            return self._loss_of(student, inputs, num_items_in_batch)

    def _loss_of(self, unwrapped_student, inputs, num_items_in_batch):
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask = self._learned(inputs)
        keep = inputs["completion_ids"].size(1)
        multimodal = {key: inputs[key] for key in MULTIMODAL_KEYS if key in inputs}
        h_student = self._get_last_hidden_state(unwrapped_student, input_ids, attention_mask, keep, **multimodal)
        h_teacher, teacher_head = self._frozen_forward(self.teacher_model, input_ids, attention_mask, keep, multimodal)
        student_head = Head.of(unwrapped_student, self.vocab_size)
        device = student_head.weight.device
        reference = None
        if self.reference_model is not None and self.model.training:  # evaluation is against the teacher
            hidden, head = self._frozen_forward(self.reference_model, input_ids, attention_mask, keep, multimodal)
            reference = hidden.to(device), head
        h_student, h_teacher, mask = h_student.to(device), h_teacher.to(device), mask.to(device)
        if self.model.training:
            self.ledger.count("update", forward=int(attention_mask.sum()))
            ids = inputs["completion_ids"].to(device)
            sharded = isinstance(unwrapped_student, FSDPModule)
            self._keep_for_health(h_student, h_teacher, ids, mask, student_head if sharded else None)
            if "sampler_logps" in inputs:
                self._measure_sampler_gap(inputs["sampler_logps"].to(device), h_student, student_head, ids, mask)
        by_answer = self.args.loss_weighting == "answer"
        if self.args.loss_type == "sampled":
            loss, entropy, count = sampled_loss(
                h_student, h_teacher, student_head, teacher_head, inputs["completion_ids"].to(device), mask,
                self.temperature, num_items_in_batch, reference, self.args.lambda_extrapolation,
                sampler_logps_BT=inputs["sampler_logps"].to(device) if self.use_vllm else None, by_answer=by_answer,
            )  # fmt: skip
        else:
            if reference is not None:
                h_teacher, teacher_head = self._mixture(h_teacher, teacher_head, *reference)
            loss, entropy, count = full_loss(
                h_student, h_teacher, student_head, teacher_head, mask, self.beta, self.temperature,
                num_items_in_batch, by_answer=by_answer,
            )  # fmt: skip
        if self.model.training and not bool(torch.isfinite(loss)):
            raise self._not_finite(h_student, h_teacher)
        return loss, entropy.detach(), count

    def _get_last_hidden_state(self, unwrapped_model, input_ids, attention_mask, logits_to_keep, **multimodal):
        """The host's, exact for rows of unequal length and for layers between backbone and output layer."""
        return completion_hidden_states(
            unwrapped_model,
            input_ids,
            attention_mask,
            logits_to_keep,
            multiple_of=self.pad_to_multiple_of,
            **multimodal,
        )

    def _not_finite(self, h_student, h_teacher) -> NonFiniteLossError:
        """Whose fault it is, said before anything is updated (the host filters NaN out of its logs and trains on)."""
        bad = [
            role
            for role, hidden in (("student", h_student), ("teacher", h_teacher))
            if not bool(torch.isfinite(hidden).all())
        ]
        return NonFiniteLossError(
            f"the loss of step {self.state.global_step + 1} is not finite; hidden states that are not finite: "
            f"{' and '.join(bad) or 'none, so the loss itself overflowed'}. Nothing was updated in this step. "
            "Check the weights and the dtype of the model named here (float16 overflows where bfloat16 does not), or "
            "lower the learning rate and resume from the last checkpoint."
        )

    def _frozen_forward(self, model, input_ids, attention_mask, keep, multimodal):
        """Hidden states and head of the teacher, or of the reference; both are charged as `teacher`."""
        category = "teacher" if self.model.training else "eval"
        model.eval()
        unwrapped = self.accelerator.unwrap_model(model)
        with self.ledger.track(category), torch.no_grad():
            hidden = self._forward_redirection(
                model, unwrapped, self._get_last_hidden_state, unwrapped, input_ids, attention_mask, keep, **multimodal
            )
        self.ledger.count(category, forward=int(attention_mask.sum()))
        return hidden, Head.of(unwrapped, self.vocab_size)

    @torch.no_grad()
    def _mixture(self, h_teacher, teacher_head: Head, h_reference, reference_head: Head):
        """ExOPD's target as one frozen model, for the kernel that takes a teacher."""
        weight, dtype = self.args.lambda_extrapolation, kernel_dtype(h_teacher)
        if self._mixture_head is None:
            self._mixture_head = mixture_head(teacher_head, reference_head, weight, dtype)
        return mixture_hidden(h_teacher, h_reference, teacher_head, reference_head, weight, dtype), self._mixture_head

    # -- health -------------------------------------------------------------------------------------------------

    def _keep_for_health(self, h_student, h_teacher, completion_ids, mask, sharded_head: Head | None) -> None:
        """Remember a few positions of the first micro-batch of a logged step; measured after the wrapped forward has
        returned. A sharded head is whole only now, so its logits [N, V] are kept too."""
        if not self._health_due() or self._health_rows is not None or not bool(mask.any()):
            return
        index, position = spread_subset(mask, self.args.health_tokens)
        self._health_rows = {
            "student": h_student.detach().flatten(0, 1)[index],
            "teacher": h_teacher.flatten(0, 1)[index],
            "targets": completion_ids.reshape(-1)[index],
            "position": position,
        }
        if sharded_head is not None:
            with torch.no_grad(), torch.autocast(h_student.device.type, enabled=False):
                self._health_rows["logits"] = sharded_head.logits(self._health_rows["student"], self.temperature)

    def _log_health(self) -> None:
        rows, self._health_rows = self._health_rows, None
        if rows is None:
            return
        with torch.no_grad():
            student, teacher = (
                Head.of(self.accelerator.unwrap_model(model), self.vocab_size).logits(rows[role], self.temperature)
                if role != "student" or "logits" not in rows
                else rows["logits"]
                for role, model in (("student", self.model), ("teacher", self.teacher_model))
            )
            metrics = health_metrics(student, teacher, rows["targets"], rows["position"])
        for name, value in metrics.items():
            self._metrics["train"][f"health/{name}"].append(value)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch; measures health after the last one of an optimizer step."""
        output = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._log_health()
            self._log_sampler_gap()
        return output

    # -- evaluation ---------------------------------------------------------------------------------------------

    def _measure_task(self, task: Task) -> tuple[dict[str, float], int]:
        return evaluate_task(
            self.accelerator.unwrap_model(self.model),
            self.accelerator.unwrap_model(self.teacher_model),
            self._tokenizer,
            task,
            self.args,
            vocab_size=self.vocab_size,
            autocast=self.accelerator.autocast,
        )
