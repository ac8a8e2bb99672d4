"""Metrics of one matrix: of a single update, of two updates, and of a path of updates.

Files, tables and layers are left to other modules. Leading directions are stored in float32 on the
CPU, which keeps angles accurate to about 1e-5 degrees. Every value is computed in float64.

Metrics of a direction that the update does not determine are NaN. Its singular value is zero (at
step 0, in matrices that an adapter does not touch, beyond the rank of an adapter), repeated, or so
small relative to s_1 that the error bound of `weights.leading` reaches 90°.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effopd.analysis.directions import align_signs, explained_variance, plane, random_walk_null, tsne
from effopd.analysis.embeddings import embedding_metrics, embedding_plane
from effopd.analysis.sparsity import entry_metrics, principal_overlap
from effopd.analysis.subspaces import counterpart_cosines, principal_angles, projector_overlaps, spectral_shift
from effopd.weights import Update
from effopd.weights.leading import Leading, leading_directions, leading_of_factors
from effopd.weights.spectrum import factor_singular_values, singular_values, spectrum_metrics

#: Names accepted by `metrics`. Update norms are always measured: shares need them.
GROUPS = ("norms", "entries", "spectrum", "subspaces", "directions", "embeddings", "rotation")
#: Directions with s_k below this share of s_1 count as rounding.
_RANK_TOLERANCE = 1e-12
#: Error (degrees) added by float32 storage, per direction.
_STORAGE = math.degrees(2.0**-23)
_DRAWS = 200


@dataclass(frozen=True)
class Options:
    """Settings of the measurements.

    Attributes:
        k: number of leading directions.
        metrics: names from `GROUPS`.
        base_spectrum: also compute all singular values of W0 and W_T (`base_spectral_shift`).
        seed: of the random start of the directions, of nulls and pictures.
        device: device of the computations, e.g. "cpu" or "cuda".
    """

    k: int = 20
    metrics: tuple[str, ...] = GROUPS
    base_spectrum: bool = False
    seed: int = 0
    device: str = "cpu"

    @property
    def wants_directions(self) -> bool:
        """Whether any metric needs the leading directions of updates."""
        return bool({"subspaces", "directions"} & set(self.metrics))


@dataclass(frozen=True)
class Directions:
    """Leading directions of an update: float32 u [M, K] and v [N, K] on the CPU, float64 s [K].

    Attributes:
        angle_bound_K: error bound of the leading-k subspaces for each k, in degrees. 90 means that
            nothing is proven: singular values k and k + 1 are equal, or within rounding.
        rank: number of singular values above 1e-12 · s_1.
    """

    u_MK: Tensor
    s_K: Tensor
    v_NK: Tensor
    angle_bound_K: Tensor
    rank: int

    @classmethod
    def of(cls, leading: Leading) -> Directions:
        """Round `leading` to float32 and count its nonzero directions."""
        s = leading.s_K.to(torch.float64)
        rank = int((s > _RANK_TOLERANCE * s[0]).sum()) if len(s) and s[0] > 0 else 0
        sizes = torch.arange(1, len(s) + 1, dtype=torch.float64)
        bound = (leading.angle_bound_K.rad2deg() + _STORAGE * sizes).clamp(max=90.0)
        return cls(leading.u_MK.float().cpu(), s.cpu(), leading.v_NK.float().cpu(), bound, rank)

    @property
    def has_first(self) -> bool:
        """Whether u_1 is determined."""
        return self.rank > 0 and float(self.angle_bound_K[0]) < 90.0


class BaseOfPart:
    """Decompositions of W0, computed once per matrix and shared by all runs."""

    def __init__(self, base_MN: Tensor, options: Options):
        self._base, self._options = base_MN, options
        self._leading: Leading | None = None
        self._spectrum: Tensor | None = None

    def leading(self) -> Leading:
        """The K leading directions of W0."""
        if self._leading is None:
            self._leading = leading_directions(self._base, None, self._options.k, self._options.seed)
        return self._leading

    def spectrum(self) -> Tensor:
        """All singular values of W0, on the CPU."""
        if self._spectrum is None:
            self._spectrum = singular_values(self._base).cpu()
        return self._spectrum


def measure_update(update: Update, options: Options) -> tuple[dict[str, float], Directions | None]:
    """Metrics of one update, and its leading directions.

    Always included: `parameters` (element count), `frobenius_norm`, and for matrices `rows` and
    `columns`. `options.metrics` adds `entry_metrics`, `spectrum_metrics` and, for embeddings and
    heads, `embedding_metrics` (heads: the share of moved rows only).

    Returns:
        the metrics, and the directions. `None` for vectors, for an update of zero, or if no metric
        needs directions.
    """
    part = update.part
    metrics = {"parameters": float(math.prod(part.shape)), "frobenius_norm": update.norm()}
    moved = metrics["frobenius_norm"] > 0.0
    if part.is_matrix:
        metrics |= {"rows": float(part.shape[0]), "columns": float(part.shape[1])}
    if "entries" in options.metrics:
        metrics |= entry_metrics(update.base, update.trained)
    if "spectrum" in options.metrics and part.is_matrix:
        metrics |= spectrum_metrics(_spectrum(update, moved), (part.shape[0], part.shape[1]))
    if "embeddings" in options.metrics and part.is_matrix and part.place.module in ("embedding", "head"):
        values = embedding_metrics(update.base, update.trained)
        keep = values if part.place.module == "embedding" else ("rows_moved_share",)
        metrics |= {name: values[name] for name in keep}
    if not (options.wants_directions and part.is_matrix and moved):
        return metrics, None
    if update.factors is not None:
        leading = leading_of_factors(*update.factors, options.k)
    else:
        leading = leading_directions(update.trained, update.base, options.k, options.seed)
    return metrics, Directions.of(leading)


def _spectrum(update: Update, moved: bool) -> Tensor:
    if not moved:
        return torch.zeros(min(update.part.shape), dtype=torch.float64)
    if update.factors is not None:
        return factor_singular_values(*update.factors).cpu()
    return singular_values(update.trained, update.base).cpu()


def measure_base(update: Update, base: BaseOfPart, options: Options) -> dict[str, float]:
    """Change of W0's own leading subspaces, principal entries and spectrum in W_T.

    - `base_rotation_left_max_degrees`, `base_rotation_left_mean_degrees`: principal angles between
      the K leading left subspaces of W0 and W_T; right likewise
    - `base_rotation_bound_degrees`: error bound of these angles
    - `principal_overlap`: `sparsity.principal_overlap` with the rank-K part of W0
    - `base_spectral_shift` (with `options.base_spectrum`): `subspaces.spectral_shift`

    Angles and overlap are NaN if W0 or W_T is zero; angles also if the bound is 90. With k at least
    the shorter side, the subspace of that side is the whole space and its angles are 0.

    Source: arXiv 2606.07082, 2606.13657.
    """
    metrics: dict[str, float] = {}
    if "rotation" in options.metrics:
        before, after = base.leading(), leading_directions(update.trained, None, options.k, options.seed)
        defined = bool(before.s_K[0] > 0 and after.s_K[0] > 0)
        bound = min(90.0, float((before.angle_bound_K[-1] + after.angle_bound_K[-1]).rad2deg()))
        for side, u, w in (("left", before.u_MK, after.u_MK), ("right", before.v_NK, after.v_NK)):
            known = defined and (bound < 90.0 or u.shape[0] == u.shape[1])
            angles = principal_angles(u, w) if known else torch.tensor([math.nan])
            metrics[f"base_rotation_{side}_max_degrees"] = float(angles[-1])
            metrics[f"base_rotation_{side}_mean_degrees"] = float(angles.mean())
        metrics["base_rotation_bound_degrees"] = bound
        metrics["principal_overlap"] = (
            principal_overlap(update.base, update.trained, before.u_MK, before.s_K, before.v_NK)
            if defined
            else math.nan
        )
    if options.base_spectrum:
        metrics["base_spectral_shift"] = spectral_shift(singular_values(update.trained).cpu(), base.spectrum())
    return metrics


def compare(one: Directions | None, other: Directions | None, size: int) -> dict[str, list[float]]:
    """Similarity of two updates of the same matrix, for k = 1 … `size`.

    - `left_cosine`, `right_cosine`: |cos| between the k-th directions
    - `left_overlap`, `right_overlap`: ‖U_kᵀW_k‖²/k of the leading-k subspaces
    - `left_angle_max`, `right_angle_max`: their largest principal angle, degrees
    - `angle_bound`: error bound of these angles, degrees; 90 if nothing is proven

    NaN beyond the rank of either update and if one of them is zero. All but `angle_bound` are also
    NaN where the bound is 90. A cosine needs a bound below 90 for k − 1 as well, because the k-th
    direction is the difference of the two subspaces.
    """
    names = [f"{side}_{reading}" for reading in ("cosine", "overlap", "angle_max") for side in ("left", "right")]
    values = {name: [math.nan] * size for name in [*names, "angle_bound"]}
    if one is None or other is None:
        return values
    common = min(one.rank, other.rank, size)
    bound = (one.angle_bound_K[:common] + other.angle_bound_K[:common]).clamp(max=90.0)
    proven = bound < 90.0
    before = torch.cat([torch.ones(1, dtype=torch.bool), proven])[:common]
    for side, a, b in (("left", one.u_MK, other.u_MK), ("right", one.v_NK, other.v_NK)):
        u, w = a[:, :common].to(torch.float64), b[:, :common].to(torch.float64)
        angles = [float(principal_angles(u[:, :k], w[:, :k])[-1]) if proven[k - 1] else math.nan
                  for k in range(1, common + 1)]  # fmt: skip
        values[f"{side}_cosine"][:common] = _where(proven & before, counterpart_cosines(u, w))
        values[f"{side}_overlap"][:common] = _where(proven, projector_overlaps(u, w))
        values[f"{side}_angle_max"][:common] = angles
    values["angle_bound"][:common] = bound.tolist()
    return values


def _where(known: Tensor, values: Tensor) -> list[float]:
    return torch.where(known, values, torch.full_like(values, math.nan)).tolist()


def path_of_u1(
    steps: Sequence[int], u1_by_step: Mapping[int, Tensor], options: Options, picture: bool
) -> tuple[dict[str, float], list[tuple[int, dict[str, float]]]]:
    """Planarity of the path of u1, compared with random walks; signs are aligned forward in time.

    - `u1_evr`: share of variance explained by the first two components
    - `u1_evr_null_mean`: mean of the same for random walks with the same step lengths
    - `u1_evr_null_p`: (1 + walks with at least the observed value) / (1 + walks)

    Args:
        steps: steps at which the matrix had moved, ascending.
        u1_by_step: u1 [M] at each of them.
        picture: also compute t-SNE coordinates (needs at least four steps).

    Returns:
        the metrics, and for each step its coordinates pc1, pc2 (tsne1, tsne2). Both are empty with
        fewer than three steps.
    """
    if len(steps) < 3:
        return {}, []
    u_TM = align_signs(torch.stack([u1_by_step[step] for step in steps]).to(torch.float64))
    observed = explained_variance(u_TM)
    null = random_walk_null(u_TM, _DRAWS, options.seed)
    p = (1 + int((null >= observed).sum())) / (1 + len(null)) if math.isfinite(observed) else math.nan
    metrics = {"u1_evr": observed, "u1_evr_null_mean": float(null.mean()), "u1_evr_null_p": p}
    pictures = {"pc": plane(u_TM)}
    if picture and len(steps) >= 4:
        pictures["tsne"] = tsne(u_TM, options.seed)
    points = [
        (step, {f"{name}{axis + 1}": float(xy[i, axis]) for name, xy in pictures.items() for axis in (0, 1)})
        for i, step in enumerate(steps)
    ]
    return metrics, points


def embedding_picture(update: Update, seed: int) -> dict[str, list[float]]:
    """`embedding_plane` as columns base_pc1, base_pc2, trained_pc1, trained_pc2."""
    base, trained = embedding_plane(update.base, update.trained, seed=seed)
    return {
        f"{name}_pc{axis + 1}": points[:, axis].tolist()
        for name, points in (("base", base), ("trained", trained))
        for axis in (0, 1)
    }
