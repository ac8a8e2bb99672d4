"""`TaskConfig`: settings of the training and evaluation task, for Python, command line and YAML.

Works with transformers' `HfArgumentParser` and TRL's `TrlParser`. Values are checked on
construction; nothing is loaded.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from effopd.errors import ConfigError
from effopd.tasks.kinds import TASK_KINDS

_VERIFIER = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass
class TaskConfig:
    """Sources of prompts, their verifier, and the format of prompts.

    Example:
        >>> TaskConfig(task="reasoning-gym:chain_sum", task_args='{"max_terms": 3}').task_args
        {'max_terms': 3}

    Raises:
        ConfigError: a field is out of range or contradicts another one.
    """

    task: str = field(
        metadata={
            "help": "Source of the prompts. 'reasoning-gym:NAME' generates them (e.g. reasoning-gym:countdown); "
            "'math:SOURCE' reads rows with a prompt and an answer from a .jsonl, .json or .parquet file or a Hub "
            "dataset id; 'code:SOURCE' reads rows with tests; 'testbed:FAMILY' is a built-in toy family."
        }
    )
    task_args: dict | str | None = field(
        default=None,
        metadata={
            "help": "JSON object with parameters of the source. reasoning-gym: the dataset's own parameters, e.g. "
            "'{\"max_terms\": 3}'. math: 'prompt_column' and 'answer_column' for columns with other names or nested "
            "fields ('reward_model.ground_truth'); for a Hub dataset also arguments of load_dataset, e.g. "
            '\'{"name": "main", "split": "train"}\'. code: docs/code_tasks.md.'
        },
    )
    verifier: str | None = field(
        default=None,
        metadata={
            "help": "Your own grading function as 'module:function', called as function(completion, example) and "
            "returning a score in [0, 1]; the module can be in the current directory. The completion is the whole "
            "decoded text including the reasoning; if the prompt ends with <think>, the text starts with <think>. "
            "The built-in verifiers grade only the text after the reasoning. The function runs in this process "
            "without the verify_timeout limit. Built in: effopd.tasks.verify:last_number reads the last number. "
            "Default: the task's own verifier."
        },
    )
    prompt_suffix: str | None = field(
        default=None,
        metadata={
            "help": "Text appended to every question. Default: the task's own instruction (math: reason step by step "
            "and put the answer within \\boxed{}; reasoning-gym: answer between <answer> tags; code: the source's "
            "template; testbed: none). "
            "'' appends nothing; the built-in verifiers still look for \\boxed{} or the tags."
        },
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "System message placed before every question. Requires as_chat. Default: none."},
    )
    as_chat: bool = field(
        default=True,
        metadata={
            "help": "Write prompts as chat messages, formatted with the tokenizer's chat template. Turn it off for "
            "base models: prompts are then plain text. Testbed prompts are not changed."
        },
    )
    train_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of training examples. Default: all rows of a file or Hub dataset that are not held out; "
            "1000 for generated tasks."
        },
    )
    eval_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of evaluation examples, held out from task unless eval_task is set. 0: nothing is held "
            "out. Default: all rows of an eval_task file; 100 for generated tasks; a tenth of the rows, at most 100, "
            "if held out from a file."
        },
    )
    task_seed: int = field(
        default=0,
        metadata={"help": "Seed of the generated questions and of the choice of held-out rows (≥ 0)."},
    )
    eval_task: str | None = field(
        default=None,
        metadata={
            "help": "Separate source for evaluation, written like task. Evaluation questions are excluded from "
            "training. Default: questions held out from task."
        },
    )
    eval_task_args: dict | str | None = field(
        default=None,
        metadata={"help": "JSON object with parameters of eval_task, like task_args. task_args is not inherited."},
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt allowed, in tokens including the chat template. Longer prompts stop the run with "
            "a list of their rows; no prompt is cut or dropped. Default: no limit."
        },
    )
    verify_timeout: float = field(
        default=5.0,
        metadata={
            "help": "Hard time limit for grading one completion with a built-in verifier, in seconds; for code, one "
            "case. Gradings that reach it score 0 and are counted."
        },
    )

    def __post_init__(self) -> None:
        kinds = [split_task_name("task", self.task)[0]]
        if self.eval_task is not None:
            kinds.append(split_task_name("eval_task", self.eval_task)[0])
        self.task_args = json_object("task_args", self.task_args)
        self.eval_task_args = json_object("eval_task_args", self.eval_task_args)
        self._check_kinds()
        if self.verifier is not None and not _VERIFIER.fullmatch(self.verifier):
            raise ConfigError(
                f"verifier: expected 'module:function', got {self.verifier!r}. For a function 'grade' in "
                "my_verifier.py write my_verifier:grade."
            )
        self._check_numbers()
        self._check_combinations(kinds)

    def _check_kinds(self) -> None:
        for name in ("verifier", "prompt_suffix", "system_prompt"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name}: expected text, got {getattr(self, name)!r}. Put it in quotes.")
        if not isinstance(self.as_chat, bool):
            raise ConfigError(f"as_chat: expected true or false, got {self.as_chat!r}.")

    def _check_numbers(self) -> None:
        for name, least in (("train_size", 1), ("eval_size", 0), ("task_seed", 0), ("max_prompt_length", 1)):
            value = getattr(self, name)
            if value is None and name != "task_seed":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"{name}: expected a whole number of at least {least}, got {value!r}. "
                    f"Set {name} to {least} or more" + ("." if name == "task_seed" else " or leave it out.")
                )
        timeout = self.verify_timeout
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise ConfigError(
                f"verify_timeout: expected a number of seconds above 0, got {timeout!r}. The default is 5.0."
            )

    def _check_combinations(self, kinds: list[str]) -> None:
        if self.system_prompt is not None and not self.as_chat:
            raise ConfigError(
                f"system_prompt: expected none when as_chat is off, got {self.system_prompt!r}. Plain text has no "
                "system message. Turn as_chat on or write the text into your prompts."
            )
        if self.eval_task is None and self.eval_task_args:
            raise ConfigError(
                f"eval_task_args: expected none without eval_task, got {self.eval_task_args!r}. Set eval_task, or "
                "remove eval_task_args: held-out questions come from task with task_args."
            )
        if self.eval_task is not None and self.eval_size == 0:
            raise ConfigError("eval_size: expected at least 1 when eval_task is set, got 0. Remove one of the two.")
        fixed = next((kind for kind in kinds if TASK_KINDS[kind].suffix is None), None)
        for name in ("prompt_suffix", "system_prompt"):
            if fixed is not None and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}: expected none for a {fixed} task, got {getattr(self, name)!r}. Its prompts are used as "
                    f"they are. Remove {name}."
                )


def split_task_name(field_name: str, value: Any) -> tuple[str, str]:
    """Split `"kind:name"` into its two parts.

    Raises:
        ConfigError: the form is different or the kind is unknown.
    """
    kind, colon, name = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind not in TASK_KINDS or not colon or not name.strip():
        *others, last = (f"'{known}:{of_kind.form}'" for known, of_kind in TASK_KINDS.items())
        raise ConfigError(
            f"{field_name}: expected {', '.join(others)} or {last}, got {value!r}. "
            "Write for example reasoning-gym:basic_arithmetic or math:data/train.jsonl."
        )
    return kind, name.strip()


def json_object(field_name: str, value: dict | str | None, example: str = '{"max_terms": 3}') -> dict | None:
    """Parse JSON text to a dict; a dict or `None` is returned unchanged.

    Raises:
        ConfigError: the value is anything else; the message shows `example`.
    """
    parsed: Any = value
    hint = f"Write for example '{example}'"
    if isinstance(value, str):
        try:
            parsed = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{field_name}: expected a JSON object, got {value!r} ({error}). {hint}, in "
                "single quotes on the command line."
            ) from error
    if parsed is not None and not isinstance(parsed, dict):
        raise ConfigError(f"{field_name}: expected a JSON object, got {type(parsed).__name__} {value!r}. {hint}.")
    return parsed
