"""Checks before training, on a few tokens: logits from hidden states, and the sampler."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from effopd.common.distributed import all_gather_or_raise, rank
from effopd.errors import CompatibilityError, NonFiniteLossError
from effopd.models.logit_path import LogitPath, is_whole, logit_path, remember
from effopd.models.sampler_check import Batching, batching, check_sampler, remember_batching


def check_models(student: Any, others: Mapping[str, Any], *, generates: bool, decoding: Collection[str] = ()) -> None:
    """Check that every model's logits follow from its hidden states, and check the sampler.

    `generate` must sample from the student's logits. Rank 0 measures for all ranks. A model whose
    weights are sharded or not materialized is measured at its first forward pass instead, and its
    sampler is not checked.

    Args:
        student: the model to be trained.
        others: role → model; `None`: the run has no such model.
        generates: whether `generate` samples the rollouts.
        decoding: roles of the others whose `generate` must match, too, because they decode rollouts
            token by token.

    Raises:
        CompatibilityError: a model's logits or sampler do not match; the message names its role.
        NonFiniteLossError: a model's hidden states are not finite.
    """
    for role, model in {"student": student, **others}.items():
        if model is not None:
            sampled = role in decoding or (generates and role == "student")
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
