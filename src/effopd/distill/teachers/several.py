"""Several teachers: a column of the data set names the teacher of each row.

    L = (1 / items) Σ_k Σ_{rows of teacher k} Σ_t D_t(student ‖ teacher k)

`items` is the number of tokens, or of answers, of the whole step, so every row has the weight that
it has with one teacher.

Shapes: B sequences, T answer tokens, N scored positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effopd.distill.divergence import AnswerKL, gathered
from effopd.distill.teachers.offload import in_use
from effopd.distill.trl_host.kernels import divergence_kernel
from effopd.errors import ConfigError, TaskError
from effopd.models.head import Head
from effopd.models.logit_path import LogitPath, logit_path, remember
from effopd.models.token_batch import TokenBatch
from effopd.tasks.base import Example, Task
from effopd.tasks.row_columns import field_of
from effopd.tasks.row_faults import ORIGIN

#: Key of the rows' teachers in a batch of rollouts: indices [B] into the sorted labels.
TEACHER_INDEX = "teacher_index"
#: Rows listed in an error.
_LISTED = 5


class TeacherSet:
    """The frozen teachers of a run by label, loaded at their first use.

    Args:
        sources: label → folder, Hub id or model.
        column: column or nested field of the rows that names the teacher.
        load: loads and places a teacher.
        release: forgets a placed teacher. `None`: all teachers stay in memory.

    Attributes:
        labels: sorted, so that indices do not depend on the order of the settings.
        loads: number of calls of `load` so far.

    Raises:
        ConfigError: one teacher at a time is wanted, and a source is a model object.
    """

    def __init__(
        self,
        sources: Mapping[str, str | PreTrainedModel],
        column: str,
        load: Callable[[str | PreTrainedModel], Any],
        release: Callable[[Any], None] | None = None,
    ):
        self.sources, self.column = dict(sources), column
        self.labels = tuple(sorted(sources))
        self.loads = 0
        self._load, self._release = load, release
        self._loaded: dict[str, Any] = {}
        self._paths: dict[str, LogitPath] = {}
        objects = [label for label, source in sources.items() if not isinstance(source, str)]
        if objects and release is not None:
            raise ConfigError(
                f"teachers_in_memory='one' needs teachers given by path, got model objects for {', '.join(objects)}. "
                "Pass paths, or use 'all'."
            )

    def model(self, label: str) -> Any:
        """The teacher `label`, as the trainer placed it."""
        if label not in self._loaded:
            if self._release is not None:
                for other in list(self._loaded):
                    self._paths[other] = logit_path(self._loaded[other])
                    self._release(self._loaded.pop(other))
                gc.collect()  # models are in reference cycles
            self._loaded[label] = self._load(self.sources[label])
            self.loads += 1
            if label in self._paths:
                remember(self._loaded[label], self._paths[label])
        return self._loaded[label]

    def index_of(self, row: Mapping[str, Any], origin: str = "a row") -> int:
        """Index of a row's teacher among `labels`.

        Args:
            row: row of a data set; columns of a `Task` are also read from its `metadata`.

        Raises:
            TaskError: the row names no teacher, or an unknown one.
        """
        label = _text(_field(row, self.column))
        if label not in self.sources:
            raise TaskError(_unknown([f"{origin}: {_said(label)}"], self.column, self.labels))
        return self.labels.index(label)

    def check_rows(self, rows: Iterable[Mapping[str, Any]], what: str) -> None:
        """Check that every row names one of the teachers.

        Raises:
            TaskError: rows do not; the message lists their numbers.
        """
        found = ((f"row {n} of {what}", _field(row, self.column)) for n, row in enumerate(rows))
        _check_labels(found, self.labels, self.column)

    def indices(self, examples: Sequence[Example]) -> list[int]:
        """Indices of the teachers of a task's examples."""
        return [self.index_of(example.metadata, str(example.metadata.get(ORIGIN, example.id))) for example in examples]


def check_task_labels(task: Task, labels: Sequence[str], column: str) -> None:
    """Check that every example of a task names one of the teachers.

    Raises:
        TaskError: examples do not; the message lists the rows of their file.
    """
    rows = ((str(each.metadata.get(ORIGIN, each.id)), field_of(dict(each.metadata), column)) for each in task.examples)
    _check_labels(rows, labels, column)


def _check_labels(rows: Iterable[tuple[str, Any]], labels: Sequence[str], column: str) -> None:
    """Check pairs (origin, label)."""
    bad = [f"{origin}: {_said(_text(label))}" for origin, label in rows if _text(label) not in labels]
    if bad:
        raise TaskError(_unknown(bad, column, sorted(labels)))


def _unknown(bad: Sequence[str], column: str, labels: Iterable[str]) -> str:
    more = f", and {len(bad) - _LISTED} more rows" if len(bad) > _LISTED else ""
    return (
        f"column '{column}' must name one of the teachers {', '.join(labels)}; got {'; '.join(bad[:_LISTED])}{more}. "
        "Correct the rows, add the teacher to --teachers, or name another column with --teacher_column."
    )


def _field(row: Mapping[str, Any], column: str) -> Any:
    value = field_of(dict(row), column)
    if value is None and isinstance(row.get("metadata"), str):
        value = field_of(json.loads(row["metadata"]), column)
    return value


def _text(label: Any) -> str | None:
    return None if label is None or isinstance(label, bool) or not isinstance(label, str | int) else str(label)


def _said(label: str | None) -> str:
    return "no teacher" if label is None else repr(label)


# -- training --------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Rows of a batch with the same teacher, and its predictions for them.

    Attributes:
        label: the teacher.
        rows_B: indices of the rows. `None`: all rows.
        teacher: predictions for these rows [rows, T, H], or the top k of a served teacher.
    """

    label: str
    rows_B: Tensor | None
    teacher: Any

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor [B, …]."""
        return tensor if self.rows_B is None else tensor[self.rows_B.to(tensor.device)]


def rows_by_teacher(index_B: Tensor) -> Iterator[tuple[int, Tensor | None]]:
    """(index of a teacher, its rows) in the order of the indices; `None`: all rows are its own."""
    for index in sorted(set(index_B.tolist())):
        rows_B = (index_B == index).nonzero()[:, 0]
        yield index, None if len(rows_B) == len(index_B) else rows_B


@torch.no_grad()
def teacher_logits(parts: Sequence[Part], index_N: Tensor, width: int, temperature: float) -> Tensor:
    """Each row's own teacher's float32 logits [N, V] at flat indices into B·T positions.

    Args:
        width: T.
    """
    row_N, out = index_N // width, None
    for part in parts:
        if part.rows_B is None:
            return part.teacher.head.logits(part.teacher.hidden_BTH.flatten(0, 1)[index_N], temperature)
        mine_N = torch.isin(row_N, part.rows_B.to(row_N.device))
        local_N = torch.searchsorted(part.rows_B.to(row_N.device), row_N[mine_N])
        hidden_NH = part.teacher.hidden_BTH[local_N, (index_N % width)[mine_N]]
        logits_NV = part.teacher.head.logits(hidden_NH, temperature)
        out = logits_NV.new_zeros(len(index_N), logits_NV.shape[1]) if out is None else out
        out[mine_N] = logits_NV
    assert out is not None, "a batch has at least one teacher"
    return out


# -- scores ----------------------------------------------------------------------------------------


class Answered(NamedTuple):
    """A teacher's hidden states at its positions of a batch, and its output layer.

    Attributes:
        index_N: its positions among the scored positions of the batch.
        hidden_NH: hidden states there.
    """

    label: str
    index_N: Tensor
    hidden_NH: Tensor
    head: Head


@torch.no_grad()
def answered(
    teachers: TeacherSet, unwrap: Callable, batches: Sequence[TokenBatch], vocab: int
) -> list[list[Answered]]:
    """Every teacher's answers to its own rows, per batch; each teacher is loaded at most once."""
    made: list[list[Answered]] = [[] for _ in batches]
    for index, label in enumerate(teachers.labels):
        own = ((b, batch.of_teacher(index)) for b, batch in enumerate(batches))
        mine = [(b, *rows) for b, rows in own if rows is not None]
        if not mine:
            continue
        model = unwrap(teachers.model(label))
        model.eval()
        with in_use(model):
            for b, batch, index_N in mine:
                made[b].append(Answered(label, index_N, batch.hidden(model), Head.of(model, vocab)))
    return made


def answered_in(part: Part, batch: TokenBatch, index: int) -> Answered | None:
    """A teacher's answers to its rows of `batch`; `None`: it has none there.

    Args:
        part: its predictions for a micro-batch, of which `batch` is the first rows.
        index: the teacher's index.
    """
    own = batch.of_teacher(index)
    if own is None:
        return None
    rows, index_N = own
    hidden_BTH = part.teacher.hidden_BTH
    hidden_NH = hidden_BTH[: len(rows.ids_BL)][rows.scored_BT.to(hidden_BTH.device)]
    return Answered(part.label, index_N, hidden_NH, part.teacher.head)


@torch.no_grad()
def divergences_by_teacher(
    student: Any, batches: Sequence[TokenBatch], targets: Sequence[Sequence[Answered]], *, vocab_size: int,
    beta: float, temperature: float, keep: list[Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Exact divergence D [N], in nats, of each scored position from its own row's teacher.

    Args:
        targets: result of `answered`.
        keep: the student's hidden states of each batch are appended to it, if it is a list.
    """

    def measure() -> list[Tensor]:
        values = []
        for batch, parts in zip(batches, targets, strict=True):
            hidden_NH = batch.hidden(student)
            if keep is not None:
                keep.append(hidden_NH)
            head, value_N = Head.of(student, vocab_size), hidden_NH.new_zeros(len(hidden_NH), dtype=torch.float32)
            for part in parts:
                index_N = part.index_N.to(hidden_NH.device)
                value_N[index_N] = divergence_kernel(
                    hidden_NH[index_N], head, part.hidden_NH.to(hidden_NH.device), part.head, beta, temperature
                )[0].to(value_N.dtype)
            values.append(value_N)
        return values

    return gathered(student, measure)


@torch.no_grad()
def kl_sums_by_teacher(
    student: Any, teachers: TeacherSet, unwrap: Callable, index: Sequence[int], prompts: Sequence[list[int]],
    answers: Sequence[list[int]], *, vocab_size: int, pad_token_id: int, temperature: float, batch_size: int,
    horizon: int = 0,
) -> list[AnswerKL]:  # fmt: skip
    """Reverse KL of each answer from its own teacher, and its part beyond `horizon` tokens.

    Args:
        index: indices of the rows' teachers. Rows are batched by teacher, so that few batches need
            several.
    """
    order = sorted(range(len(index)), key=lambda i: index[i])
    sums = [AnswerKL()] * len(index)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = TokenBatch.of([prompts[i] for i in rows], [answers[i] for i in rows], pad_token_id)
        batch = batch.with_teachers(torch.tensor([index[i] for i in rows]))
        targets = answered(teachers, unwrap, [batch], vocab_size)
        (value_N,) = divergences_by_teacher(
            student, [batch], targets, vocab_size=vocab_size, beta=1.0, temperature=temperature
        )
        for i, *each in zip(rows, batch.sums(value_N), batch.sums(value_N, horizon), strict=True):
            sums[i] = AnswerKL(*each)
    return sums
