"""Verifiers: load the user's own, check that one tells right from wrong, check every score.

The built-in verifiers are `MathVerifier` and `ReasoningGymVerifier`, beside the tasks they grade.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from effopd.errors import EffOPDError, TaskError
from effopd.tasks.base import Example, Task, Verifier

#: Answers that no task has; of two, one never contains the right answer (for verifiers that look
#: for it in the text).
_WRONG_ANSWERS = ("-7777777", "-3333333")


@dataclass(frozen=True)
class VerifierCheck:
    """What `check_verifier` found.

    Attributes:
        checked: examples whose right answer scored higher than every wrong one.
        unchecked: examples without a reference answer, where only the type of the wrong answers'
            scores was checked.
    """

    checked: int
    unchecked: int


def load_verifier(name: str) -> Verifier:
    """The user's function at `"module:function"`; modules in the current directory are found too.

    Raises:
        TaskError: another form, a module that is missing or fails, no such function, or one that
            does not take `(completion, example)`.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise TaskError(f"verifier: expected 'module:function', got {name!r}. Write for example my_verifier:grade.")
    module = _import(module_name, name)
    function: Any = module
    for part in function_name.split("."):
        function = getattr(function, part, None)
    if function is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise TaskError(
            f"verifier '{name}': expected a function '{function_name}' in {module.__file__}, got none. It has: "
            f"{', '.join(sorted(public)) or 'no functions'}."
        )
    if not callable(function):
        raise TaskError(f"verifier '{name}': expected a function, got {type(function).__name__} {function!r}.")
    try:
        inspect.signature(function).bind("completion", Example("0", "prompt"))
    except TypeError as error:
        raise TaskError(
            f"verifier '{name}': expected a function of (completion: str, example: Example) that returns a score in "
            f"[0, 1], got {function_name}{inspect.signature(function)} ({error}). Give it these two parameters."
        ) from error
    except ValueError:
        pass  # some callables written in C have no signature; check_verifier calls them
    return function


def check_score(value: Any, example: Example, task_name: str) -> float:
    """`value` as a float when it is a score.

    Raises:
        TaskError: not a number, NaN, or outside [0, 1]; the message names the example.
    """
    if not isinstance(value, Real) or math.isnan(value) or not 0.0 <= float(value) <= 1.0:
        got = repr(value) if value is None or isinstance(value, Real) else f"{type(value).__name__} {value!r:.80}"
        raise TaskError(
            f"the verifier of task '{task_name}' graded a completion of example '{example.id}': expected a number in "
            f"[0, 1], got {got}. Return 1.0 for right, 0.0 for wrong, anything between for partial credit."
        )
    return float(value)


def check_verifier(task: Task, examples: int = 4) -> VerifierCheck:
    """Grade known right and wrong completions of the first examples; right must score higher than
    each wrong one.

    Right is the example's own answer as the task writes it (`task.render_answer`; for other
    verifiers than the built-in ones the bare answer will do as well). Wrong are the empty text and
    a number that no task has.

    Args:
        task: the task to check.
        examples: how many examples to try, at least 1.

    Raises:
        TaskError: right does not score higher than wrong, a value is not a score, the verifier
            raises, or the task has no answers though its verifier needs them.
    """
    if task.needs_answers and not task.has_answers:
        missing = next((example.id for example in task.examples if example.answer is None), None)
        raise TaskError(
            f"task '{task.name}' cannot be verified: expected a reference answer in every example, got none in "
            f"{'any: it has no examples' if missing is None else repr(missing)}. Add answers or turn accuracy off."
        )
    checked = unchecked = 0
    for example in task.examples[:examples]:
        other = next(answer for answer in _WRONG_ANSWERS if not example.answer or example.answer not in answer[1:])
        wrong = {text: _score(task, text, example) for text in ("", _render(task, other))}
        if example.answer is None:
            unchecked += 1
            continue
        texts = {_render(task, example.answer), example.answer} if not task.needs_answers else None
        right = {text: _score(task, text, example) for text in texts or [_render(task, example.answer)]}
        best, worst = max(right, key=lambda text: right[text]), max(wrong, key=lambda text: wrong[text])
        if right[best] <= wrong[worst]:
            raise TaskError(
                f"the verifier of task '{task.name}' does not tell right from wrong on example '{example.id}': "
                f"expected the right completion {best!r:.200} to score higher than the wrong one {worst!r}, got "
                f"{right[best]:g} and {wrong[worst]:g}. Check that the verifier reads answers in this form and that "
                "the example's answer is right."
            )
        checked += 1
    return VerifierCheck(checked, unchecked)


def _import(module_name: str, name: str) -> Any:
    """The module; for the time of the import the current directory is on the path, last."""
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise TaskError(
                f"verifier '{name}': expected an importable module '{module_name}', got none. Looked in the current "
                f"directory '{folder}' and the installed packages; check the spelling or change directory."
            ) from error
        raise TaskError(f"verifier '{name}': the module '{module_name}' failed to import: {error}.") from error
    except Exception as error:  # the user's code may raise anything; the cause is chained
        raise TaskError(
            f"verifier '{name}': the module '{module_name}' failed to import: {type(error).__name__}: {error}. "
            f'Correct it; try: python -c "import {module_name}"'
        ) from error
    finally:
        sys.path.remove(folder)


def _render(task: Task, answer: str) -> str:
    return answer if task.render_answer is None else task.render_answer(answer)


def _score(task: Task, completion: str, example: Example) -> float:
    try:
        value = task.verify(completion, example)
    except EffOPDError:
        raise
    except Exception as error:  # the user's code may raise anything; the cause is chained
        raise TaskError(
            f"the verifier of task '{task.name}' raised {type(error).__name__} ({error}) on the completion "
            f"{completion!r:.200} of example '{example.id}': expected a score in [0, 1]. A "
            "verifier must grade any text."
        ) from error
    return check_score(value, example, task.name)
