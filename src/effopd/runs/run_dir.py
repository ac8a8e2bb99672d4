"""The run directory: plain files, readable without this package and complete after a kill.

    config.yaml       the resolved settings; `effopd train --config` re-runs it
    metrics.jsonl     one row per logged step: losses, health, costs (`records.StepRecord`)
    searches.jsonl    one row per search: candidates, scores, verdicts (`records.SearchRecord`)
    evals.jsonl       one row per evaluation (`records.EvaluationRecord`)
    checkpoints/      step-000008/ … (HF format, with optimizer, RNG and look-ahead state)
    teachers.json     the teachers: name, revision, dtype, SHA-256; also in every checkpoint
    inputs.json       SHA-256 of prompts and initial weights; also in every checkpoint
    trajectory/       step-000008/ … (weights only, for analysis)
    README.md         the model card, beside the final model
    best.json         with load_best_model_at_end: step and metric of the final model
    report.html       written by `effopd report`
    superseded/       1/ … (files from beyond the step at which a run was resumed)

A checkpoint is written in `checkpoints/.staging` and renamed into place, so a folder with a final
name is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from effopd.common.files import fsync, takes_files, write_atomically
from effopd.errors import CheckpointError, ConfigError
from effopd.runs.best_model import Kept
from effopd.runs.checkpoints import TRAINER_STATE, check_complete
from effopd.runs.records import BEST, EVALS, METRICS, SEARCHES

_STEP = re.compile(r"step-(\d{6,})$")


def in_trajectory(rule: str, step: int, last: int) -> bool:
    """Whether the weights of `step` are kept for analysis in a run of `last` steps.

    Args:
        rule: `none`; `powers_of_two`: steps 0, 1, 2, 4, …; or a number N: steps 0, N, 2N, …. Both
            end with `last`.

    Raises:
        ConfigError: the rule is none of these.
    """
    if rule == "none":
        return False
    if rule == "powers_of_two":
        return step in (0, last) or step & (step - 1) == 0
    if not rule.isdecimal() or int(rule) < 1:
        raise ConfigError(
            f"trajectory must be 'none', 'powers_of_two' or a number of steps of at least 1; got {rule!r}."
        )
    return step == last or step % int(rule) == 0


class Held(NamedTuple):
    """Bytes that a resumed run already has on disk."""

    checkpoints: int = 0
    #: Weights only: the trajectory and the final model.
    models: int = 0
    #: Left by a killed save; the next save deletes it.
    leftover: int = 0


class RunDir:
    """Paths and atomic moves of one run directory.

    Attributes:
        settings: text of `config.yaml`, written when training starts; `None`: not written.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.settings: str | None = None

    @property
    def staging(self) -> Path:
        """Folder in which a checkpoint is written before it is renamed."""
        return self.root / "checkpoints" / ".staging"

    def checkpoint(self, step: int) -> Path:
        """`checkpoints/step-000008`."""
        return self.root / "checkpoints" / f"step-{step:06d}"

    def trajectory(self, step: int) -> Path:
        """`trajectory/step-000008`."""
        return self.root / "trajectory" / f"step-{step:06d}"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return self._steps("checkpoints")

    def _steps(self, kind: str) -> list[Path]:
        return sorted((p for p in (self.root / kind).glob("step-*") if _STEP.match(p.name)), key=_step_of)

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, if any."""
        return next(reversed(self.checkpoints()), None)

    def to_resume(self, argument: str | bool | None) -> Path | None:
        """The checkpoint of `resume_from_checkpoint`: for `True` the newest, if any; or that path.

        Raises:
            CheckpointError: the path is not a checkpoint, or lacks parts for an exact resume.
        """
        checkpoint = self.last_checkpoint() if argument is True else Path(argument) if argument else None
        if checkpoint is not None and not (checkpoint / TRAINER_STATE).is_file():
            raise CheckpointError(
                f"{checkpoint} is no checkpoint: expected a folder with {TRAINER_STATE}, for example "
                f"{self.checkpoint(8)}."
            )
        if checkpoint is not None:
            check_complete(checkpoint)
        return checkpoint

    def held(self, step: int) -> Held:
        """Bytes of the existing files that a run resumed from `step` keeps."""
        checkpoints, trajectory = (
            sum(_bytes(path.rglob("*")) for path in self._steps(kind) if _step_of(path) <= step)
            for kind in ("checkpoints", "trajectory")
        )
        final = _bytes(path for kind in ("model*.safetensors", "pytorch_model*.bin") for path in self.root.glob(kind))
        return Held(checkpoints, trajectory + final, _bytes(self.staging.rglob("*")))

    def fresh_staging(self) -> Path:
        """An empty staging folder; deletes leftovers of a killed save."""
        self.clear_staging()
        self.staging.mkdir(parents=True)
        return self.staging

    def clear_staging(self) -> None:
        """Delete the leftovers of a failed save."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def write_kept(self, kept: Kept | None) -> None:
        """Record the step of the final model in `best.json`; `None`: the last step, no file."""
        if kept is None:
            (self.root / BEST).unlink(missing_ok=True)
        else:
            write_atomically(self.root / BEST, lambda path: path.write_text(json.dumps(kept._asdict()) + "\n"))

    @staticmethod
    def publish(staged: Path, final: Path) -> None:
        """Flush every file of `staged` and rename it to `final`, replacing an existing folder."""
        for path in [*staged.rglob("*"), staged]:
            fsync(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        retired = final.with_name(f".old-{final.name}")
        shutil.rmtree(retired, ignore_errors=True)
        if final.exists():
            final.rename(retired)
        staged.rename(final)
        fsync(final.parent)
        shutil.rmtree(retired, ignore_errors=True)

    def rotate(self, limit: int | None, keep: Path | None) -> None:
        """Delete the oldest checkpoints beyond `limit`, as the host does.

        The newest one and `keep`, the best one, count but are never deleted, so `limit` 1 can leave
        two.
        """
        checkpoints = self.checkpoints()
        others = [path for path in checkpoints[:-1] if path != keep]
        for path in others[: max(0, len(checkpoints) - limit)] if limit else []:
            shutil.rmtree(path)

    def set_aside(self, step: int) -> Path | None:
        """Move an earlier run's folders beyond `step` to `superseded/N`, with copies of its rows.

        Called when a run resumes from `step`. The two runs do not mix, and nothing is lost.

        Returns:
            the folder; `None`: there was nothing to move.
        """
        later = [path for kind in ("checkpoints", "trajectory") for path in self._steps(kind) if _step_of(path) > step]
        if not later:
            return None
        number = 1 + max((int(p.name) for p in (self.root / "superseded").glob("*") if p.name.isdecimal()), default=0)
        aside = self.root / "superseded" / str(number)
        for name in (METRICS, SEARCHES, EVALS):
            if (self.root / name).exists():
                aside.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.root / name, aside / name)
        for path in later:
            target = aside / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        return aside

    def refuse_unwritable(self) -> None:
        """Check that the folder is writable or can be created, without writing anything.

        Raises:
            CheckpointError: the folder, or its nearest existing parent, is a file or is
                write-protected.
        """
        existing = next(path for path in (self.root.absolute(), *self.root.absolute().parents) if path.exists())
        if not existing.is_dir() or not takes_files(existing):
            why = "is write-protected" if existing.is_dir() else "is not a folder"
            raise CheckpointError(
                f"nothing can be written to the run directory {self.root}: {existing} {why}. Choose another "
                "--output_dir."
            )

    def used(self) -> list[str]:
        """Names of the rows, the newest checkpoint and the trajectory of a run that are here."""
        used = [n for n in (METRICS, EVALS) if (self.root / n).exists() and (self.root / n).stat().st_size]
        used += [path.name for path in self.checkpoints()[-1:]]
        return used + (["trajectory"] if (self.root / "trajectory").exists() else [])

    def refuse_overwrite(self) -> None:
        """Check that the directory is unused, so that two runs cannot mix their rows.

        Raises:
            CheckpointError: it already has rows, checkpoints or a trajectory.
        """
        if used := self.used():
            raise CheckpointError(
                f"{self.root} already holds a run ({', '.join(used)}). Resume it with --resume_from_checkpoint true, "
                "or choose another --output_dir (nothing was changed)."
            )


def step_of_checkpoint(checkpoint: Path) -> int:
    """The step at which a checkpoint was written."""
    return json.loads((checkpoint / TRAINER_STATE).read_text())["global_step"]


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())
