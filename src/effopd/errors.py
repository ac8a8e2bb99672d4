"""Typed errors, each a subclass of `EffOPDError` and of a standard-library error.

A message names the field, the value it has, the value expected and the fix. Because `ConfigError`
is also a `ValueError`, code that does not know this package can still use `except ValueError`.
`assert` is reserved for bugs in this package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class EffOPDError(Exception):
    """Base class of all errors that `effopd` raises deliberately."""


class ConfigError(EffOPDError, ValueError):
    """A setting is out of range or contradicts another setting."""


class TaskError(EffOPDError, ValueError):
    """A task, its rows or its verifier is unusable."""


class SandboxError(EffOPDError, RuntimeError):
    """Programs cannot be run in isolation on this machine. Nothing was run."""


class CompatibilityError(EffOPDError, ValueError):
    """A model cannot be used, or student, teacher and tokenizer are incompatible."""


class WeightsError(EffOPDError, ValueError):
    """A tensor is missing, mis-shaped or non-finite."""


class NonFiniteWeightsError(WeightsError):
    """A candidate contains NaN or infinity. The search rejects it and training continues."""


class NonFiniteLossError(EffOPDError, ArithmeticError):
    """The loss or the model's predictions are NaN or infinite. No update used them."""


@contextmanager
def finite_predictions() -> Iterator[None]:
    """Turn torch's error about non-finite sampling probabilities into a `NonFiniteLossError`.

    Raises:
        NonFiniteLossError: the model has diverged.
    """
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise NonFiniteLossError(
            f"the model's predictions are not finite, so sampling failed ({error}). The weights "
            "have diverged: lower the learning rate and resume from an earlier checkpoint."
        ) from error


class ScorerError(EffOPDError, RuntimeError):
    """A scorer raised, or did not return a score. The weights were restored first."""


class TeacherServerError(EffOPDError, ConnectionError):
    """The teacher's server gave no usable reply after all retries. No update used its replies."""


class DivergenceError(EffOPDError, RuntimeError):
    """The ranks of a run no longer agree, or another rank failed."""


class CheckpointError(EffOPDError, OSError):
    """A checkpoint is missing, incomplete or from another run."""


class PluginError(EffOPDError, ImportError):
    """A plugin of another package cannot be imported."""


class MissingDependencyError(EffOPDError, ImportError):
    """A feature needs an optional package. The message gives the `pip install` line."""
