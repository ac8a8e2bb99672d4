"""Check the server of a run's teacher before models are loaded, and describe it in a dry run."""

from __future__ import annotations

from typing import Any, NamedTuple

from effopd.distill.config import OPDConfig
from effopd.distill.served.checks import open_teacher, reachable
from effopd.distill.served.teacher import ServedTeacher
from effopd.launch.run_models import NamedModel


def served_teacher(opd: OPDConfig, tokenizer: Any, student: NamedModel, longest: int | None) -> ServedTeacher | None:
    """The teacher behind the run's server, after all checks; `None`: the run has no server.

    Args:
        tokenizer: the student's.
        longest: tokens of the longest prompt; `None`: not known.

    Raises:
        TeacherServerError, CompatibilityError, ConfigError: as `open_teacher`.
    """
    if not opd.served:
        return None
    return open_teacher(opd, tokenizer, student.meta.config.get_text_config().vocab_size, prompt=longest)


class ServedText(NamedTuple):
    """Words on a run's server for its plan.

    Attributes:
        row: the server, and whether it was checked.
        warning: what stands below the plan; "": nothing.
    """

    row: str
    warning: str = ""


def served_text(opd: OPDConfig, tokenizer: Any, student: NamedModel | None, longest: int | None) -> ServedText:
    """Row for the plan of a run; the server is checked if it answers.

    Args:
        tokenizer, student: `None`: not on disk, so the server is not checked.

    Raises:
        TeacherServerError, CompatibilityError, ConfigError: as `open_teacher`.
    """
    place = f"{opd.teacher_server}, top {opd.teacher_top_k} tokens; none in memory"
    if tokenizer is None or student is None:
        return ServedText(f"{place}; not checked (the student is not in a local folder)")
    if not reachable(opd):
        return ServedText(
            f"{place}; not checked (no answer from the server)",
            f"--teacher_server {opd.teacher_server} does not answer, so its model, tokenizer and maximum length were "
            "not checked. Training would stop here. Start the server or correct the URL, then repeat the dry run.",
        )
    rows = student.meta.config.get_text_config().vocab_size
    teacher = open_teacher(opd, tokenizer, rows, prompt=longest)
    return ServedText(f"{teacher.model} at {place}; tokenizer, vocabulary and length checked")
