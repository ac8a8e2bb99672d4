r"""Learning rate steered by the slope of the loss after each step, at no cost in forward passes.

    c_t = cos(∇L_{t+1}(W_{t+1}), Δ_t)
    Δ_t = W_{t+1} − W_t ∝ −η_g m_t / (√v_t + ε)  Adam's step, with bias-corrected moments, group g
    η ← η · min(max(exp(−2.3 (c_t + m)), ½), 2)
    m = 0.1 · min(max(1 + c_t / 0.2, 0), 1)          or 0: no margin

The gradient of step t+1 comes from rollouts that step t did not train on. Its product with Δ_t is
therefore an unbiased estimate of the slope of the loss along Δ_t, behind the step. Negative: the
step was too short. Positive: it was too long. Gradient clipping does not change the cosine. The
moments still hold Δ_t right before step t+1, so nothing has to be stored.

Without a margin, the rate settles where the slope behind a step is zero on average, so where steps
end at the minimum along them. Adam then enlarges what the gradients disagree on, and the loss
swings. With the margin m it settles at c = −1/15, where steps end before their minimum, and it
falls when gradients are noise. A rate that is far too low (c ≤ −0.2) rises as fast as without it.
The margin applies after the first search, above half of the rate which that search set.

A schedule-free optimizer evaluates an average x of its base sequence z and takes gradients at y
between both. There Δ_t is the direction z − y, and the margin 0.03 in the place of 0.1, up to the
rate that a run with several updates per batch settles at.

Source: hypergradient descent (arXiv 1703.04782) with the cosine in the place of the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effopd.common.distributed import all_gather_object, local_shard
from effopd.common.zero import base_optimizer, zero_optimizer, zero_steps
from effopd.extrapolate.weight_copies import has_modes

#: −c · GAIN is the change of the logarithm of the learning rate; c = −0.3 doubles it.
GAIN = 2.3
#: Margin at c ≥ 0, under a schedule-free optimizer, and the cosine at and below which it is 0.
MARGIN, MARGIN_IF_AVERAGED, NO_MARGIN = 0.1, 0.03, -0.2
#: Largest change per step, as a factor.
LARGEST = 2.0


def steering_factor(cosine: float, margin: float = 0.0) -> float:
    """Learning-rate multiplier from the cosine of the new gradient and the last step.

    Args:
        cosine: c_t.
        margin: m at c_t ≥ 0.

    Example:
        >>> steering_factor(0.0), steering_factor(-1.0), steering_factor(1.0)
        (1.0, 2.0, 0.5)
        >>> [round(steering_factor(c, margin=0.1), 3) for c in (0.0, -1 / 15)]
        [0.795, 1.0]
    """
    shift = margin * min(max(1 - cosine / NO_MARGIN, 0.0), 1.0)
    return min(max(math.exp(-GAIN * (cosine + shift)), 1 / LARGEST), LARGEST)


@torch.no_grad()
def slope_cosine(optimizer: Any) -> float | None:
    """cos(gradient, last step) over all parameters and ranks; call it right before a step.

    The last step is that of Adam, or the direction z − y of a schedule-free optimizer.

    Args:
        optimizer: a torch optimizer, or DeepSpeed's ZeRO optimizer.

    Returns:
        `None`: no Adam moments or base sequence yet (first step, cleared, another optimizer), or
        not finite.
    """
    parts: dict[torch.device, list[Tensor]] = {}
    for grad, move in _moves(optimizer):
        parts.setdefault(grad.device, []).append(
            torch.stack([(grad * move).sum(), grad.square().sum(), move.square().sum()])
        )
    local = sum((torch.stack(each).cpu().double().sum(0) for each in parts.values()), torch.zeros(3).double())
    # replicas multiply all three sums alike, so shards and replicas need no distinction
    product, gradient, step = torch.tensor(all_gather_object(local.tolist())).double().sum(0).tolist()
    squared = gradient * step
    return product / math.sqrt(squared) if 0 < squared < math.inf and math.isfinite(product) else None


def _moves(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(gradient, last step up to a positive factor), fp32, of every parameter that has both."""
    longest = max((float(group["lr"]) for group in base_optimizer(optimizer).param_groups), default=0.0)
    if zero_optimizer(optimizer) is not None:
        for grad, state, group in zero_steps(optimizer):
            yield grad.float(), _adam_step(state, group, longest)
        return
    averaged = has_modes(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if parameter.grad is None:
                continue
            if "exp_avg" in state and "exp_avg_sq" in state and "betas" in group:
                if state["exp_avg"].shape != parameter.grad.shape:  # moments of a projection: GaLore, APOLLO
                    continue
                move = _adam_step(state, group, longest)
            elif averaged and "z" in state:
                move = local_shard(state["z"]).float() - local_shard(parameter).float()
            else:
                continue
            grad = local_shard(parameter.grad).float()
            yield -grad if group.get("maximize") else grad, move  # the moments are those of −gradient then


def _adam_step(state: Mapping[str, Any], group: Mapping[str, Any], longest: float) -> Tensor:
    """−η m / (√v + ε) with the bias-corrected v; the correction of m is a common factor.

    η: the group's rate over the largest one, which is 1 if all groups have the same rate.
    """
    first, second = (local_shard(state[name]).float() for name in ("exp_avg", "exp_avg_sq"))
    step = state.get("step", group.get("step"))  # some optimizers count per group, some not at all
    variance = second / (1.0 if step is None else 1 - group["betas"][1] ** float(step))
    move = first / variance.sqrt_().add_(group["eps"]).neg_()
    return move if longest <= 0 else move.mul_(float(group["lr"]) / longest)
