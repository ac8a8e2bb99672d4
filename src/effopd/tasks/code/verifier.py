"""Verifier of code tasks: grades answers in a pool of sandboxes, or with a remote runner."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from effopd.common.progress import Counted
from effopd.errors import TaskError
from effopd.tasks.base import Example, Grading
from effopd.tasks.code.compare import check_rules
from effopd.tasks.code.execution import ENDS, Outcome
from effopd.tasks.code.extract import extract_program
from effopd.tasks.code.grade import Rules, grade
from effopd.tasks.code.limits import Limits
from effopd.tasks.code.pool import Pool, default_workers
from effopd.tasks.code.sandbox import package_mounts
from effopd.tasks.verify import load_function

logger = logging.getLogger(__name__)

#: Metadata key of a row's tests, as `problem_of` returns them.
PROBLEM = "_problem"
_LIMITS = tuple(field.name for field in fields(Limits) if field.name != "seconds")
#: Settings of code tasks in task_args.
SETTINGS = ("score", "whitespace", "float_tolerance", "workers", "packages", "runner", *_LIMITS)
#: Answers in a batch from which on progress is shown.
_SHOW_PROGRESS = 64


class CodeVerifier:
    """1.0 if the program of an answer passes all cases of its row. Picklable.

    A copy has the same settings and its own sandboxes.

    Args:
        settings: the keys `SETTINGS` of task_args.
        timeout: wall-clock limit of one case, in seconds, unless the row has its own.

    Raises:
        TaskError: a setting is out of range.
    """

    #: What a completion must contain, for messages.
    sought = "Python program"

    def __init__(self, settings: Mapping[str, Any] | None = None, timeout: float = 5.0) -> None:
        settings = dict(settings or {})
        self._arguments = (settings, timeout)
        limits = {name: settings[name] for name in _LIMITS if name in settings}
        self.limits = Limits(seconds=timeout, **limits)
        self.rules = Rules(
            settings.get("score", "all"), settings.get("whitespace", "lines"), settings.get("float_tolerance", 1e-6)
        )
        check_rules(self.rules.whitespace, self.rules.tolerance)
        if self.rules.score not in ("all", "share"):
            raise TaskError(f"task_args: score: expected 'all' or 'share', got {self.rules.score!r}.")
        workers, packages = settings.get("workers", default_workers()), settings.get("packages", ["numpy"])
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise TaskError(f"task_args: workers: expected a whole number of at least 1, got {workers!r}.")
        if not isinstance(packages, list) or not all(isinstance(name, str) for name in packages):
            raise TaskError(f"task_args: packages: expected a list of module names, got {packages!r}.")
        runner = settings.get("runner")
        if runner is None:
            package_mounts(packages)
        self._runner = None if runner is None else load_function("runner", runner)
        self.pool = Pool(self.limits, workers, packages)

    def __reduce__(self) -> tuple[Any, ...]:
        return CodeVerifier, self._arguments

    def __call__(self, completion: str, example: Example) -> float:
        return self.grade_batch([completion], [example])[0].score

    def verify_batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Scores of several completions, one per example."""
        return [grading.score for grading in self.grade_batch(completions, examples)]

    def grade_batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Grading]:
        """Grades of several completions, one per example, in parallel.

        Raises:
            TaskError: an example has no tests.
            SandboxError: programs cannot be isolated here.
        """
        for example in examples:
            if PROBLEM not in example.metadata:
                raise TaskError(
                    f"cannot grade example '{example.id}': expected the row's tests in its metadata, got "
                    f"{sorted(example.metadata)}. Use examples made by load_task."
                )
        items = [
            (extract_program(text), example.metadata[PROBLEM])
            for text, example in zip(completions, examples, strict=True)
        ]
        if len(items) < _SHOW_PROGRESS:
            return self.pool.map(self._grade, items)
        with Counted(len(items), "grade programs", "answer", leave=False) as bar:
            return self.pool.map(self._grade, items, bar.update)

    def check(self) -> None:
        """Check that programs can be run, unless a remote runner runs them.

        Raises:
            SandboxError: programs cannot be isolated here.
        """
        if self._runner is None:
            self.pool.check()

    def _grade(self, run: Callable[..., Outcome], item: tuple[str | None, Mapping[str, Any]]) -> Grading:
        program, problem = item
        return grade(program, problem, run if self._runner is None else self._remote, self.limits, self.rules)

    def _remote(
        self, mode: str, jobs: list[dict[str, Any]], limits: Limits, stdin: str = "", seconds: float = 0.0
    ) -> Outcome:
        """One case by the remote runner, which returns the fields of an `Outcome`.

        Raises:
            TaskError: the runner raised an exception, or returned something else.
        """
        assert self._runner is not None
        request = {"jobs": jobs, "stdin": stdin, "seconds": seconds or limits.seconds, "limits": limits.resources()}
        try:
            answer = self._runner(mode, request)
        except Exception as error:
            raise TaskError(
                f"task_args: runner: expected a result for a case, got {type(error).__name__}: {error}. Correct the "
                "runner, or let it try again itself."
            ) from error
        try:
            outcome = Outcome(**answer)
        except TypeError:
            outcome = Outcome("")
        texts = (outcome.stdout, outcome.stderr, outcome.result)
        if outcome.end not in ENDS or not all(isinstance(text, str) for text in texts):
            raise TaskError(
                f"task_args: runner: expected a dict with 'end' ({', '.join(ENDS)}) and, as needed, the texts "
                f"'stdout', 'stderr' and 'result', got {answer!r:.200}. Correct the runner."
            )
        return outcome

    def answer_found(self, completion: str) -> bool:
        """Whether there is a program outside the reasoning."""
        return extract_program(completion) is not None
