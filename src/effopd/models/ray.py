r"""`RayKL`: reverse KL to a teacher along W + sΔ, predicted from hidden states at a few scales.

    h(s) = Σ_j ℓ_j(s) h_j                          hidden states, interpolated through known scales
    a(s) = h(s) (W + s D)ᵀ + b + s d               output layer, exact in s
    z(s) = softcap · tanh(scale · a(s) / softcap) / temperature
    KL(s) = Σ_v π_s(v) (log π_s(v) − log π*(v)),   π_s = softmax z(s), in nats

The hidden states of a network are almost linear in s along a training update, so two forward passes
can predict a whole line. At a known scale the prediction is the true KL.

a(s) is a polynomial in s of degree q, the number of known scales:

    a(s) = Σ_j ℓ_j(s) a_j + Π_j (s − s_j) · h[s_1, …, s_q] Dᵀ

with a_j = a(s_j) and the divided difference h[…]. All scales together therefore cost q + 1 products
with the output layer (q if it does not move), and one for the teacher. The products are made tile
by tile. Nothing of size [N, V] is kept.

The positions are those of the rollouts that were passed in. The KL of a moved model on rollouts of
its own is another number.

Shapes: N positions, H hidden width, V shared vocabulary, K scales, q known scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from effopd.common.float64 import for_float64
from effopd.models.head import Head
from effopd.models.polynomials import Jet, lagrange_weights, leading_weights, root_product
from effopd.models.softmax_moments import Moments, joined, merged, tile_moments

#: Positions and vocabulary rows per tile, 4 MiB in float32. Of six sizes on a CPU, the fastest.
TILE = (256, 4096)

#: Limit of Newton steps in `RayKL.best`.
_MOST_STEPS = 60

#: Scales whose hidden states are interpolated: the same ones always, or chosen by scale.
Nodes = Sequence[float] | Callable[[float], Sequence[float]] | None


@dataclass(frozen=True)
class MovingHead:
    """Output layer along the line: weight W + s D and bias b + s d.

    Attributes:
        start: the output layer at s = 0. Its tensors must not move with the model (`Head.copied`).
        weight_delta: D, [V, H]; `None`: the weight does not move.
        bias_delta: d, [V]; `None`: the bias does not move.
    """

    start: Head
    weight_delta: Tensor | None = None
    bias_delta: Tensor | None = None

    @classmethod
    def between(cls, anchor: Head, start: Head) -> MovingHead:
        """The layer that is `anchor` at s = −1 and `start` at s = 0."""

        def moved(before: Tensor | None, now: Tensor | None) -> Tensor | None:
            if before is None or now is None or torch.equal(before, now):
                return None
            return now.detach() - before.detach().to(now.device)

        return cls(start, moved(anchor.weight, start.weight), moved(anchor.bias, start.bias))


class Derivatives(NamedTuple):
    """KL(s) and its derivatives at one scale, per position [N], in nats.

    With δ = z'(s), r = log π_s − log π* and expectations over π_s:

    Attributes:
        kl: KL(s).
        slope: KL'(s) = cov(δ, r).
        curvature: KL''(s) = var(δ) + cov((δ − Eδ)², r) + cov(z'', r).
        gauss_newton: var(δ), the curvature without the terms that vanish at the teacher.
    """

    kl: Tensor
    slope: Tensor
    curvature: Tensor
    gauss_newton: Tensor


def newton_scale(slope: float, curvature: float) -> float | None:
    """−slope / curvature, the step to the minimum of the parabola; `None`: it has no minimum."""
    return -slope / curvature if curvature > 0 else None


class _Point(NamedTuple):
    """One scale: the nodes' weights and that of the leading coefficient."""

    nodes: tuple[float, ...]
    weights: list[Jet]
    leading: Jet


class RayKL:
    """Predicted KL(π_s ‖ π*) at N positions along a line of weights.

    Computes in float32, or float64 if the hidden states are float64.

    Args:
        head: the student's output layer along the line.
        teacher: the teacher's output layer, with the same number of rows; `None`: a subclass
            has other logits of the teacher (`target_logits`).
        h_teacher_NH: the teacher's hidden states; `None`: as for `teacher`.
        temperature: divisor of both models' logits.
        tile: positions and vocabulary rows per tile. Memory: about q + 6 tiles.

    Example:
        >>> ray = RayKL(head, teacher_head, h_teacher)  # doctest: +SKIP
        >>> ray.add(0.0, h_start), ray.add(1.0, h_moved)  # doctest: +SKIP
        >>> ray.best([0.0, 1.0, 2.0, 4.0, 8.0])  # doctest: +SKIP
        5.3
    """

    def __init__(
        self,
        head: MovingHead,
        teacher: Head | None,
        h_teacher_NH: Tensor | None,
        *,
        temperature: float = 1.0,
        tile: tuple[int, int] = TILE,
    ):
        self._student, self._teacher, self._h_teacher = head, teacher, h_teacher_NH
        self._temperature, self._tile = temperature, tile
        self._hidden: dict[float, Tensor] = {}

    @property
    def known(self) -> tuple[float, ...]:
        """Scales with hidden states, ascending."""
        return tuple(sorted(self._hidden))

    def add(self, scale: float, h_NH: Tensor) -> None:
        """Set the hidden states of the model at W + `scale`·Δ."""
        self._hidden[float(scale)] = h_NH

    def drop(self, scale: float) -> None:
        """Release the hidden states of a scale."""
        del self._hidden[float(scale)]

    def around(self, scale: float) -> tuple[float, ...]:
        """0 and the known scales next to `scale`, as nodes of an interpolation; at least two.

        Beyond the largest known scale, 0 and that scale: a line extrapolates better than a
        parabola.
        """
        known = self.known
        below, above = (s for s in known if s < scale), (s for s in known if s >= scale)
        chosen = {max(below, default=0.0), min(above, default=0.0), 0.0} & set(known)
        nearest = sorted(set(known) - chosen, key=lambda s: abs(s - scale))
        return tuple(sorted({*chosen, *nearest[: max(0, 2 - len(chosen))]}))

    def kl(self, scales: Sequence[float], nodes: Nodes = None) -> Tensor:
        """KL(s) of every scale and position, [K, N], in nats.

        Args:
            nodes: known scales whose hidden states are interpolated, or a function of the scale
                (such as `around`). `None`: all.
        """
        log_z_N, sums = self._sweep([self._point(scale, nodes) for scale in scales], order=0)
        return torch.stack([m.gap - m.log_z + log_z_N for m in sums])

    def derivatives(self, scale: float = 0.0, nodes: Nodes = None) -> Derivatives:
        """KL, slope and curvature at one scale; arguments as for `kl`."""
        log_z_N, (m,) = self._sweep([self._point(scale, nodes)], order=2)
        slope, variance, skew, bend = m.central()
        return Derivatives(m.gap - m.log_z + log_z_N, slope, variance + skew + bend, variance)

    def slope_sums(self) -> tuple[float, float]:
        """Σ over positions of D′(0) and of the Gauss–Newton curvature E var_π(δz) at 0."""
        at = self.derivatives(0.0)
        slope, curvature = (float(for_float64(each).double().sum()) for each in (at.slope, at.gauss_newton))
        return slope, curvature

    def best(self, grid: Sequence[float], nodes: Nodes = None, tolerance: float = 1e-2) -> float:
        """The scale of the lowest mean KL within the range of `grid`.

        The best point of the grid, improved by Newton steps between its neighbors. Cost: one pass
        of `kl` for the grid, then one of `derivatives` per step, usually two or three.

        Args:
            grid: distinct scales.
            tolerance: stop when a step is shorter than this share of the scale.
        """
        grid = sorted(grid)
        means = self.kl(grid, nodes).double().mean(1).tolist()
        index = min(range(len(grid)), key=lambda i: (math.isnan(means[i]), means[i]))
        low, scale, high = grid[max(0, index - 1)], grid[index], grid[min(len(grid) - 1, index + 1)]
        for _ in range(_MOST_STEPS):
            at = self.derivatives(scale, nodes)
            slope, curvature = (float(x.double().mean()) for x in (at.slope, at.curvature))
            if slope == 0:
                break
            low, high = (low, scale) if slope > 0 else (scale, high)
            step = newton_scale(slope, curvature)
            new = math.inf if step is None else scale + step
            before, scale = scale, new if low <= new <= high else (low + high) / 2
            if abs(scale - before) <= tolerance * max(abs(scale), tolerance):
                break
        return scale

    # -- tiles -------------------------------------------------------------------------------------

    def _point(self, scale: float, nodes: Nodes) -> _Point:
        chosen = nodes(float(scale)) if callable(nodes) else self.known if nodes is None else nodes
        chosen = tuple(sorted(map(float, chosen)))
        return _Point(chosen, lagrange_weights(float(scale), chosen), root_product(float(scale), chosen))

    @torch.no_grad()
    def _sweep(self, points: Sequence[_Point], order: int) -> tuple[Tensor, list[Moments]]:
        """The teacher's log normalizer [N], and the moments of each point.

        Args:
            order: highest derivative of z that is needed, 0 or 2.
        """
        used = sorted({node for point in points for node in point.nodes})
        dtypes = {self._hidden[node].dtype for node in used}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        device = self._hidden[used[0]].device
        hidden = {node: self._hidden[node].to(device, dtype) for node in used}
        if self._h_teacher is not None:
            self._h_teacher = self._h_teacher.to(device, dtype)
        count = len(hidden[used[0]])
        leading = {
            nodes: _weighted([hidden[node] for node in nodes], leading_weights(nodes))
            for nodes in dict.fromkeys(point.nodes for point in points)
        }
        height = self._tile[0]
        chunks = [slice(first, first + height) for first in range(0, max(1, count), height)]
        log_z = torch.full((count,), -math.inf, dtype=dtype, device=device)
        sums: list[list[Moments | None]] = [[None] * len(chunks) for _ in points]
        for tile in self._tiles(used, dtype, device):  # outside, because every tile adds s D to its weights
            for index, rows in enumerate(chunks):
                a = {node: tile.student(h[rows], node) for node, h in hidden.items()}
                target = self.target_logits(tile, rows, a)
                log_z[rows] = torch.logaddexp(log_z[rows], target.logsumexp(-1))
                c = {nodes: tile.leading(h[rows], only=len(nodes) == 1) for nodes, h in leading.items()}
                for point, parts in zip(points, sums, strict=True):
                    z, *rest = self._logits(_combined(point, a, c[point.nodes], order), self._student.start)
                    parts[index] = merged(parts[index], tile_moments(z, target, *rest))
        return log_z, [joined([part for part in parts if part is not None]) for parts in sums]

    def _tiles(self, nodes: Sequence[float], dtype: torch.dtype, device: torch.device) -> Iterator[_Tile]:
        moving, start, teacher = self._student, self._student.start, self._teacher
        other = (None, None) if teacher is None else (teacher.weight, teacher.bias)

        def cut(tensor: Tensor | None, rows: slice) -> Tensor | None:
            return None if tensor is None else tensor.detach()[rows].to(device, dtype)

        def at(scale: float, part: Tensor | None, delta: Tensor | None) -> Tensor | None:
            return part if part is None or delta is None or scale == 0 else torch.add(part, delta, alpha=scale)

        for first in range(0, len(start.weight), self._tile[1]):
            rows = slice(first, first + self._tile[1])
            weight, bias = cut(start.weight, rows), cut(start.bias, rows)
            delta = cut(moving.weight_delta, rows), cut(moving.bias_delta, rows)
            student = {node: (at(node, weight, delta[0]), at(node, bias, delta[1])) for node in nodes}
            yield _Tile(first, student, (cut(other[0], rows), cut(other[1], rows)), delta)

    def target_logits(self, tile: _Tile, rows: slice, a: dict[float, Tensor]) -> Tensor:
        """The teacher's logits on a tile, up to one constant per position that all tiles share.

        Args:
            rows: positions.
            a: the student's a(s) at the nodes.
        """
        assert self._teacher is not None and self._h_teacher is not None, "without a teacher, a subclass has it"
        return self._logits([tile.teacher(self._h_teacher[rows])], self._teacher)[0]

    def _logits(self, parts: Sequence[Tensor], head: Head) -> list[Tensor]:
        """z from a, or z, z' and z'' from a, a' and a''."""
        if head.softcap is None:
            factor = head.scale / self._temperature
            return [part if factor == 1 else part * factor for part in parts]
        a, *rest = (part * head.scale for part in parts)
        bent = torch.tanh(a / head.softcap)
        if rest:
            (first, second), damped = rest, 1 - bent.square()
            rest = [first * damped, damped * (second - 2 / head.softcap * bent * first.square())]
        return [part / self._temperature for part in (head.softcap * bent, *rest)]


class _Tile(NamedTuple):
    """Rows (weight, bias) of the output layers from vocabulary row `first` on.

    They are those of the student at the nodes, of the teacher, and of Δ.
    """

    first: int
    nodes: dict[float, tuple[Tensor | None, Tensor | None]]
    target: tuple[Tensor | None, Tensor | None]
    delta: tuple[Tensor | None, Tensor | None]

    def student(self, h: Tensor, scale: float) -> Tensor:
        """a(s) at a node, from its hidden states."""
        return _product(h, *self.nodes[scale])

    def leading(self, h: Tensor, only: bool) -> Tensor | None:
        """Coefficient of s^q in a(s), from the divided difference; `None`: 0.

        Args:
            only: whether there is one node; the bias then has degree q, too.
        """
        weight, bias = self.delta[0], self.delta[1] if only else None
        if weight is None:
            return None if bias is None else bias.expand(len(h), -1)
        return _product(h, weight, bias)

    def teacher(self, h: Tensor) -> Tensor:
        """The result of the teacher's output layer."""
        return _product(h, *self.target)


def _product(h: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None, "every output layer has a weight"
    return torch.nn.functional.linear(h, weight, bias)


def _combined(point: _Point, a: dict[float, Tensor], c: Tensor | None, order: int) -> list[Tensor]:
    """a(s), or a, a' and a'' for order 2."""
    tensors, parts = [a[node] for node in point.nodes], []
    for k in range(order + 1):
        weights = [weight[k] for weight in point.weights]
        more = [] if c is None else [(c, point.leading[k])]
        parts.append(_weighted([*tensors, *(x for x, _ in more)], [*weights, *(w for _, w in more)]))
    return parts


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ weight · tensor; tensors with weight 0 are not read, so they can be infinite."""
    largest = torch.finfo(tensors[0].dtype).max
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        weight = min(max(weight, -largest), largest)
        if weight != 0:
            total = tensor * weight if total is None else total.add_(tensor, alpha=weight)
    return torch.zeros_like(tensors[0]) if total is None else total
