"""Checks that take seconds, before work that takes hours: do these models, this tokenizer and this
task fit?

Reads configurations and tokenizers only; no weights are loaded.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from effopd.errors import CheckpointError, CompatibilityError, ConfigError, TaskError
from effopd.models import files as model_files
from effopd.models.folders import check_model_folder, refuse_adapter
from effopd.runs.run_dir import Held
from effopd.tasks import Task, check_prompt_lengths, check_verifier

logger = logging.getLogger(__name__)

#: Bytes a checkpoint takes per parameter: fp32 weights, two Adam moments, the look-ahead's anchor.
_BYTES_PER_PARAMETER = {"weights": 4, "optimizer": 8, "anchor": 4}


def check_model_name(flag: str, name: str | None) -> None:
    """A name that may be a model's: a folder that is there, or a possible Hub id. Nothing is read.

    Raises:
        ConfigError: no name.
        CompatibilityError: a path to nothing.
    """
    if not name:
        raise ConfigError(f"{flag} is missing: expected a model folder or a Hub id.")
    if Path(name).exists():
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CompatibilityError(
            f"{flag} {name!r}: no such folder (looked in {Path.cwd()}), and not a Hub id."
        ) from error


def load_tokenizer(student: str, **load: Any) -> PreTrainedTokenizerBase:
    """The student's tokenizer, set up for training. One without an end token gets the model's: the
    host fills rows with it.

    Raises:
        CompatibilityError: it cannot be read.
    """
    tokenizer = model_files.load_tokenizer("the student", student, truncation_side="left", **load)
    if tokenizer.eos_token_id is None:
        for token in sorted(_declared_end_tokens(student, None, load.get("revision"))):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
            break
    return tokenizer


def check_models(student: str, teacher: str, tokenizer: PreTrainedTokenizerBase, **load: Any) -> None:
    """Tokenizer, end tokens and vocabulary of two model folders or Hub ids.

    Args:
        load: passed to every `from_pretrained` (e.g. `trust_remote_code`).

    Raises:
        CompatibilityError: the tokenizers differ, no end token is shared, or a model has too few
            vocabulary rows.
    """
    configs = {}
    for role, name in (("student", student), ("teacher", teacher)):
        check_model_folder(f"the {role}", name)
        refuse_adapter(f"the {role}", name)
        with model_files.reading(f"the {role}", name):
            configs[role] = AutoConfig.from_pretrained(name, **load)
            rows = configs[role].get_text_config().vocab_size
        if rows < len(tokenizer):
            raise CompatibilityError(
                f"the {role} {name!r} has {rows} vocabulary rows but the student's tokenizer has {len(tokenizer)} "
                "tokens. Expected a row for every token: use a student and a teacher of one family."
            )
    _check_tokenizers(teacher, tokenizer, load)
    _check_end_tokens(student, teacher, tokenizer, configs)


def _check_tokenizers(teacher: str, tokenizer: PreTrainedTokenizerBase, load: dict[str, Any]) -> None:
    # without these files `AutoTokenizer` makes up an empty tokenizer of the model's type
    if all(
        cached_file(teacher, name, _raise_exceptions_for_missing_entries=False) is None
        for name in ("tokenizer_config.json", "tokenizer.json")
    ):
        logger.warning("The teacher %r has no tokenizer of its own; its agreement was not checked.", teacher)
        return
    with model_files.reading("the teacher", teacher):
        other = AutoTokenizer.from_pretrained(teacher, **load)
    mine, theirs = tokenizer.get_vocab(), other.get_vocab()
    if mine != theirs:
        different = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
        examples = ", ".join(f"{t!r} ({mine.get(t)} / {theirs.get(t)})" for t in different[:3])
        raise CompatibilityError(
            f"student and teacher {teacher!r} have different tokenizers: {len(different)} tokens have another id, "
            f"e.g. (student / teacher) {examples}. Token-level distillation compares the same ids: use a teacher of "
            "the student's family."
        )
    if tokenizer.chat_template and other.chat_template and tokenizer.chat_template != other.chat_template:
        logger.warning(
            "Student and teacher have different chat templates; prompts are written with the student's. If the "
            "teacher was tuned on its own template, give the student's tokenizer that one."
        )


def _declared_end_tokens(name: str, config: Any, revision: str | None = None) -> set[int]:
    try:
        declared = GenerationConfig.from_pretrained(name, revision=revision or "main").eos_token_id
    except (OSError, ValueError):
        declared = getattr(config, "eos_token_id", None)
    return set(declared if isinstance(declared, list) else [declared]) - {None}


def _check_end_tokens(student: str, teacher: str, tokenizer: PreTrainedTokenizerBase, configs: dict) -> None:
    mine = _declared_end_tokens(student, configs["student"]) | {tokenizer.eos_token_id} - {None}
    theirs = _declared_end_tokens(teacher, configs["teacher"]) or mine
    if not mine:
        raise CompatibilityError(
            f"the student {student!r} has no end token: expected `eos_token_id` in its generation config or an "
            "eos_token in its tokenizer. Without one no answer ever ends."
        )
    if not mine & theirs:
        raise CompatibilityError(
            f"student and teacher end their answers with different tokens: {sorted(mine)} and {sorted(theirs)}. The "
            "student would learn to never stop where it is sampled to stop: set the same `eos_token_id` in both "
            "generation configs."
        )
    if mine != theirs:
        logger.warning("End tokens differ: student %s, teacher %s. Watch the share of cut answers.", mine, theirs)


def check_task(
    task: Task, tokenizer: PreTrainedTokenizerBase | None, max_prompt_length: int | None, **template: Any
) -> int | None:
    """Prompt lengths and, where there are answers, the verifier on known-right and known-wrong
    answers.

    Args:
        tokenizer: the student's; `None` where it is not at hand: lengths are not measured then.

    Returns:
        The longest prompt, in tokens, if it was measured.

    Raises:
        TaskError: no examples, a prompt that is too long, no chat template for chat prompts, or a
            verifier that does not tell right from wrong.
    """
    if not task.examples:
        raise TaskError(f"task '{task.name}' has no examples: expected at least one prompt.")
    lengths = {} if tokenizer is None else check_prompt_lengths(task, tokenizer, max_prompt_length, template)
    if task.verifiable:
        check_verifier(task)
    return max(lengths.values(), default=None)


def check_disk(
    output_dir: str | Path,
    parameters: int,
    *,
    checkpoints: int,
    models: int = 0,
    optimizer: bool = True,
    effopd: bool,
    held: Held | None = None,
) -> None:
    """Room for everything a run keeps.

    Args:
        parameters: of the student.
        checkpoints: how many are on disk at the same time.
        models: how many times the weights alone are (the trajectory and the final model).
        optimizer: whether checkpoints hold its moments.
        effopd: whether they hold an anchor.
        held: what the run has there already.

    Raises:
        CheckpointError: less is free than the rest takes.
    """
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    parts = ["weights"] + ["optimizer"] * optimizer + ["anchor"] * effopd
    each, model = (parameters * sum(_BYTES_PER_PARAMETER[part] for part in which) for which in (parts, ["weights"]))
    held = held or Held()
    free = shutil.disk_usage(folder).free + held.leftover
    # on a full set, the next one is written before the oldest goes
    rest = max(each * checkpoints - held.checkpoints, each * min(checkpoints, 1))
    rest += max(model * models - held.models, 0)
    if rest > free:
        present = held.checkpoints + held.models
        raise CheckpointError(
            f"{folder} has {free / 1e9:.1f} GB free but {checkpoints} checkpoints of "
            f"{each / 1e9:.1f} GB (one of them being "
            f"written) and {models} times the model, {model / 1e9:.1f} GB, take {(rest + present) / 1e9:.1f} GB"
            + (f", of which {present / 1e9:.1f} GB are there" if present else "")
            + ". Lower --save_total_limit, raise --save_steps, keep less of --trajectory, or "
            "choose another --output_dir."
        )
