"""`TeachersMixin`: the part of `OPDTrainer` that loads teachers and splits batches by teacher."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effopd.distill.divergence import Answers, Predictions, item_count, multimodal_inputs, shared_vocab_size
from effopd.distill.scoring import token_batch
from effopd.distill.teachers.kept import kept_or_made, make_ahead
from effopd.distill.teachers.loading import teacher_loading, teacher_revision
from effopd.distill.teachers.manifest import ONLY, TeacherEntry, entry_of
from effopd.distill.teachers.offload import in_use, offload
from effopd.distill.teachers.settings import split_revision
from effopd.distill.teachers.several import (
    TEACHER_INDEX,
    Part,
    TeacherSet,
    check_task_labels,
    rows_by_teacher,
    teacher_logits,
)
from effopd.distill.teachers.sharding import check_sharding, shard_layers
from effopd.distill.trl_host.hooks import DistillationHooks
from effopd.distill.trl_host.models import frozen, release
from effopd.errors import ConfigError
from effopd.models.checks import check_models
from effopd.models.token_batch import TokenBatch
from effopd.tasks.base import Task

Source: TypeAlias = str | PreTrainedModel


class TeachersMixin(DistillationHooks):
    """Mixed into `OPDTrainer`.

    Attributes:
        teacher_model: the only teacher; `None` with several.
        teachers: the set of several teachers; `None` with one.
    """

    teacher_model: Any
    teachers: TeacherSet | None = None
    _evaluated_by: Any

    def _open_teachers(self, source: Source | Mapping[str, Source], train_dataset: Any, eval_task: Task | None) -> int:
        """Load and check the teacher or teachers; return the size of the vocabulary that all have.

        Raises:
            TaskError: rows of the training or evaluation set, or of `eval_task`, name none of
                several teachers.
            CompatibilityError: as `shared_vocab_size` and `check_models`.
        """
        student, size = self.accelerator.unwrap_model(self.model), len(self.text_tokenizer)
        if not isinstance(source, Mapping):
            self.teacher_model = self._prepare_frozen(source, "teacher")
            return shared_vocab_size(student, self.accelerator.unwrap_model(self.teacher_model), size)
        self.teacher_model = None
        self.teachers = TeacherSet(
            source,
            self.args.teacher_column,
            partial(self._prepare_frozen, role="teacher"),
            partial(release, self) if self.args.teachers_in_memory == "one" else None,
        )
        self._check_labels(train_dataset, "the training set")
        if eval_task is not None:
            check_task_labels(eval_task, self.teachers.labels, self.args.teacher_column)
        else:
            several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            for name, dataset in several.items():
                self._check_labels(dataset, f"the evaluation set {name}".strip())
        sizes = []
        for label in self.teachers.labels:
            model = self.accelerator.unwrap_model(self.teachers.model(label))
            sizes.append(shared_vocab_size(student, model, size, f"teacher '{label}'"))
            with in_use(model):
                check_models(student, {f"teacher '{label}'": model}, generates=False)
        return min(sizes)

    def _check_labels(self, dataset: Any, what: str) -> None:
        """Check that the rows of a data set with a length name one of the teachers."""
        if not hasattr(dataset, "__len__"):
            return
        assert self.teachers is not None
        known = {self.args.teacher_column.split(".")[0], self.args.teacher_column, "metadata"}
        columns = [name for name in dataset.column_names if name in known]
        self.teachers.check_rows(dataset.select_columns(columns) if columns else [{}] * len(dataset), what)

    def _prepare_frozen(self, source: Source, role: str) -> Any:
        """Load, freeze and place the teacher or the reference, in eval mode and its own dtype."""
        init = teacher_loading(self.args, self.args.teacher_model_init_kwargs or {})
        if role == "reference":
            init["revision"] = self.args.reference_model_revision or "main"
        elif self.args.curriculum_teachers and source != self._evaluated_by:
            init.pop("revision", None)  # of the teacher of evaluations
        elif self.args.teacher_model_init_kwargs is not None and not isinstance(source, str):
            raise ConfigError("teacher_model_init_kwargs is for a teacher given by path; got a model object.")
        elif not isinstance(source, str) and (changed := self.args.changed_loading()):
            raise ConfigError(
                f"{', '.join(changed)}: read only for a teacher given by path; got a model object. Load it as "
                "needed, or pass its path."
            )
        if self.args.teacher_shard:
            check_sharding(self)
        if role == "teacher" and isinstance(source, str):
            source, own = split_revision(source)
            init |= {"revision": own} if own else {}
        model = frozen(self, source, init, shard_layers if self.args.teacher_shard else None)
        return offload(model, self.accelerator) if self.args.teacher_offload else model

    def _teacher_entries(self, source: Source | Mapping[str, Source]) -> list[TeacherEntry]:
        """The run's teachers for its manifest."""
        unwrap = self.accelerator.unwrap_model
        revision = teacher_revision(self.args)
        if self.teachers is None:
            model = unwrap(self.teacher_model)
            stages = [
                entry_of(stage, name, model, revision if name == source else None)
                for stage, name in self.args.stage_teachers.items()
            ]
            return [entry_of(ONLY, source, model, revision), *stages]
        return [entry_of(label, self.teachers.sources[label], unwrap(self.teachers.model(label)), revision)
                for label in self.teachers.labels]  # fmt: skip

    # -- before the loss ---------------------------------------------------------------------------

    @property
    def predicts_ahead(self) -> bool:
        """Whether a search can make the teacher's predictions of a step for its loss, too.

        Losses on sampled tokens drop the step's rollouts after a jump, and the predictions with
        them.
        """
        return not self.args.on_sampled_tokens

    def predict_ahead(self, rollouts: dict[str, Any]) -> list[Part]:
        """The teacher's predictions for a micro-batch in training, kept for its loss.

        They are made as in the loss and charged as the teacher's, so the loss is the same bit for
        bit. Memory until the loss: one hidden state per answer token and padding, or the top k of
        a served teacher. An earlier step on the same micro-batch may have made them.
        """

        def make() -> list[Part]:
            with self.accelerator.autocast():
                return self._teacher_parts(token_batch(rollouts), multimodal_inputs(rollouts))

        return make_ahead(rollouts, make, self.ledger.uncharged)

    def _taught(self, rollouts: Mapping[str, Any], batch: TokenBatch, multimodal: Mapping[str, Any]) -> list[Part]:
        """The teacher's predictions for a micro-batch, as kept by an earlier reader or made now."""
        return kept_or_made(rollouts, lambda: self._teacher_parts(batch, multimodal), self.ledger.uncharged)

    # -- rows of a batch ---------------------------------------------------------------------------

    def make_rollouts(self, rows, sample):
        """Rollouts with the index of each row's teacher, if there are several."""
        output = super().make_rollouts(rows, sample)
        if self.teachers is not None:
            index = [self.teachers.index_of(row) for row in rows]
            output[TEACHER_INDEX] = torch.tensor(index, device=output["completion_ids"].device)
        return output

    def _teacher_parts(self, batch: TokenBatch, multimodal: Mapping[str, Any]) -> list[Part]:
        """The predictions of each row's teacher, one part per teacher."""
        if self.teachers is None:
            return [Part(ONLY, None, self._frozen(self.teacher_model, batch, multimodal))]
        if present := [name for name, value in multimodal.items() if value is not None]:
            raise ConfigError(
                f"--teachers reads text only, but the rollouts have {', '.join(present)}. Use one teacher."
            )
        assert batch.teacher_B is not None, "`make_rollouts` sets it"
        parts = []
        for index, rows_B in rows_by_teacher(batch.teacher_B):
            mine = batch.of_teacher(index)
            assert mine is not None, "rows_by_teacher yields teachers with rows"
            label = self.teachers.labels[index]
            parts.append(Part(label, rows_B, self._frozen(self.teachers.model(label), mine[0], {})))
        return parts

    def _measured_teacher(self, parts: list[Part]) -> Any:
        """Input of the health metrics: the teacher's predictions, or the logits of several."""
        if self.teachers is None or not parts:
            return parts[0].teacher if parts else None
        width = parts[0].teacher.hidden_BTH.shape[1]
        return lambda index_N: teacher_logits(parts, index_N, width, self.temperature)

    def _by_teacher(self, student: Predictions, parts: list[Part], reference, answers: Answers, num_items):
        """Sum of the objectives of all parts, each over its own rows; as `_objective`."""
        if len(parts) <= 1 or (self.args.loss_type == "negative_advantage" and self.model.training):
            return self._objective(student, parts[0].teacher if parts else None, reference, answers, num_items)
        if num_items is None:
            num_items = item_count(answers.mask_BT != 0, self.args.loss_weighting == "answer")
        head = student.head.whole()  # once on every rank: ranks can have different numbers of parts
        sums: list[Tensor] = []
        for part in parts:
            own = Predictions(part.of(student.hidden_BTH), head)
            logps_BT, weight_BT = (
                None if each is None else part.of(each) for each in (answers.sampler_logps_BT, answers.weight_BT)
            )
            rows = Answers(part.of(answers.ids_BT), part.of(answers.mask_BT), logps_BT, weight_BT)
            output = self._objective(own, part.teacher, None, rows, num_items)
            sums = list(output) if not sums else [a + b for a, b in zip(sums, output, strict=True)]
        return tuple(sums)
