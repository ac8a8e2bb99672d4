"""The models of a run are what loss, scores and sampler take them for; measured on a few tokens,
before training.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from effopd.common.distributed import all_gather_or_raise, rank
from effopd.errors import CompatibilityError, NonFiniteLossError
from effopd.models.logit_path import LogitPath, is_whole, logit_path, remember
from effopd.models.sampler_check import Batching, batching, check_sampler, remember_batching


def check_models(student: Any, others: Mapping[str, Any], *, generates: bool) -> None:
    """Logits of student and others follow from their hidden states, and `generate` samples from
    those of the student.

    The first rank measures for all. Models whose weights are sharded or elsewhere by now are
    measured at their first forward, which all ranks make together (their sampler is not).

    Args:
        others: role → model, or `None` where the run has none.
        generates: whether `generate` samples the rollouts.

    Raises:
        CompatibilityError, NonFiniteLossError: a model is none of this; the message names its role.
    """
    for role, model in {"student": student, **others}.items():
        if model is not None:
            sampled = generates and role == "student"
            measured = all_gather_or_raise(partial(_measured, model, role, sampled))[0]
            if measured is not None:
                path, groups = measured
                remember(model, path)
                if groups is not None:
                    remember_batching(model, groups)


def _measured(model: Any, role: str, sampled: bool) -> tuple[LogitPath, Batching | None] | None:
    if rank() > 0 or not is_whole(model):
        return None
    try:
        path = logit_path(model)
        if not sampled:
            return path, None
        check_sampler(model)
        return path, batching(model)
    except (CompatibilityError, NonFiniteLossError) as error:
        raise type(error)(f"the {role} cannot be used. {error}") from error
