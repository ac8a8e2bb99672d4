"""Lagrange interpolation in one variable: weights, their derivatives, and divided differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Jet(NamedTuple):
    """A function's value and its first and second derivative at one point."""

    value: float
    first: float
    second: float


def root_product(x: float, roots: Iterable[float]) -> Jet:
    """Π (x − root) with its derivatives; exactly 0 at a root.

    Example:
        >>> root_product(3.0, [1.0, 2.0])
        Jet(value=2.0, first=3.0, second=2.0)
    """
    value, first, second = 1.0, 0.0, 0.0
    for root in roots:
        step = x - root
        value, first, second = value * step, first * step + value, second * step + 2 * first
    return Jet(value, first, second)


def lagrange_weights(x: float, nodes: Sequence[float]) -> list[Jet]:
    r"""$ℓ_j(x) = \prod_{k≠j} (x − x_k)/(x_j − x_k)$ of every node; at a node, exactly 0 and 1.

    Args:
        nodes: distinct numbers.

    Example:
        >>> [round(weight.value, 12) for weight in lagrange_weights(0.5, [0.0, 1.0, 2.0])]
        [0.375, 0.75, -0.125]
    """
    weights = []
    for index, node in enumerate(nodes):
        others = [*nodes[:index], *nodes[index + 1 :]]
        scale = root_product(node, others).value
        weights.append(Jet(*(part / scale for part in root_product(x, others))))
    return weights


def leading_weights(nodes: Sequence[float]) -> list[float]:
    """Weights of the values at `nodes` in the leading coefficient of their interpolation.

    Σ_j weight_j f(x_j) is the divided difference f[x_1, …, x_q].

    Example:
        >>> leading_weights([0.0, 1.0])  # the slope
        [-1.0, 1.0]
    """
    return [1 / math.prod(node - other for other in nodes if other != node) for node in nodes]
