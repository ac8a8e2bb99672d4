"""How a run wrote its prompts and sampled its held-out answers, read from its `config.yaml`, for
commands that measure the model later. A model gets the same tokens then as in training."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from effopd.runs.records import CONFIG

#: Setting of a run → flag of `effopd eval` and `effopd intervene`, for every task: how prompts are
#: written.
PROMPTS = {name: name for name in ("chat_template_kwargs", "system_prompt", "as_chat", "prompt_suffix")}
#: The same, how answers are sampled. A run evaluates with nothing but these (top_p is 1).
SAMPLING = {"eval_temperature": "temperature", "max_completion_length": "max_new_tokens"}
#: Taken over where the run's own task is measured: which rows are held out, and how answers are
#: graded.
SOURCE = (
    "task_args", "eval_task", "eval_task_args", "eval_size", "task_seed", "verifier", "verify_timeout",
)  # fmt: skip
#: Folders between a model and its run: superseded/1/checkpoints/step-000008.
_DEPTH = 4


def run_of(model: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """`config.yaml` and settings of the run that a model folder is, or lies in; `None` if it is no
    run's.

    A checkpoint that `effopd intervene --save_dir` wrote counts as of the run whose update it was
    made of.
    """
    path = Path(model)
    if not path.is_dir():
        return None
    absolute = path.resolve()
    for folder in (absolute, *absolute.parents[:_DEPTH]):
        config = _settings(folder / CONFIG)
        if isinstance(config.get("task"), str) and "output_dir" in config:
            return _spoken(path, absolute, folder) / CONFIG, config
        if isinstance(config.get("trained"), dict) and "interventions" in config:
            return _made_of(config["trained"], absolute.relative_to(folder).parts)
    return None


def taken_over(
    config: Mapping[str, Any], given: Mapping[str, Any], explicit: Iterable[str], *, own_task: bool = True
) -> dict[str, Any]:
    """Flag → value that a run's settings give it, where that is not its default; what the user gave
    wins.

    Args:
        config: settings of the run.
        given: every flag's value, with the command's own defaults.
        explicit: the flags that the user gave.
        own_task: whether the run's own task is meant where no task is given.
    """
    explicit, task, eval_task = set(explicit), given.get("task"), given.get("eval_task")
    values = {flag: config[name] for name, flag in (PROMPTS | SAMPLING).items() if config.get(name) is not None}
    if given.get("as_chat") is False and "as_chat" in explicit:
        values.pop("system_prompt", None)  # plain text has none
    names: Sequence[str] = ()
    if not eval_task and (_same_source(task, config.get("task")) if task else own_task):
        names = ("task", *SOURCE)
    elif _same_source(eval_task, config.get("eval_task")):
        names = ("eval_task_args", "eval_size", "verifier", "verify_timeout")
    values |= {name: config[name] for name in names if config.get(name) is not None}
    sources = [task or values.get("task"), eval_task or values.get("eval_task")]
    if any(source and str(source).startswith("testbed:") for source in sources):
        for name in ("prompt_suffix", "system_prompt"):  # such prompts are used as they come
            values.pop(name, None)
    return {flag: value for flag, value in values.items() if flag not in explicit and value != given.get(flag)}


def agreed(runs: Sequence[tuple[Path, Mapping[str, Any]]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings on which several runs agree; and flag → message for those of `PROMPTS` and
    `SAMPLING` on which they do not.
    """
    (first, settings), *others = runs
    conflicts: dict[str, str] = {}
    for name, flag in (PROMPTS | SAMPLING).items():
        for path, other in others:
            if settings.get(name) != other.get(name):
                conflicts[flag] = (
                    f"the runs differ in {name}: {settings.get(name)!r} in {first}, "
                    f"{other.get(name)!r} in {path}. All points "
                    f"of an intervention get the same prompts and limits: say which with --{flag}."
                )
    common = {name: value for name, value in settings.items() if all(other.get(name) == value for _, other in others)}
    return common, conflicts


def spoken(values: Mapping[str, Any]) -> str:
    """`--flag value` of each, as a user would write them."""
    bare = re.compile(r"[^\s\"',]+")  # needs no quotes
    return ", ".join(
        f"{name} "
        f"{value if isinstance(value, str) and bare.fullmatch(value) else json.dumps(value, ensure_ascii=False)}"
        for name, value in values.items()
    )


def _settings(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; empty where there is none. Other programs write files of that name,
    too.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _same_source(one: Any, other: Any) -> bool:
    """Whether two task names mean the same rows: equal, or the same local file."""
    if one is None or other is None:
        return False
    (kind, _, name), (other_kind, _, other_name) = str(one).partition(":"), str(other).partition(":")
    return one == other or (kind == other_kind == "math" and Path(name).resolve() == Path(other_name).resolve())


def _spoken(given: Path, absolute: Path, folder: Path) -> Path:
    """`folder` as the user would write it, relative where `given` is."""
    levels = len(absolute.relative_to(folder).parts)
    if levels == 0:
        return given
    return given.parents[levels - 1] if len(given.parents) >= levels and ".." not in given.parts else folder


def _made_of(trained: Mapping[str, Any], below: Sequence[str]) -> tuple[Path, dict[str, Any]] | None:
    """The run of a point: its folder has the run's label in its path, INTERVENTION/LABEL/…."""
    for label, snapshots in trained.items():
        if label in below and snapshots:
            return run_of(snapshots[-1]["path"])
    return None
