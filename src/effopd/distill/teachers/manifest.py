"""Manifest of a run's teachers, `teachers.json`, in the run directory and in every checkpoint.

One entry per teacher: label, folder or Hub id, revision, dtype, quantization, and SHA-256 of its
weights. A resumed run must have the same teachers; a teacher that only moved to another folder is
the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from effopd.common.distributed import full_tensor, rank
from effopd.common.files import write_atomically
from effopd.distill.run_record import RecordCallback
from effopd.distill.teachers.settings import split_revision
from effopd.errors import CheckpointError, WeightsError
from effopd.models.fingerprint import model_folder, tensors_sha256, weights_sha256
from effopd.models.logit_path import core_of, is_whole
from effopd.runs.checkpoints import TEACHERS_FILE, reading

logger = logging.getLogger(__name__)

#: Label of the only teacher of a run.
ONLY = "teacher"


@dataclass(frozen=True)
class TeacherEntry:
    """One teacher of a run.

    Attributes:
        label: its name in the teacher column; "teacher" for the only one.
        name: folder or Hub id; "": a model object without one.
        revision: commit of a Hub repository, or the requested revision.
        dtype: dtype of its weights, without "torch."; "": not known.
        quantization: '8bit', '4bit' or `None`.
        sha256: SHA-256 of its weights: of the files, or in memory for a model object and for files
            other than safetensors. `None`: not measured.
    """

    label: str
    name: str
    revision: str | None
    dtype: str
    quantization: str | None
    sha256: str | None = None


def entry_of(label: str, source: Any, model: Any, revision: str | None = None) -> TeacherEntry:
    """The entry of a loaded teacher; only rank 0 hashes its weights.

    Args:
        source: the path, Hub id or model object that the run was given.
        revision: the requested revision, unless the source names its own.
    """
    core = core_of(model)
    if isinstance(source, str):
        source, own = split_revision(source)
        revision = own or revision
    name = source if isinstance(source, str) else str(getattr(core.config, "_name_or_path", "") or "")
    commit, sha256 = _commit_and_sha256(source, core, revision)
    eight, four = (getattr(core, f"is_loaded_in_{bits}bit", False) for bits in (8, 4))
    return TeacherEntry(
        label=label,
        name=name,
        revision=commit or revision,
        dtype=str(core.dtype).removeprefix("torch."),
        quantization="8bit" if eight else "4bit" if four else None,
        sha256=sha256,
    )


def _commit_and_sha256(source: Any, core: Any, revision: str | None) -> tuple[str | None, str | None]:
    """(commit of a Hub repository, SHA-256 of the weights); `None`: not known."""
    whole, commit = is_whole(core), None
    if not isinstance(source, str) and not whole:
        return None, live_sha256(core)  # collective
    if rank() > 0:
        return None, None
    if isinstance(source, str):
        folder = model_folder("the teacher", source, revision)
        commit = None if Path(source).is_dir() else folder.name  # the cache has a folder per commit
        try:
            return commit, weights_sha256(folder)
        except (CheckpointError, WeightsError):  # pickled or quantized files
            pass
    return commit, live_sha256(core) if whole else None


@torch.no_grad()
def live_sha256(model: Any) -> str:
    """SHA-256 of a model's tensors in memory (name, dtype, shape, bytes), sorted by name.

    Equal to `weights_sha256` of the folder that the model was loaded from in the stored dtype.
    With sharded weights, every rank must call this.
    """
    tensors = model.state_dict()
    embedding = model.get_input_embeddings().weight
    tied = {name for name, p in model.named_parameters(remove_duplicate=False) if p is embedding}
    names = sorted(tensors.keys() - set(sorted(tied, key=lambda each: "embed" not in each)[1:]))
    return tensors_sha256(
        (name, full_tensor(tensors[name])) for name in names if isinstance(tensors[name], torch.Tensor)
    )


def write_manifest(folder: Path, teachers: Sequence[TeacherEntry]) -> None:
    """Write `teachers.json` into a folder."""
    text = json.dumps({"teachers": [asdict(each) for each in teachers]}, indent=1)
    write_atomically(folder / TEACHERS_FILE, lambda path: path.write_text(text + "\n"))


def read_manifest(folder: Path) -> list[TeacherEntry] | None:
    """The teachers in a folder's `teachers.json`; `None`: it has none.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / TEACHERS_FILE
    if not path.is_file():
        return None
    with reading(folder, TEACHERS_FILE):
        return [TeacherEntry(**entry) for entry in json.loads(path.read_text())["teachers"]]


def check_same_teachers(checkpoint: Path, teachers: Sequence[TeacherEntry]) -> None:
    """Check that a checkpoint was written with these teachers; a warning if it has no manifest.

    Values that are not known on one side are not compared. Names and revisions can differ: the
    hash of the weights decides.

    Raises:
        CheckpointError: labels, weights, dtype or quantization differ; the message names them.
    """
    before = read_manifest(checkpoint)
    if before is None:
        if rank() == 0:
            logger.warning("%s has no %s, so its teacher was not compared with this run's.", checkpoint, TEACHERS_FILE)
        return
    old, new = ({each.label: each for each in entries} for entries in (before, teachers))
    problems = [f"teacher '{label}' is missing" for label in old.keys() - new.keys()]
    problems += [f"teacher '{label}' is new" for label in new.keys() - old.keys()]
    for label in (each for each in old if each in new):
        problems += _differences(label, asdict(old[label]), asdict(new[label]))
    if problems:
        raise CheckpointError(
            f"{checkpoint} was written with other teachers: {'; '.join(sorted(problems))}. Resume with the run's "
            f"teachers ({TEACHERS_FILE} in the checkpoint lists them), or start a new run from its weights: "
            f"--model_name_or_path {checkpoint} with another --output_dir."
        )


def _differences(label: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    hashed = old["sha256"] is not None and new["sha256"] is not None
    named = ("sha256", "dtype", "quantization") if hashed else ("dtype", "quantization")
    found = []
    for field in named:
        if old[field] != new[field] and "" not in (old[field], new[field]):
            values = (str(value)[:12] if field == "sha256" else value for value in (old[field], new[field]))
            before, now = values
            what = f"weights {before} ({old['name']}) → {now} ({new['name']})" if field == "sha256" else (
                f"{field} {before} → {now}"
            )  # fmt: skip
            found.append(f"teacher '{label}': {what}")
    return found


def planned_entries(sources: Mapping[str, str], dtype: str, quantization: str | None) -> list[TeacherEntry]:
    """Entries of a run whose teachers are not loaded, without hashes.

    Args:
        sources: label → folder or Hub id.
        dtype: name of the dtype; "auto": not known.
    """
    known = "" if dtype == "auto" else dtype
    return [TeacherEntry(label, name, None, known, quantization) for label, name in sources.items()]


class ManifestCallback(RecordCallback[Sequence[TeacherEntry]]):
    """Writes `teachers.json` into the run directory and its checkpoints, and compares it on resume.

    Args:
        root: the run directory.
        entries: returns the run's teachers.
    """

    def __init__(self, root: Path, entries: Callable[[], Sequence[TeacherEntry]]):
        super().__init__(root, entries, write_manifest, check_same_teachers)
