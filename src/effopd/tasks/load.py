"""`load_task`: prompts and verifier of one split, from a `TaskConfig`.

The evaluation split is chosen first and depends only on its source, its size and the seed. The
training split takes questions outside it, so the two are disjoint for any pair of sources. Both are
deterministic.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from effopd.common.optional import ensure
from effopd.errors import TaskError
from effopd.tasks.base import Example, Prompt, Task
from effopd.tasks.code.rows import read_code_rows, render_program, with_template
from effopd.tasks.code.verifier import SETTINGS, CodeVerifier
from effopd.tasks.config import TaskConfig, split_task_name
from effopd.tasks.gym_tasks import GYM_SUFFIX, ReasoningGymVerifier, gym_examples
from effopd.tasks.kinds import TASK_KINDS, Request, Split, TaskKind
from effopd.tasks.math_grading import MATH_SUFFIX, MathVerifier, render_boxed
from effopd.tasks.row_faults import ORIGIN
from effopd.tasks.row_files import local_file, on_hub
from effopd.tasks.rows import question_key, read_math_rows
from effopd.tasks.tagged_answers import render_tagged
from effopd.tasks.testbed_families import check_family, family_task
from effopd.tasks.verify import load_verifier

logger = logging.getLogger(__name__)

#: Default sizes of generated tasks.
DEFAULT_TRAIN_SIZE, DEFAULT_EVAL_SIZE = 1000, 100
#: Default share of a file's rows held out for evaluation, at most `DEFAULT_EVAL_SIZE` rows.
HELD_OUT_SHARE = 0.1


def needs_network(config: TaskConfig) -> bool:
    """Whether a source of the task is a Hub dataset or a folder loaded like one."""
    sources = [split_task_name("task", source) for source in (config.task, config.eval_task) if source is not None]
    return any(kind in ("math", "code") and on_hub(name) for kind, name in sources)


def check_packages(config: TaskConfig) -> None:
    """Check that the packages of the task's sources are installed. Nothing is imported.

    Raises:
        MissingDependencyError: a source is a reasoning-gym dataset, and the library is missing.
    """
    sources = [source for source in (config.task, config.eval_task) if source is not None]
    if any(split_task_name("task", source)[0] == "reasoning-gym" for source in sources):
        ensure("reasoning_gym")


def check_sources(config: TaskConfig) -> None:
    """Check that the files and families of a task exist. No row is read, and no network is used.

    Raises:
        TaskError: a file does not exist or has another type, or a family is unknown.
    """
    for source in (config.task, config.eval_task):
        kind, name = ("", "") if source is None else split_task_name("task", source)
        if kind == "testbed":
            check_family(name)
        elif kind in ("math", "code") and not on_hub(name):
            local_file(name)


def load_task(
    config: TaskConfig, split: Split, *, answers_required: bool = True, why: str = "", keep: Sequence[str] = ()
) -> Task:
    """Examples and verifier of one split.

    Args:
        config: the task's settings.
        split: "train" or "eval".
        answers_required: whether rows of a file must have reference answers. Accuracy needs them,
            distillation does not. If `False`, either all rows have an answer or none does.
        why: sentence for the error message about the feature that needs the answers.
        keep: columns of code rows to keep in the examples' metadata; math rows keep all.

    Raises:
        TaskError: the source cannot be read, rows are bad, there are too few examples, the verifier
            is unusable, or split is "eval" and `eval_size` is 0.
        MissingDependencyError: the package of the task is not installed.
    """
    if split not in ("train", "eval"):
        raise TaskError(f"split: expected 'train' or 'eval', got {split!r}.")
    if split == "eval" and config.eval_size == 0:
        raise TaskError("eval_size=0: there is no eval split. Set eval_size to 1 or more, or leave it out.")
    kind, _ = split_task_name("task", _source(config, split)[0])
    return _finish(_load_bare(config, split, answers_required, why, tuple(keep)), config, kind)


def _source(config: TaskConfig, split: Split) -> tuple[str, Any]:
    """(source of a split, its parameters)."""
    if split == "train" or config.eval_task is None:
        return config.task, config.task_args
    return config.eval_task, config.eval_task_args


def check_grading(config: TaskConfig, splits: Collection[Split]) -> None:
    """Check what grading needs besides the rows, for sources that cannot be read now.

    Args:
        splits: the splits whose completions are graded.

    Raises:
        TaskError: the user's verifier or a setting of a code task is unusable.
        SandboxError: programs of a code task cannot be isolated here.
    """
    if config.verifier is not None:
        load_verifier(config.verifier)
    sources = [_source(config, split) for split in splits]
    for source, args in sources if config.eval_task is not None else sources[:1]:
        if split_task_name("task", source)[0] == "code":
            verifier = _code_verifier(args if isinstance(args, dict) else {}, config.verify_timeout)
            if config.verifier is None:
                verifier.check()
            verifier.pool.close()


def _load_bare(config: TaskConfig, split: Split, answers_required: bool, why: str, keep: tuple[str, ...] = ()) -> Task:
    """One split with bare questions as prompts."""
    source, args = _source(config, split)
    kind, name = split_task_name("task", source)
    excluded: frozenset[str] = frozenset()
    if split == "train" and config.eval_size != 0 and (kind != "testbed" or config.eval_task is not None):
        # of another source, only the questions are read
        held_out = _load_bare(config, "eval", answers_required and config.eval_task is None, why)
        excluded = frozenset(question_key(example.prompt) for example in held_out.examples)
    request = Request(
        name=name,
        args=dict(args) if isinstance(args, dict) else {},
        split=split,
        size=config.train_size if split == "train" else config.eval_size,
        held_out=config.eval_task is None,
        excluded=excluded,
        seed=config.task_seed,
        timeout=config.verify_timeout,
        answers_required=answers_required,
        why=why,
        setting="task_args" if split == "train" or config.eval_task is None else "eval_task_args",
        keep=keep,
    )
    task = replace(TASK_KINDS[kind].load(request), name=f"{kind}:{name}")
    if repeated := sum(question_key(example.prompt) in excluded for example in task.examples):
        raise TaskError(
            f"task '{task.name}': expected training questions that are not in the evaluation, got {repeated} that are."
            " Its loader must leave out the questions in `Request.excluded`."
        )
    return task


def _load_gym(request: Request) -> Task:
    examples = gym_examples(
        request.name,
        request.args,
        split=request.split,
        size=request.size or _default_size(request.split),
        seed=request.seed,
        excluded=request.excluded,
    )
    verifier = ReasoningGymVerifier(request.name, request.args, request.timeout)
    return Task(request.name, examples, verifier, render_tagged, needs_answers=False)


def _load_math(request: Request) -> Task:
    rows = read_math_rows(
        request.name,
        request.args,
        answers_required=request.answers_required,
        why=request.why,
        setting=request.setting,
    )
    chosen, available = choose(request, rows)
    return Task(request.name, chosen, MathVerifier(request.timeout), render_boxed, available=available)


def _load_code(request: Request) -> Task:
    """Rows with tests. If nothing is graded, examples have no answers: no sandbox is needed."""
    verifier = _code_verifier(request.args, request.timeout)
    args = {name: value for name, value in request.args.items() if name not in SETTINGS}
    rows = read_code_rows(request.name, args, keep=request.keep)
    chosen, available = choose(request, rows)
    if not request.answers_required:
        chosen = tuple(replace(example, answer=None) for example in chosen)
    return Task(
        request.name, chosen, verifier, render_program, needs_answers=not request.answers_required, available=available
    )


def _code_verifier(args: Mapping[str, Any], timeout: float) -> CodeVerifier:
    return CodeVerifier({name: args[name] for name in SETTINGS if name in args}, timeout)


def choose(request: Request, examples: Sequence[Example]) -> tuple[tuple[Example, ...], int]:
    """Examples of the split, chosen from the rows of a source, and the number it could have.

    Raises:
        TaskError: there are too few rows.
    """
    rows = list(examples)
    random.Random(request.seed).shuffle(rows)
    if request.split == "eval":
        first: dict[str, Example] = {}
        for row in rows:
            first.setdefault(question_key(row.prompt), row)
        chosen = list(first.values())
        why = "repeat the question of another row"
    else:
        chosen = [row for row in rows if question_key(row.prompt) not in request.excluded]
        why = "repeat a question of the evaluation"
    _warn_left_out(request, len(rows) - len(chosen), why)
    size = request.size
    if size is None and request.split == "eval" and request.held_out:
        size = max(1, min(DEFAULT_EVAL_SIZE, int(HELD_OUT_SHARE * len(chosen))))
    if not chosen or (size is not None and size > len(chosen)):
        raise TaskError(
            f"'{request.name}': expected {size or 'at least 1'} rows for the {request.split} split, got {len(chosen)} "
            f"({len(rows)} rows, of which {len(rows) - len(chosen)} {why}). Lower {request.split}_size"
            f"{' or eval_size' if request.split == 'train' else ''}, or name an eval_task."
        )
    return tuple(chosen[:size]), len(chosen)


def _warn_left_out(request: Request, left_out: int, why: str) -> None:
    """Warn about rows in neither split; rows held out for evaluation are not counted."""
    if request.held_out:
        left_out = left_out - len(request.excluded) if request.split == "train" else 0
    if left_out > 0:
        logger.warning(
            "%d rows of '%s' are left out of the %s split: they %s", left_out, request.name, request.split, why
        )


def _load_testbed(request: Request) -> Task:
    if request.args:
        raise TaskError(
            f"task_args: expected none for testbed family '{request.name}', got {request.args}. Remove task_args."
        )
    task: Task = family_task(request.name, request.split, request.size or _default_size(request.split), request.seed)
    if request.excluded:
        unseen = [example for example in task.examples if question_key(example.prompt) not in request.excluded]
        if len(unseen) < len(task):
            raise TaskError(
                f"testbed family '{request.name}': expected training questions that are not in the evaluation, got "
                f"{len(task) - len(unseen)} that are. Remove eval_task to use the family's own eval split."
            )
    return task


TASK_KINDS.update({
    "reasoning-gym": TaskKind(_load_gym, suffix=GYM_SUFFIX),
    "math": TaskKind(_load_math, "FILE_OR_HUB_ID", MATH_SUFFIX),
    "code": TaskKind(_load_code, "FILE_OR_HUB_ID"),  # code rows have templates of their own
    "testbed": TaskKind(_load_testbed, "FAMILY", None),
})  # fmt: skip


def instruction(task: str, prompt_suffix: str | None) -> str:
    """Text appended to every question of `task` ("kind:name").

    Args:
        task: "kind:name"; testbed tasks have no instruction.
        prompt_suffix: the user's text; `None`: the instruction of the kind.
    """
    own = TASK_KINDS[split_task_name("task", task)[0]].suffix
    if own is None:
        return ""
    return own if prompt_suffix is None else prompt_suffix


def _default_size(split: Split) -> int:
    return DEFAULT_TRAIN_SIZE if split == "train" else DEFAULT_EVAL_SIZE


def _finish(task: Task, config: TaskConfig, kind: str) -> Task:
    """The task with complete prompts and the user's verifier, if there is one."""
    if config.verifier is not None:
        task = replace(task, verify=load_verifier(config.verifier), needs_answers=False)
    if TASK_KINDS[kind].suffix is None:
        return task
    if kind == "code" and config.prompt_suffix is None:
        task = task.subset([with_template(example, config.as_chat) for example in task.examples])
    suffix = instruction(f"{kind}:{task.name}", config.prompt_suffix)
    return task.subset([replace(example, prompt=_write(example, suffix, config)) for example in task.examples])


def _write(example: Example, suffix: str, config: TaskConfig) -> Prompt:
    """Question and instruction as text or chat messages."""
    origin = example.metadata.get(ORIGIN, example.id)
    if isinstance(example.prompt, str):
        text = example.prompt + suffix
        messages = [{"role": "user", "content": text}]
        if not config.as_chat:
            return text
    elif not config.as_chat:
        raise TaskError(f"{origin}: expected a text prompt when as_chat is off, got chat messages. Turn as_chat on.")
    else:
        last = example.prompt[-1]
        messages = [*example.prompt[:-1], {**last, "content": last["content"] + suffix}]
    if config.system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise TaskError(f"{origin}: expected no system message beside system_prompt, got one. Keep one of the two.")
    return [{"role": "system", "content": config.system_prompt}, *messages]
