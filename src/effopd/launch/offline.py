"""Check stored rollouts against the settings of a run, before models are loaded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from trl import ModelConfig

from effopd.distill.config import OPDConfig
from effopd.distill.mixing import read_traces
from effopd.distill.offline_store import CollectCosts, Header, ModelIdentity, RolloutStore, StoredRollout
from effopd.distill.offline_trainer import check_look_ahead, check_sampling, trained_rows
from effopd.distill.scoring import rollouts_per_step
from effopd.distill.teachers.loading import teacher_revision
from effopd.errors import CompatibilityError, ConfigError
from effopd.extrapolate.config import EffOPDConfig
from effopd.launch.prompts import evaluates
from effopd.launch.run_models import loading_arguments
from effopd.models.fingerprint import model_folder, tokenizer_sha256, weights_sha256

logger = logging.getLogger(__name__)


class Stored(NamedTuple):
    """Rollouts that were read and fit the run: header, rows, and the cost of collecting them."""

    header: Header
    rows: list[StoredRollout]
    costs: CollectCosts

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(row.prompt_ids) for row in self.rows)


def check_offline_settings(opd: OPDConfig, effopd: EffOPDConfig) -> Header | None:
    """Header of the run's rollouts, after the checks that need nothing else; `None`: none.

    Raises:
        CheckpointError: the folder has no rollouts.
        ConfigError: the sampling settings or the look-ahead do not fit, or a teacher for
            evaluations has none.
    """
    if opd.rollouts is None:
        return None
    check_look_ahead(effopd)
    if opd.evaluation_teacher and not evaluates(opd):
        raise ConfigError(
            "evaluation_teacher=True, but this run has no evaluations. Set --eval_strategy, or leave out "
            "--evaluation_teacher."
        )
    header = RolloutStore(opd.rollouts).header()
    check_sampling(opd, header)
    return header


def stored_rollouts(model: ModelConfig, opd: OPDConfig, tokenizer: Any, *, network: bool) -> Stored | None:
    """The run's rollouts, after all checks; `None`: the run samples its own.

    Warns if the header names another model than the teacher for the student's supervised data,
    unless the run residualizes.

    Args:
        tokenizer: the student's; `None`: not available, so not compared.
        network: whether a student on the Hub may be downloaded to compare its weights.

    Raises:
        CheckpointError: the rollouts are incomplete or damaged.
        CompatibilityError: they belong to another student, teacher or tokenizer.
        ConfigError: there are fewer rollouts than a step takes.
    """
    if opd.rollouts is None:
        return None
    store = RolloutStore(opd.rollouts)
    header = store.header()
    if tokenizer is not None and tokenizer_sha256(tokenizer) != header.tokenizer:
        raise CompatibilityError(
            f"--rollouts {opd.rollouts} have another tokenizer than --model_name_or_path {model.model_name_or_path}, "
            f"so their token ids mean other tokens. Use the student that sampled them ({header.student.name}), or "
            "collect new rollouts with effopd cache."
        )
    if header.sampler == "student":  # traces fit any student
        _check_student(model, opd, header, network=network)
    _check_teacher(opd, header)
    rows, costs = store.read(header)
    rows = trained_rows(opd, rows)
    if len(rows) < rollouts_per_step(opd):
        raise ConfigError(
            f"a step takes {rollouts_per_step(opd)} rollouts, but --rollouts {opd.rollouts} has {len(rows)}"
            f"{' correct ones' if header.sampler == 'teacher' else ''}. Lower "
            "--per_device_train_batch_size or --gradient_accumulation_steps, or collect more."
        )
    if not opd.residualize:
        warn_of_teachers(header)
    return Stored(header, rows, costs)


def check_answers(opd: OPDConfig, tokenizer: Any) -> int:
    """Tokens of the longest prompt in the run's traces; 0: the run reads none.

    A run with `lmbda` < 1 needs answers for the steps that are not on-policy. The commands' tasks
    have reference answers, not completions, so the answers are traces.

    Raises:
        CheckpointError, CompatibilityError, ConfigError: see `read_traces`; or there are no traces.
    """
    if opd.lmbda == 1:
        return 0
    if opd.traces is None:
        raise ConfigError(
            f"lmbda={opd.lmbda:g} needs answers for the steps that are not on-policy. Collect them with effopd cache "
            "--sampled_by teacher and set --traces."
        )
    traces, _ = read_traces(opd, tokenizer)
    return max(len(each.prompt_ids) for each in traces)


def _check_student(model: ModelConfig, opd: OPDConfig, header: Header, *, network: bool) -> None:
    name = str(model.model_name_or_path)
    if not Path(name).is_dir() and not network:
        return
    revision = loading_arguments(model, opd)[0]["revision"]
    found = weights_sha256(model_folder("--model_name_or_path", name, revision))
    if found != header.student.sha256:
        raise CompatibilityError(
            f"--model_name_or_path {name} has other weights than the student that sampled --rollouts {opd.rollouts} "
            f"({header.student.name}; sha256 {found[:8]}…, expected {header.student.sha256[:8]}…). Offline training "
            "starts from that student. Use it, or collect rollouts of this one with effopd cache."
        )


def _check_teacher(opd: OPDConfig, header: Header) -> None:
    """Compare `teacher_model_name_or_path` with the rollouts' teacher.

    Its revision is compared if it is loaded, for evaluations.
    """
    name = opd.teacher_model_name_or_path
    if name is None:
        return
    sha256 = weights_sha256(Path(name)) if Path(name).is_dir() else ""
    revision = teacher_revision(opd) if opd.evaluation_teacher else header.teacher.revision
    if not ModelIdentity(name, revision, sha256).is_same(header.teacher):
        raise CompatibilityError(
            f"--teacher_model_name_or_path {name}{_at(revision)} is not the teacher that scored --rollouts "
            f"{opd.rollouts} ({header.teacher.name}{_at(header.teacher.revision)}, sha256 "
            f"{header.teacher.sha256[:8]}…). Leave the flag out, or collect rollouts "
            "scored by this teacher with effopd cache."
        )


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at revision {revision}"


def warn_of_teachers(header: Header) -> None:
    """Warn if the student's supervised data are by another model than the teacher.

    Traces are themselves supervised data by the teacher, so they need no check.
    """
    if header.sampler == "student" and header.one_teacher is False and header.sft_teacher is not None:
        logger.warning(
            "The teacher %s is not the model that wrote the student's supervised data (%s). Offline distillation "
            "assumes that they are the same: with different ones, arXiv 2604.13010 loses about twice the accuracy "
            "that online distillation loses. Score the rollouts with %s, or train with --residualize true.",
            header.teacher.name,
            header.sft_teacher.name,
            header.sft_teacher.name,
        )


def rollouts_text(stored: Stored, folder: str) -> str:
    """One line for the plan of a run."""
    header, costs = stored.header, stored.costs
    if header.sampler == "teacher":
        return (
            f"{folder}: {len(stored.rows):,} correct answers of {header.prompts:,} by {header.teacher.name}; "
            f"{costs.generated_tokens:,} tokens sampled, {costs.teacher_forward_tokens:,} teacher tokens"
        )
    known = {True: "wrote", False: "did not write", None: "is not known to have written"}[header.one_teacher]
    return (
        f"{folder}: {len(stored.rows):,} answers by {header.student.name}, scored by {header.teacher.name}, which "
        f"{known} the student's supervised data; {costs.generated_tokens:,} tokens sampled, "
        f"{costs.teacher_forward_tokens:,} teacher tokens"
    )
