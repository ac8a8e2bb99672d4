"""User-defined verifiers: load them, check that they tell right from wrong, check their scores.

The tasks' own verifiers are in `math_grading`, `gym_tasks` and `testbed_families`; `last_number` is
an alternative to them.
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
from effopd.tasks.last_number import last_number as last_number  # --verifier effopd.tasks.verify:last_number

#: Answers of no task. At least one does not contain the right answer, for verifiers that search
#: the text for it.
_WRONG_ANSWERS = ("-7777777", "-3333333")


@dataclass(frozen=True)
class VerifierCheck:
    """Result of `check_verifier`.

    Attributes:
        checked: number of examples whose right answer scored higher than every wrong one.
        unchecked: number of examples without a reference answer. For these, only the validity of
            the scores of wrong answers was checked.
    """

    checked: int
    unchecked: int


def load_verifier(name: str) -> Verifier:
    """Load the user's function `"module:function"`; the module can be in the current directory.

    Raises:
        TaskError: the form is wrong, the module is missing or fails to import, the function is
            missing, or it does not take `(completion, example)`.
    """
    function = load_function("verifier", name)
    try:
        inspect.signature(function).bind("completion", Example("0", "prompt"))
    except TypeError as error:
        own = name.rpartition(":")[2]
        raise TaskError(
            f"verifier '{name}': expected a function of (completion: str, example: Example) that returns a score "
            f"in [0, 1], got {own}{inspect.signature(function)} ({error}). Give it these two parameters."
        ) from error
    except ValueError:
        pass  # some callables written in C have no signature; check_verifier calls them
    return function


def load_function(setting: str, name: str) -> Any:
    """Load a function of the user, `"module:function"`; the module can be in the current directory.

    Args:
        setting: name of the setting, for messages.

    Raises:
        TaskError: the form is wrong, the module is missing or fails to import, or the function is
            missing.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise TaskError(f"{setting}: expected 'module:function', got {name!r}. Write for example my_{setting}:grade.")
    module = _import(module_name, name, setting)
    function: Any = module
    for part in function_name.split("."):
        function = getattr(function, part, None)
    if function is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise TaskError(
            f"{setting} '{name}': expected a function '{function_name}' in "
            f"{getattr(module, '__file__', None) or f'the module {module_name}'}, got none. Functions there: "
            f"{', '.join(sorted(public)) or 'none'}."
        )
    if not callable(function):
        raise TaskError(f"{setting} '{name}': expected a function, got {type(function).__name__} {function!r}.")
    return function


def check_score(value: Any, example: Example, task_name: str) -> float:
    """Check a score and return it as a float.

    Raises:
        TaskError: the score is not a number in [0, 1]; the message names the example.
    """
    if not isinstance(value, Real) or math.isnan(value) or not 0.0 <= float(value) <= 1.0:
        got = repr(value) if value is None or isinstance(value, Real) else f"{type(value).__name__} {value!r:.80}"
        raise TaskError(
            f"the verifier of task '{task_name}' graded a completion of example '{example.id}': expected a number in "
            f"[0, 1], got {got}. Return 1.0 for right, 0.0 for wrong, or a value between for partial credit."
        )
    return float(value)


def check_verifiable(task: Task) -> None:
    """Check that every example has the answer that the verifier needs.

    Raises:
        TaskError: one has none, or there are no examples.
    """
    if not task.verifiable:
        missing = next((example.id for example in task.examples if example.answer is None), None)
        raise TaskError(
            f"task '{task.name}' cannot be evaluated: "
            + (f"example '{missing}' has no answer." if missing is not None else "it has no examples.")
            + " Expected an answer in every example. Use another task or fill in the `answer` column."
        )


def check_gradable(task: Task) -> None:
    """Check the verifier of a task on the empty completion of the first example.

    `check_verifier` also checks that right answers score higher, which needs their form.

    Raises:
        TaskError: there are no examples, an answer is missing, the verifier raises, or it returns
            no score.
    """
    check_verifiable(task)
    _score(task, "", task.examples[0])


def check_verifier(task: Task, examples: int = 4) -> VerifierCheck:
    """Check on the first examples that the right answer scores higher than wrong ones.

    The right completion is the reference answer in the task's format (`task.render_answer`). If the
    verifier does not need `Example.answer`, the better of this and the bare answer counts. The
    wrong completions are the empty text and a number that is no task's answer.

    Args:
        task: task to check.
        examples: number of examples to check, at least 1.

    Raises:
        TaskError: a wrong completion scores at least as high as the right one, a score is invalid,
            the verifier raises, or the task lacks answers that its verifier needs.
    """
    if task.needs_answers and not task.has_answers:
        missing = next((example.id for example in task.examples if example.answer is None), None)
        raise TaskError(
            f"task '{task.name}' cannot be verified: expected a reference answer in every example, got none in "
            f"{'any: there are no examples' if missing is None else repr(missing)}. Add answers or turn accuracy off."
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
                f"{right[best]:g} and {wrong[worst]:g}. Check that the verifier reads answers in this format and that "
                "the example's answer is right."
            )
        checked += 1
    return VerifierCheck(checked, unchecked)


def _import(module_name: str, name: str, setting: str) -> Any:
    """Import a module, with the current directory last on the path during the import."""
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise TaskError(
                f"{setting} '{name}': expected an importable module '{module_name}', got none in the current "
                f"directory '{folder}' or the installed packages. Check the spelling or change directory."
            ) from error
        raise TaskError(f"{setting} '{name}': the module '{module_name}' failed to import: {error}.") from error
    except Exception as error:  # the user's code can raise anything; the cause is chained
        raise TaskError(
            f"{setting} '{name}': the module '{module_name}' failed to import: {type(error).__name__}: {error}. "
            f'To reproduce the error: python -c "import {module_name}"'
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
    except Exception as error:  # the user's code can raise anything; the cause is chained
        raise TaskError(
            f"the verifier of task '{task.name}' raised {type(error).__name__} ({error}) on the completion "
            f"{completion!r:.200} of example '{example.id}': expected a score in [0, 1]. A "
            "verifier must grade any text."
        ) from error
    return check_score(value, example, task.name)
