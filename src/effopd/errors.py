"""Typed errors: what was expected, what came, what to do.

Every error a user can cause derives from `EffOPDError` *and* from the standard-library error it
specialises, so `except ValueError` keeps working in code that does not know this package. Plain
`assert` is for our own bugs only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class EffOPDError(Exception):
    """Base of every error raised by `effopd` on purpose."""


class ConfigError(EffOPDError, ValueError):
    """A setting is out of range or contradicts another one."""


class TaskError(EffOPDError, ValueError):
    """A task, its rows or its verifier cannot be used."""


class CompatibilityError(EffOPDError, ValueError):
    """Student, teacher and tokenizer do not fit together."""


class WeightsError(EffOPDError, ValueError):
    """A tensor is missing, mis-shaped or non-finite."""


class NonFiniteWeightsError(WeightsError):
    """A candidate point contains NaN or infinity; the candidate is rejected, training goes on."""


class NonFiniteLossError(EffOPDError, ArithmeticError):
    """The loss, or what the model predicts, is NaN or infinite; nothing was updated with it."""


@contextmanager
def finite_predictions() -> Iterator[None]:
    """Around sampling: torch's complaint about probabilities that are not finite becomes a
    `NonFiniteLossError`.

    Raises:
        NonFiniteLossError: the model has diverged.
    """
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise NonFiniteLossError(
            "the model's predictions are not finite, so nothing can be sampled from them "
            f"({error}). The weights have diverged: "
            "lower the learning rate, and resume from an earlier checkpoint."
        ) from error


class ScorerError(EffOPDError, RuntimeError):
    """A scorer raised or returned something that is not a score; the weights were restored
    first.
    """


class DivergenceError(EffOPDError, RuntimeError):
    """The processes of a run are not in lock step any more, or another one of them failed."""


class CheckpointError(EffOPDError, OSError):
    """A checkpoint is missing, incomplete or does not belong to this run."""


class MissingDependencyError(EffOPDError, ImportError):
    """An optional package is needed for this feature; the message names the extra to install."""
