"""`OPDTrainer`: on-policy distillation on TRL, with health metrics, cost ledger and safe resume.

    sample (TRL) → teacher → loss → optimizer step → look ahead (callback) → log → evaluate → save

Differs from TRL (see also `RunMixin`):
- Vocabularies may differ in padding rows; rows that one model lacks are never sampled.
- Logits equal those of each model's own forward (`effopd.models.logit_path`); padding does not
  change them.
- `bf16=True` also works on one process.

A teacher behind a server: `effopd.distill.served`. Left out: features that TRL's trainer rejects.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import DistillationTrainer

from effopd.distill.config import OPDConfig, require_config
from effopd.distill.curriculum_mixin import CurriculumCallback, CurriculumMixin
from effopd.distill.dataset import check_dataset, check_eval_dataset, check_stream
from effopd.distill.divergence import (
    Answers,
    Head,
    Predictions,
    full_loss,
    interior_factor,
    kernel_dtype,
    mixture_head,
    mixture_hidden,
    multimodal_inputs,
    shared_vocab_size,
)
from effopd.distill.evaluate_student import evaluate_trainer
from effopd.distill.health import HealthProbe
from effopd.distill.horizon import HorizonCallback
from effopd.distill.mixing import TEACHER_SHARE, MixingMixin
from effopd.distill.policy_gradient import negative_advantage_loss, sampled_loss
from effopd.distill.prune_callback import PruneCallback
from effopd.distill.rollout_cycle import RolloutCycleCallback
from effopd.distill.rollouts import RolloutMixin
from effopd.distill.run_dir_mixin import RunMixin
from effopd.distill.scoring import rollouts_per_step, token_batch
from effopd.distill.teachers.manifest import ONLY, ManifestCallback
from effopd.distill.teachers.mixin import TeachersMixin
from effopd.distill.teachers.offload import in_use
from effopd.distill.teachers.settings import given_teachers
from effopd.distill.top_k import top_k_loss
from effopd.distill.trl_host.hooks import DistillationHooks
from effopd.distill.trl_host.models import inside_forward, loaded_whole
from effopd.distill.trl_host.state import log_metrics
from effopd.distill.whole_answers import TOKEN_WEIGHT, WholeAnswersMixin
from effopd.errors import ConfigError, NonFiniteLossError
from effopd.models.checks import check_models
from effopd.models.logit_path import completion_hidden_states
from effopd.models.token_batch import TokenBatch
from effopd.tasks.base import Task


class OPDTrainer(
    CurriculumMixin,
    MixingMixin,
    WholeAnswersMixin,
    RunMixin,
    RolloutMixin,
    TeachersMixin,
    DistillationHooks,
    DistillationTrainer,
):
    """On-policy distillation: the student answers, the teacher grades every token.

    Accepts the arguments of `trl.DistillationTrainer`, and:

    Args:
        args: an `OPDConfig`.
        teacher_model: path or model; or several by label, `{label: path or model}`, and a column of
            the data set (`args.teacher_column`) names the teacher of each row. Default: those that
            `args` names.
        eval_task: held-out examples with answers. An evaluation samples answers to them and reports
            `eval_kl` (= `eval_loss`), the exact reverse KL to the teacher on these answers in nats
            per token, with its standard error. It also reports `eval_accuracy` at
            `eval_temperature` and `eval_accuracy_greedy`, each with a 95 % interval. `None`: TRL's
            evaluation, the loss against the teacher without a reference.
        reference_model: ExOPD's reference, for `args.lambda_extrapolation` ≠ 1; default: the model
            that `args` names.

    Attributes:
        ledger: the run's `CostLedger`; logged with every step as `cost/…`.

    Raises:
        CompatibilityError: a model has fewer vocabulary rows than the tokenizer has tokens, is not
            causal, or has logits of a form that is not supported.
        ConfigError: `args` is no `OPDConfig`; no teacher, or the teacher is the student object
            itself; several teachers without labels, or with other labels than `args.teachers`;
            ExOPD's λ ≠ 1 without a reference, or a reference with λ = 1; `lmbda` < 1 without
            answers; evaluations without data.
        TaskError: a row names none of several teachers, or `eval_task` cannot be graded.

    Source: arXiv 2605.11739, section 2 (objective); 2602.12125 (ExOPD); 2604.13016 (health
        metrics).
    """

    card_tags: ClassVar = ["trl", "effopd", "on-policy-distillation"]

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | Mapping[str, str | PreTrainedModel] | None = None,
        args: OPDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        *positional: Any,
        eval_task: Task | None = None,
        reference_model: str | PreTrainedModel | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else OPDConfig()
        require_config(args, OPDConfig, type(self).__name__)
        teacher_model = self._named_teachers(teacher_model, model, args)
        reference_model = reference_model if reference_model is not None else args.reference_model_name_or_path
        self._check_reference(reference_model, model, args)
        check_dataset(train_dataset, rollouts_per_step(args))
        check_stream(train_dataset, args.updates_per_rollouts)
        check_eval_dataset(eval_dataset, eval_task, args.eval_strategy)
        self._open_run(args, eval_task)
        if eval_task is not None and eval_dataset is None:
            eval_dataset = eval_task.to_dataset()
        with loaded_whole():
            super().__init__(model, None, args, train_dataset, eval_dataset, *positional, **kwargs)
        self._check_student()
        self.health = HealthProbe(args.health_tokens, self.temperature)
        first = self._open_curriculum(teacher_model)
        self.vocab_size = self._shared_by_all(self._open_teachers(first, train_dataset, eval_task))
        self.reference_model = None if reference_model is None else self._prepare_frozen(reference_model, "reference")
        student = self.accelerator.unwrap_model(self.model)
        if self.reference_model is not None:
            reference = self.accelerator.unwrap_model(self.reference_model)
            shared = shared_vocab_size(student, reference, len(self.text_tokenizer), "reference")
            self.vocab_size = min(self.vocab_size, shared)
        self._mixture_head = None
        with in_use(self.teacher_model), in_use(self.reference_model):
            check_models(
                student,
                {"teacher": self.teacher_model, "reference": self.reference_model},
                generates=not self.use_vllm,
                decoding=args.decoding_roles,
            )
        self._open_rollouts()
        self._open_mixing()
        self._open_whole_answers()
        self._attach_run()
        self.add_callback(ManifestCallback(self.run_dir.root, partial(self._teacher_entries, teacher_model)))
        self.prune = PruneCallback(self) if args.rollout_horizon == "prune" else None
        self.horizon: HorizonCallback | None = None
        if args.rollout_horizon != "full":
            self.horizon = self.prune or HorizonCallback(self)
            self.add_callback(self.horizon)
        if args.curriculum != "none":
            self.add_callback(CurriculumCallback(self))
        if args.updates_per_rollouts > 1:
            self.add_callback(RolloutCycleCallback(self))

    def _named_teachers(self, teacher: Any, student: Any, args: OPDConfig) -> Any:
        """The teacher or teachers as paths or models other than the student."""
        for name, other in (("rollouts", "OfflineOPDTrainer"), ("teacher_server", "ServedOPDTrainer")):
            if (value := getattr(args, name)) is not None:
                raise ConfigError(f"{name}={value!r} is not read by OPDTrainer. Use {other}, or leave it out.")
        if teacher is None:
            teacher = args.teacher_sources or args.teacher_model_name_or_path
        if teacher is not None:
            teacher = given_teachers(teacher)
            args.check_teachers_given(sorted(teacher) if isinstance(teacher, Mapping) else None)
        sources = teacher.values() if isinstance(teacher, Mapping) else [teacher]
        if teacher is None or any(each is student and isinstance(student, PreTrainedModel) for each in sources):
            raise ConfigError(
                "OPDTrainer needs a separate teacher: expected a path or a model object other than the student, got "
                f"{'none' if teacher is None else 'the student object itself, which is trained'}. "
                "Pass teacher_model, or --teacher_model_name_or_path."
            )
        return teacher

    @staticmethod
    def _check_reference(reference, student, args: OPDConfig) -> None:
        if (reference is None) != (args.lambda_extrapolation == 1):
            raise ConfigError(
                f"lambda_extrapolation={args.lambda_extrapolation} "
                f"{'without' if reference is None else 'with'} a reference model: ExOPD needs a value other than 1 "
                "and a reference. Set --reference_model_name_or_path (the initial student, or the teacher's base "
                "before RL), or leave both out."
            )
        if reference is student and isinstance(student, PreTrainedModel):  # equal paths load two models
            raise ConfigError(
                "the reference model is the student object itself, which is trained: expected a frozen copy."
            )

    def _check_student(self) -> None:
        if self.args.on_sampled_tokens and self.tools:
            raise ConfigError(f"loss_type={self.args.loss_type!r} does not support tools; use loss_type='full'.")

    # -- sample → teacher → loss -------------------------------------------------------------------

    def distillation_loss(self, student, inputs, num_items):
        # On one process TRL's forward redirection replaces the forward that accelerate wrapped, so
        # without this autocast `bf16=True` silently trains in fp32; nesting it is harmless.
        # Compiled adapters are unwrapped because TRL checks the type and finds no backbone in them.
        student = getattr(student, "_orig_mod", student)
        with self.accelerator.autocast():
            return self._loss_of(student, inputs, num_items)

    def _loss_of(self, student, inputs, num_items):
        batch, training = token_batch(inputs), self.model.training
        multimodal = multimodal_inputs(inputs)
        due = training and self.health.due(self.state)
        if self.args.loss_type == "negative_advantage" and training and not due:
            parts = []  # the loss has no target
        else:
            parts = self._taught(inputs, batch, multimodal)
        reference = None
        if self.reference_model is not None and training:  # evaluation is against the teacher
            reference = self._frozen(self.reference_model, batch, multimodal)
        # last, so that offloaded weights are back in host memory when activations are saved
        h_student_BTH = self._hidden_states(student, *_columns(batch), **multimodal)
        head = Head.of(student, self.vocab_size)
        reference = reference and reference.to(head.weight.device)
        predictions = Predictions(h_student_BTH, head).to(head.weight.device)
        parts = [part._replace(teacher=part.teacher.to(head.weight.device)) for part in parts]
        mask_BT = batch.scored_BT & inputs["train_mask"] if training and "train_mask" in inputs else batch.scored_BT
        answers = Answers(
            inputs["completion_ids"], mask_BT, inputs.get("sampler_logps"), inputs.get(TOKEN_WEIGHT),
            inputs.get(TEACHER_SHARE),
        ).to(head.weight.device)  # fmt: skip
        if training:
            self.ledger.count("update", forward=batch.tokens)
            self.health.after_loss(student, predictions, self._measured_teacher(parts), answers, due=due)
            if self.prune is not None and parts:
                answers = self.prune.weigh(predictions, parts[0].teacher, answers)  # the only one
        loss, entropy, count = self._by_teacher(predictions, parts, reference, answers, num_items)
        if training and not bool(torch.isfinite(loss)):
            named = {part.label if part.label == ONLY else f"teacher '{part.label}'": part.teacher for part in parts}
            raise self._not_finite(student=predictions, **named)
        return loss, entropy.detach(), count

    def _hidden_states(self, model, ids_BL, mask_BL, keep, **multimodal) -> Tensor:
        """[B, T, H] at the last `keep` tokens, exact for rows of unequal length."""
        return completion_hidden_states(
            model, ids_BL, mask_BL, keep, multiple_of=self.pad_to_multiple_of, **multimodal
        )

    def _frozen(self, model, batch: TokenBatch, multimodal: dict[str, Any]) -> Predictions:
        """Predictions of the teacher or reference; in training both are charged as `teacher`."""
        category = "teacher" if self.model.training else "eval"
        model.eval()
        unwrapped = self.accelerator.unwrap_model(model)
        with self.ledger.track(category), torch.no_grad():
            hidden_BTH = inside_forward(
                model, unwrapped, self._hidden_states, unwrapped, *_columns(batch), **multimodal
            )
        self.ledger.count(category, forward=batch.tokens)
        return Predictions(hidden_BTH, Head.of(unwrapped, self.vocab_size))

    def _objective(self, student, teacher, reference, answers: Answers, num_items):
        """Loss, Σ student entropy and number of positions, for the flags of the objective.

        An evaluation without a task measures the plain objective: the sampled loss without baseline
        and with one token per prefix, or the full divergence.
        """
        args, training = self.args, self.model.training
        by_answer = args.loss_weighting == "answer"
        if args.loss_type == "sampled":
            variance = {
                "baseline": args.baseline, "baseline_top_k": args.baseline_top_k, "samples": args.samples_per_prefix,
            } if training else {}  # fmt: skip
            return sampled_loss(
                student.hidden_BTH, teacher.hidden_BTH, student.head, teacher.head, answers.ids_BT, answers.mask_BT,
                self.temperature, num_items, reference, args.lambda_extrapolation,
                sampler_logps_BT=answers.sampler_logps_BT if self.use_vllm else None, by_answer=by_answer,
                weight_BT=answers.weight_BT, teacher_share_B=answers.teacher_share_B, **variance,
            )  # fmt: skip
        if args.loss_type == "negative_advantage" and training:
            return negative_advantage_loss(
                student.hidden_BTH, student.head, answers.ids_BT, answers.mask_BT, self.temperature, num_items,
                size=args.negative_advantage, share=args.lowest_logp_share, by_entropy=args.entropy_advantage,
                by_answer=by_answer,
            )  # fmt: skip
        target = teacher if reference is None else self._mixture(teacher, reference)
        if args.loss_type == "teacher_top_k" and training:
            output, metrics = top_k_loss(
                student.hidden_BTH, target.hidden_BTH, student.head, target.head, answers.ids_BT, answers.mask_BT,
                self.temperature, num_items, top_k=args.teacher_top_k, entropy_share=args.highest_entropy_share,
                by_answer=by_answer, weight_BT=answers.weight_BT,
            )  # fmt: skip
            log_metrics(self, {f"health/{name}": value for name, value in metrics.items()})
            return output
        loss, entropy, count = full_loss(
            student.hidden_BTH, target.hidden_BTH, student.head, target.head, answers.mask_BT, self.beta,
            self.temperature, num_items, by_answer=by_answer, weight_BT=answers.weight_BT,
        )  # fmt: skip
        return loss * interior_factor(self.beta) if args.normalize_beta else loss, entropy, count

    def _not_finite(self, **models: Predictions | None) -> NonFiniteLossError:
        """Error that names the models with non-finite hidden states; the host would train on."""
        bad = [role for role, made in models.items() if made is not None and not made.finite()]
        return NonFiniteLossError(
            f"the loss of step {self.state.global_step + 1} is not finite; hidden states that are not finite: "
            f"{' and '.join(bad) or 'none, so the loss itself overflowed'}. Nothing was updated in this step. "
            "Check the weights and the dtype of that model (float16 overflows earlier than bfloat16), or lower the "
            "learning rate and resume from the last checkpoint."
        )

    @torch.no_grad()
    def _mixture(self, teacher: Predictions, reference: Predictions) -> Predictions:
        """ExOPD's target as the predictions of one frozen model, in place of the teacher's."""
        weight, dtype = self.args.lambda_extrapolation, kernel_dtype(teacher.hidden_BTH)
        if self._mixture_head is None:
            self._mixture_head = mixture_head(teacher.head, reference.head, weight, dtype)
        hidden_BTH = mixture_hidden(
            teacher.hidden_BTH, reference.hidden_BTH, teacher.head, reference.head, weight, dtype
        )
        return Predictions(hidden_BTH, self._mixture_head)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch; measures health after the last one of an optimizer step."""
        output = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            log_metrics(self, self.health.after_step(self._heads))
        return output

    def _heads(self) -> tuple[Head, Head | None]:
        student, teacher = self.accelerator.unwrap_model(self.model), self.teacher_model
        other = None if teacher is None else Head.of(self.accelerator.unwrap_model(teacher), self.vocab_size)
        return Head.of(student, self.vocab_size), other

    # -- evaluation --------------------------------------------------------------------------------

    def _measure_task(self, task: Task) -> tuple[dict[str, float], int]:
        return evaluate_trainer(self, task, self.teacher_model if self.teachers is None else self.teachers)


def _columns(batch: TokenBatch) -> tuple[Tensor, Tensor, int]:
    """Ids, mask and number of answer columns, the arguments of a forward."""
    return batch.ids_BL, batch.mask_BL, batch.scored_BT.shape[1]
