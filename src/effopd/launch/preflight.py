"""Checks of model names, tokenizers, tasks and disk space before any weights are loaded."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from effopd.errors import CheckpointError, CompatibilityError, ConfigError, TaskError
from effopd.models import files as model_files
from effopd.models.folders import check_hub_id, check_model_folder, refuse_adapter
from effopd.runs.run_dir import Held
from effopd.tasks import Task, check_prompt_lengths, check_verifier

logger = logging.getLogger(__name__)

#: Bytes per parameter in a checkpoint: fp32 weights, two Adam moments, the look-ahead's anchor.
_BYTES_PER_PARAMETER = {"weights": 4, "optimizer": 8, "anchor": 4}


def check_model_name(flag: str, name: str | None) -> None:
    """Check that a model name is an existing path or a valid Hub id. Nothing is read.

    Raises:
        ConfigError: the name is missing.
        CompatibilityError: the name is neither an existing path nor a valid Hub id.
    """
    if not name:
        raise ConfigError(f"{flag} is missing: expected a model folder or a Hub id.")
    if not Path(name).exists():
        check_hub_id(flag, name)


def load_tokenizer(student: str, **load: Any) -> PreTrainedTokenizerBase:
    """The student's tokenizer, with truncation on the left.

    A tokenizer without an end token gets the model's, because TRL pads rows with it.

    Raises:
        CompatibilityError: the tokenizer cannot be read.
    """
    tokenizer = model_files.load_tokenizer("the student", student, truncation_side="left", **load)
    if tokenizer.eos_token_id is None:
        for token in sorted(_declared_end_tokens(student, None, load.get("revision"))):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
            break
    return tokenizer


def check_models(
    student: str,
    teacher: str,
    tokenizer: PreTrainedTokenizerBase,
    revisions: tuple[str | None, str | None] = (None, None),
    **load: Any,
) -> None:
    """Check that student and teacher agree on tokenizer, end tokens and vocabulary.

    Args:
        student, teacher: model folders or Hub ids.
        revisions: revisions of the two on the Hub.
        load: passed to every `from_pretrained`, for example `trust_remote_code`.

    Raises:
        CompatibilityError: the tokenizers differ, no end token is shared, or a model has fewer
            vocabulary rows than the tokenizer has tokens.
    """
    configs = {}
    for role, name, revision in (("student", student, revisions[0]), ("teacher", teacher, revisions[1])):
        check_model_folder(f"the {role}", name)
        refuse_adapter(f"the {role}", name)
        with model_files.reading(f"the {role}", name):
            configs[role] = AutoConfig.from_pretrained(name, revision=revision, **load)
            rows = configs[role].get_text_config().vocab_size
        if rows < len(tokenizer):
            raise CompatibilityError(
                f"the {role} {name!r} has {rows} vocabulary rows, but the student's tokenizer has {len(tokenizer)} "
                "tokens: expected one row per token. Use a student and a teacher of the same family."
            )
    _check_tokenizers(teacher, tokenizer, {"revision": revisions[1], **load})
    _check_end_tokens(student, teacher, tokenizer, configs, revisions)


def _check_tokenizers(teacher: str, tokenizer: PreTrainedTokenizerBase, load: dict[str, Any]) -> None:
    # without these files `AutoTokenizer` returns an empty tokenizer of the model's type
    if all(
        cached_file(teacher, name, revision=load["revision"], _raise_exceptions_for_missing_entries=False) is None
        for name in ("tokenizer_config.json", "tokenizer.json")
    ):
        logger.warning(
            "The teacher %r has no tokenizer, so its agreement with the student's was not checked.", teacher
        )
        return
    with model_files.reading("the teacher", teacher):
        other = AutoTokenizer.from_pretrained(teacher, **load)
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours != theirs:
        different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        examples = ", ".join(f"{t!r} ({ours.get(t)} / {theirs.get(t)})" for t in different[:3])
        raise CompatibilityError(
            f"student and teacher {teacher!r} have different tokenizers: {len(different)} tokens have different ids, "
            f"for example (student / teacher) {examples}. Token-level distillation compares equal ids. Use a teacher "
            "of the student's family."
        )
    if tokenizer.chat_template and other.chat_template and tokenizer.chat_template != other.chat_template:
        logger.warning(
            "Student and teacher have different chat templates; prompts use the student's. If the teacher was "
            "trained with its own template, copy that one to the student's tokenizer."
        )


def _declared_end_tokens(name: str, config: Any, revision: str | None = None) -> set[int]:
    try:
        declared = GenerationConfig.from_pretrained(name, revision=revision or "main").eos_token_id
    except (OSError, ValueError):
        declared = getattr(config, "eos_token_id", None)
    return set(declared if isinstance(declared, list) else [declared]) - {None}


def _check_end_tokens(
    student: str,
    teacher: str,
    tokenizer: PreTrainedTokenizerBase,
    configs: Mapping[str, Any],
    revisions: tuple[str | None, str | None],
) -> None:
    ours = _declared_end_tokens(student, configs["student"], revisions[0]) | {tokenizer.eos_token_id} - {None}
    theirs = _declared_end_tokens(teacher, configs["teacher"], revisions[1]) or ours
    if not ours:
        raise CompatibilityError(
            f"the student {student!r} has no end token, so its answers never end: expected `eos_token_id` in its "
            "generation config or an eos_token in its tokenizer."
        )
    if not ours & theirs:
        raise CompatibilityError(
            f"student and teacher end their answers with different tokens: {sorted(ours)} and {sorted(theirs)}. The "
            "teacher never predicts the student's end token, so the student would unlearn to stop. Set the same "
            "`eos_token_id` in both generation configs."
        )
    if ours != theirs:
        logger.warning("End tokens differ: student %s, teacher %s. Watch the share of cut answers.", ours, theirs)


def check_task(
    task: Task,
    tokenizer: PreTrainedTokenizerBase | None,
    max_prompt_length: int | None,
    template: Mapping[str, Any] | None = None,
    *,
    graded: bool = True,
) -> int | None:
    """Check prompt lengths and, if there are answers, the verifier on right and wrong answers.

    Args:
        tokenizer: the student's. `None`: prompt lengths are not measured.
        template: arguments of the chat template.
        graded: whether completions are graded. If not, the verifier is not checked.

    Returns:
        Length of the longest prompt in tokens. `None`: not measured.

    Raises:
        TaskError: the task has no examples, a prompt is too long, chat prompts have no chat
            template, or the verifier does not separate right from wrong answers.
    """
    if not task.examples:
        raise TaskError(f"task '{task.name}' has no examples: expected at least one prompt.")
    lengths = {} if tokenizer is None else check_prompt_lengths(task, tokenizer, max_prompt_length, template)
    if graded and task.verifiable:
        check_verifier(task)
    return max(lengths.values(), default=None)


def check_disk(
    output_dir: str | Path,
    parameters: int,
    *,
    checkpoints: int,
    models: int = 0,
    optimizer: bool = True,
    copies: int = 0,
    effopd: bool,
    held: Held | None = None,
) -> None:
    """Check that the disk has room for the checkpoints and models of a run.

    Args:
        parameters: number of parameters of the student.
        checkpoints: number of checkpoints on disk at the same time.
        models: number of copies of the weights alone: the trajectory and the final model.
        optimizer: whether checkpoints contain optimizer moments.
        copies: number of further copies of the weights in a checkpoint.
        effopd: whether checkpoints contain an anchor.
        held: files that the run already has on disk.

    Raises:
        CheckpointError: there is too little free space.
    """
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    parts = ["weights"] * (1 + copies) + ["optimizer"] * optimizer + ["anchor"] * effopd
    each, model = (parameters * sum(_BYTES_PER_PARAMETER[part] for part in which) for which in (parts, ["weights"]))
    held = held or Held()
    free = shutil.disk_usage(folder).free + held.leftover
    # a new checkpoint is written before the oldest is deleted
    rest = max(each * checkpoints - held.checkpoints, each * min(checkpoints, 1))
    rest += max(model * models - held.models, 0)
    if rest > free:
        present = held.checkpoints + held.models
        raise CheckpointError(
            f"{folder} has {_size(free)} free, but {checkpoints} checkpoints of {_size(each)} (one of "
            f"them being written) and {models} models of {_size(model)} take {_size(rest + present)}"
            + (f", of which {_size(present)} are already on disk" if present else "")
            + ". Lower --save_total_limit, raise --save_steps, save less of --trajectory, or "
            "choose another --output_dir."
        )


def _size(value: int) -> str:
    """Bytes in GB, or in MB below 0.1 GB."""
    return f"{value / 1e9:.1f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"
