"""Stored rollouts: a folder of Parquet files with answers and log-probabilities, and its header.

    DIR/header.json               what the rollouts are: models, tokenizer, task, sampling settings
    DIR/rollouts-00000.parquet    one row per prompt; the header is repeated in the file's metadata

Files are written atomically, one after another. An interrupted `effopd cache` writes the files that
are missing or have no readable footer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from effopd.common.files import write_atomically
from effopd.errors import CheckpointError

logger = logging.getLogger(__name__)

HEADER_FILE = "header.json"
#: Version of the format.
FORMAT = 1
_HEADER_KEY, _COSTS_KEY = b"effopd_header", b"effopd_costs"
#: Reasons for which an answer ends: an end token, or the length limit.
REASONS = ("stop", "length")
#: Models that can sample the answers.
SAMPLERS = ("student", "teacher")

_SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("prompt_ids", pyarrow.list_(pyarrow.int32())),
        ("completion_ids", pyarrow.list_(pyarrow.int32())),
        ("finish_reason", pyarrow.string()),
        ("teacher_logprobs", pyarrow.list_(pyarrow.float32())),
        ("student_logprobs", pyarrow.list_(pyarrow.float32())),
        ("teacher_topk_ids", pyarrow.list_(pyarrow.int32())),
        ("teacher_topk_logprobs", pyarrow.list_(pyarrow.float32())),
        ("score", pyarrow.float32()),
    ]
)


@dataclass(frozen=True)
class ModelIdentity:
    """A model of the rollouts: name as given, revision, and fingerprint of its weights."""

    name: str
    revision: str | None
    sha256: str

    def is_same(self, other: ModelIdentity) -> bool:
        """Whether both have the same weights; without both, the same name and revision."""
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return (self.name, self.revision or "main") == (other.name, other.revision or "main")


@dataclass(frozen=True)
class Header:
    """Origin of stored rollouts.

    Attributes:
        teacher: the model that scored every token.
        student: π_ref, the student at the start of training; it samples unless the teacher does.
        sft_teacher: the model that wrote the student's supervised data; `None`: not stated.
        tokenizer: SHA-256 of the vocabulary.
        vocab_size: number of token ids that both models have.
        temperature: sampling temperature; both log-probabilities are at this temperature.
        max_completion_length: token limit of an answer.
        seed, batch_size, dtype: with the prompts, these determine the sampled answers.
        top_k: number of teacher tokens stored per position; 0: none.
        prompts: number of prompts.
        prompts_sha256: SHA-256 of all prompt ids.
        rows_per_file: rows per Parquet file.
        task: settings of the task that the prompts are from.
        sampler: one of `SAMPLERS`; answers of the teacher (traces) are graded.
        format: version of this format.
    """

    teacher: ModelIdentity
    student: ModelIdentity
    sft_teacher: ModelIdentity | None
    tokenizer: str
    vocab_size: int
    temperature: float
    max_completion_length: int
    seed: int
    batch_size: int
    dtype: str
    top_k: int
    prompts: int
    prompts_sha256: str
    rows_per_file: int
    task: Mapping[str, Any] = field(default_factory=dict)
    sampler: str = "student"
    format: int = FORMAT

    @property
    def files(self) -> int:
        """Number of Parquet files of complete rollouts."""
        return math.ceil(self.prompts / self.rows_per_file)

    @property
    def one_teacher(self) -> bool | None:
        """Whether the teacher also wrote the student's supervised data; `None`: not stated."""
        return None if self.sft_teacher is None else self.teacher.is_same(self.sft_teacher)

    def to_json(self) -> str:
        """The header as JSON, with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, source: Path) -> Header:
        """Inverse of `to_json`.

        Raises:
            CheckpointError: the text is not a header of this format.
        """
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise CheckpointError(
                    f"{source}: the rollouts have format {values['format']!r}, expected {FORMAT}. Read them with the "
                    "version of effopd that wrote them, or collect them again with effopd cache."
                )
            for name in ("teacher", "student", "sft_teacher"):
                values[name] = None if values[name] is None else ModelIdentity(**values[name])
            header = cls(**values)
            if header.teacher is None or header.student is None or header.sampler not in SAMPLERS:
                raise ValueError("no teacher, student or sampler")
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{source} is not the header of stored rollouts ({error!r}): expected a file that effopd cache wrote. "
                "Collect the rollouts again."
            ) from error
        return header

    def differences(self, other: Header) -> list[str]:
        """`field mine → other's` of every field that differs."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [f"{name} {_shown(mine)} → {_shown(theirs)}" for name, mine, theirs in pairs if mine != theirs]


def _shown(value: Any) -> str:
    if isinstance(value, ModelIdentity):
        return f"{value.name} ({value.sha256[:8]})"
    return f"{value[:8]}…" if isinstance(value, str) and len(value) == 64 else str(value)


@dataclass(frozen=True)
class CollectCosts:
    """Cost of collecting rollouts: seconds, sampled tokens, and tokens in forward passes.

    `cpu_seconds` are those of the collecting process; 0 in rollouts of older versions.
    """

    seconds: float = 0.0
    generated_tokens: int = 0
    student_forward_tokens: int = 0
    teacher_forward_tokens: int = 0
    cpu_seconds: float = 0.0

    def __add__(self, other: CollectCosts) -> CollectCosts:
        return CollectCosts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class StoredRollout:
    """One answer of length T with its log-probabilities in nats.

    Attributes:
        id: id of the example.
        prompt_ids, completion_ids: token ids as sampled, including the end token if there is one.
        finish_reason: `stop` (end token) or `length` (cut at the limit).
        teacher_logprobs, student_logprobs: log q(y_t) and log π_ref(y_t), [T].
        teacher_topk_ids, teacher_topk_logprobs: the teacher's K likeliest tokens per position,
            flattened [T · K]; empty without top-K.
        score: the verifier's score in [0, 1]; `None`: not graded.
    """

    id: str
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    finish_reason: str
    teacher_logprobs: Sequence[float]
    student_logprobs: Sequence[float]
    teacher_topk_ids: Sequence[int] = ()
    teacher_topk_logprobs: Sequence[float] = ()
    score: float | None = None


def prompts_sha256(prompts: Sequence[Sequence[int]]) -> str:
    """SHA-256 of prompt ids, in order."""
    return hashlib.sha256(json.dumps([list(map(int, ids)) for ids in prompts]).encode()).hexdigest()


class RolloutStore:
    """A folder of stored rollouts.

    Args:
        folder: the folder; it need not exist.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def part(self, index: int) -> Path:
        """Path of a Parquet file."""
        return self.folder / f"rollouts-{index:05d}.parquet"

    @property
    def started(self) -> bool:
        """Whether the folder has a header."""
        return (self.folder / HEADER_FILE).is_file()

    def header(self) -> Header:
        """The header.

        Raises:
            CheckpointError: the folder or its header is missing or damaged.
        """
        file = self.folder / HEADER_FILE
        if not file.is_file():
            kind = "has no rollouts" if self.folder.is_dir() else "is not a folder"
            raise CheckpointError(
                f"--rollouts {self.folder} {kind}: expected a folder that effopd cache wrote, with {HEADER_FILE} "
                "and rollouts-*.parquet."
            )
        try:
            return Header.from_json(file.read_bytes(), file)
        except OSError as error:
            raise error if isinstance(error, CheckpointError) else CheckpointError(f"{file}: {error}") from error

    def missing(self, header: Header) -> list[int]:
        """Numbers of the files that are not written, or whose footer cannot be read.

        A power failure can leave an empty file or a part of one. Only footers are read.
        """
        return [index for index in range(header.files) if not _has_footer(self.part(index))]

    def open(self, header: Header) -> int:
        """Create the folder, or continue in one with an equal header.

        Files without a readable footer are reported; `write` replaces them.

        Returns:
            The number of rows in the files that are written.

        Raises:
            CheckpointError: the folder has rollouts with another header, or other files.
        """
        if self.started:
            self.check_same(header)
        else:
            self.check_new()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / HEADER_FILE, lambda path: path.write_text(header.to_json()))
        missing, rows = self.missing(header), header.rows_per_file
        for file in filter(Path.is_file, map(self.part, missing)):
            logger.warning("%s is empty or cut short, so its rollouts are sampled again.", file)
        return header.prompts - sum(min(rows, header.prompts - index * rows) for index in missing)

    def check_new(self) -> None:
        """Check that the folder does not exist or is empty.

        Raises:
            CheckpointError: it is a file or has files.
        """
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise CheckpointError(
                f"--output_dir {self.folder} exists and has no {HEADER_FILE}: expected a new or empty folder, or "
                "rollouts to continue. Choose another folder. Nothing was changed."
            )

    def check_same(self, header: Header) -> None:
        """Check that the folder's header equals `header`.

        Raises:
            CheckpointError: it differs; the message lists the fields.
        """
        if differences := self.header().differences(header):
            raise CheckpointError(
                f"{self.folder} has rollouts with other settings: {', '.join(differences)}. Use those settings to "
                "continue, or another --output_dir. Nothing was changed."
            )

    def write(self, index: int, header: Header, rows: Sequence[StoredRollout], costs: CollectCosts) -> None:
        """Write one file atomically, with header and costs in its metadata."""
        table = pyarrow.Table.from_pylist([asdict(row) for row in rows], schema=_SCHEMA)
        metadata = {_HEADER_KEY: header.to_json().encode(), _COSTS_KEY: json.dumps(asdict(costs)).encode()}
        table = table.replace_schema_metadata(metadata)
        write_atomically(self.part(index), lambda path: pyarrow.parquet.write_table(table, path))

    def read(self, header: Header | None = None) -> tuple[list[StoredRollout], CollectCosts]:
        """All rollouts, in order, and the cost of collecting them.

        Raises:
            CheckpointError: files are missing or damaged, or rows do not fit the header.
        """
        header = header or self.header()
        if missing := self.missing(header):
            first, there = self.part(missing[0]), header.files - len(missing)
            fault = "is damaged (empty or cut short)" if first.is_file() else "is missing"
            raise CheckpointError(
                f"--rollouts {self.folder} is incomplete: {first.name} {fault}, {there} of {header.files} files are "
                "there. Run the same effopd cache command again; it writes the others."
            )
        rows: list[StoredRollout] = []
        costs = CollectCosts()
        for index in range(header.files):
            part, cost = self._read(index, header)
            rows += part
            costs += cost
        if len(rows) != header.prompts or prompts_sha256([row.prompt_ids for row in rows]) != header.prompts_sha256:
            raise CheckpointError(
                f"--rollouts {self.folder}: the prompts are not those of its header ({len(rows)} rows, expected "
                f"{header.prompts}). Collect the rollouts again."
            )
        return rows, costs

    def _read(self, index: int, header: Header) -> tuple[list[StoredRollout], CollectCosts]:
        file = self.part(index)
        try:
            table = pyarrow.parquet.read_table(file)
            metadata = table.schema.metadata or {}
            written = Header.from_json(metadata[_HEADER_KEY], file)
            costs = CollectCosts(**json.loads(metadata[_COSTS_KEY]))
            rows = [StoredRollout(**row) for row in table.to_pylist()]
        except CheckpointError:
            raise
        except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{file} is damaged ({type(error).__name__}: {error}): expected a file that effopd cache wrote. "
                "Delete it and run the same effopd cache command again."
            ) from error
        if differences := header.differences(written):
            raise CheckpointError(
                f"{file} belongs to other rollouts than {HEADER_FILE}: {', '.join(differences)}. Collect them again."
            )
        for number, row in enumerate(rows):
            if fault := _fault(row, header):
                raise CheckpointError(f"{file}, row {number}: {fault}. Collect the rollouts again.")
        return rows, costs


def _has_footer(file: Path) -> bool:
    """Whether a Parquet file has a readable footer, which is written last."""
    try:
        pyarrow.parquet.read_metadata(file)
    except (pyarrow.ArrowException, OSError):
        return False
    return True


def _fault(row: StoredRollout, header: Header) -> str:
    """The first way in which a row does not fit the header; "" if it fits."""
    length = len(row.completion_ids)
    ids = [*row.prompt_ids, *row.completion_ids, *row.teacher_topk_ids]
    values = [*row.teacher_logprobs, *row.student_logprobs, *row.teacher_topk_logprobs]
    if not row.prompt_ids or not 1 <= length <= header.max_completion_length:
        return f"expected a prompt and 1 to {header.max_completion_length} answer tokens, got {length}"
    if {len(row.teacher_logprobs), len(row.student_logprobs)} != {length}:
        return f"expected {length} log-probabilities of teacher and student"
    if {len(row.teacher_topk_ids), len(row.teacher_topk_logprobs)} != {length * header.top_k}:
        return f"expected the teacher's top {header.top_k} tokens at {length} positions"
    if not all(0 <= token < header.vocab_size for token in ids):
        return f"expected token ids from 0 to {header.vocab_size - 1}"
    if not all(value is not None and -math.inf < value <= 1e-3 for value in values):
        return "expected finite log-probabilities of at most 0"
    if (row.score is None) == (header.sampler == "teacher") or not 0 <= (row.score or 0) <= 1:
        return f"expected a score in [0, 1] for a teacher's answer and none for a student's, got {row.score!r}"
    return "" if row.finish_reason in REASONS else f"expected finish_reason stop or length, got {row.finish_reason!r}"
