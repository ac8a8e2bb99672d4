"""Prompt and sampling settings of a run, read from `config.yaml` by commands that measure it later.

With these settings a model gets the same prompt tokens as in training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from effopd.errors import ConfigError
from effopd.runs.records import CONFIG
from effopd.tasks.row_files import FILE_TYPES, on_hub

#: Setting of a run → flag of `effopd eval` and `effopd intervene`, for the format of prompts.
PROMPTS = {name: name for name in ("chat_template_kwargs", "system_prompt", "as_chat", "prompt_suffix")}
#: The same for sampling. A run's evaluations use no other sampling settings (top_p is 1).
SAMPLING = {"eval_temperature": "temperature", "max_completion_length": "max_new_tokens"}
#: Inherited if the run's own task is measured: held-out rows and grading.
SOURCE = (
    "task_args", "eval_task", "eval_task_args", "eval_size", "task_seed", "verifier", "verify_timeout",
)  # fmt: skip
#: Folders between a model and its run: superseded/1/checkpoints/step-000008.
_DEPTH = 4


def run_of(model: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """`config.yaml` and settings of the run to which a model folder belongs; `None`: no run.

    A checkpoint of `effopd intervene --save_dir` belongs to the run whose update it was made from.
    """
    path = Path(model)
    if not path.is_dir():
        return None
    absolute = path.resolve()
    for folder in (absolute, *absolute.parents[:_DEPTH]):
        config = _settings(folder / CONFIG)
        if isinstance(config.get("task"), str) and "output_dir" in config:
            return _spoken(path, absolute, folder) / CONFIG, _anchored(config, folder)
        if isinstance(config.get("trained"), dict) and "interventions" in config:
            return _made_of(config["trained"], absolute.relative_to(folder).parts)
    return None


def taken_over(
    config: Mapping[str, Any], given: Mapping[str, Any], explicit: Iterable[str], *, own_task: bool = True
) -> dict[str, Any]:
    """Flag → value inherited from a run's settings; only changed values, never explicit flags.

    Args:
        config: settings of the run.
        given: value of every flag, including the command's defaults.
        explicit: the flags that the user gave.
        own_task: whether the run's own task is the default if no task is given.
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


def check_files(run: Path, inherited: Mapping[str, Any]) -> None:
    """Check that the task files taken over from a run exist.

    Raises:
        ConfigError: a file does not exist; the message names the run.
    """
    for name in ("task", "eval_task"):
        kind, _, source = str(inherited.get(name) or "").partition(":")
        if kind in ("math", "code") and not on_hub(source) and not Path(source).expanduser().is_file():
            raise ConfigError(
                f"{name} of the run {run.parent}: expected the file '{source}', but there is none (looked in "
                f"'{Path.cwd()}'). Restore it, or give a task with --task or --eval_task {kind}:PATH. Another path "
                "also needs the run's task settings, such as --task_seed."
            )


def splits_as(config: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether a task's settings hold out the same rows as a run's settings."""
    names = ("task_args", "eval_size", "task_seed")
    same = all((given.get(name) or None) == (config.get(name) or None) for name in names)
    return same and _same_source(given["task"], config["task"])


def agreed(runs: Sequence[tuple[Path, Mapping[str, Any]]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings that several runs share, and flag → error message for those that differ.

    Only settings in `PROMPTS` and `SAMPLING` have messages.
    """
    (first, settings), *others = runs
    conflicts: dict[str, str] = {}
    for name, flag in (PROMPTS | SAMPLING).items():
        for path, other in others:
            if settings.get(name) != other.get(name):
                conflicts[flag] = (
                    f"the runs differ in {name}: {settings.get(name)!r} in {first}, "
                    f"{other.get(name)!r} in {path}. All points of an intervention need the same prompts and limits: "
                    f"set --{flag}."
                )
    common = {name: value for name, value in settings.items() if all(other.get(name) == value for _, other in others)}
    return common, conflicts


def spoken(values: Mapping[str, Any]) -> str:
    """`flag value` pairs as on a command line, separated by commas."""
    bare = re.compile(r"[^\s\"',]+")  # needs no quotes
    return ", ".join(
        f"{name} "
        f"{value if isinstance(value, str) and bare.fullmatch(value) else json.dumps(value, ensure_ascii=False)}"
        for name, value in values.items()
    )


def _settings(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; empty if it has none (other programs use the same file name)."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _anchored(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings with relative task files where the run was started, as far as its folder tells.

    A run in /a/runs/first with the `output_dir` runs/first was started in /a.
    """
    out = Path(str(config["output_dir"])).parts
    if not out or ".." in out or Path(*out).is_absolute() or folder.parts[-len(out) :] != out:
        return config
    home = Path(*folder.parts[: -len(out)])
    if home == Path.cwd().resolve():
        return config
    config = dict(config)
    for name in ("task", "eval_task"):
        kind, _, source = str(config.get(name) or "").partition(":")
        local = (home / source).is_file() or Path(source).suffix.lower() in FILE_TYPES
        if kind in ("math", "code") and local and not source.startswith("~"):
            config[name] = f"{kind}:{home / source}"  # an absolute source stays
    return config


def _same_source(one: Any, other: Any) -> bool:
    """Whether two task names refer to the same rows: equal names, or the same local file."""
    if one is None or other is None:
        return False
    (kind, _, name), (other_kind, _, other_name) = str(one).partition(":"), str(other).partition(":")
    return one == other or (
        kind == other_kind and kind in ("math", "code") and Path(name).resolve() == Path(other_name).resolve()
    )


def _spoken(given: Path, absolute: Path, folder: Path) -> Path:
    """`folder` in the user's spelling: relative if `given` is."""
    levels = len(absolute.relative_to(folder).parts)
    if levels == 0:
        return given
    return given.parents[levels - 1] if len(given.parents) >= levels and ".." not in given.parts else folder


def _made_of(trained: Mapping[str, Any], below: Sequence[str]) -> tuple[Path, dict[str, Any]] | None:
    """The run of an intervention's point, whose path has its label: INTERVENTION/LABEL/…."""
    for label, snapshots in trained.items():
        if label in below and snapshots:
            return run_of(snapshots[-1]["path"])
    return None
