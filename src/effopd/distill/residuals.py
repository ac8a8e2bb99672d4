"""Lightning OPD 2.0: subtract the systematic bias of the teacher's scores of stored answers.

    d_t = log q(y_t) − log π_ref(y_t)
    b_t = (m_token(y_t) + m_place(position bin, surprisal bin)) / 2
    d*_t = d_t − b_t: log q(y_t) − b_t takes the place of log q(y_t) in the advantage

With a teacher that did not write the student's supervised data, part of d is a difference of style.
It recurs at the same tokens and places of all answers, so tables of means predict it. The part that
depends on the context remains.

Answers are divided into K folds, and the tables for a fold are means over the other folds. An
answer's own d therefore never enters its own b. In a table, the mean of cell c is

    m_c = (Σ_{t in c} w_t d_t + κ m) / (Σ_{t in c} w_t + κ),   κ = s · answers / tokens

with w_t = 1 / (length of the answer), so that all answers weigh the same, and m the mean of d with
these weights. κ is the weight of s average tokens: a cell with few tokens has nearly the mean m,
and a cell without tokens has exactly m. The position of token t in an answer of T tokens is t / T;
its surprisal is −log π_ref(y_t), in bins with equal weight in the fitting folds.

From arXiv 2607.28449 are d, the two tables, their average, equal weights of answers, cross-fitting
and m in unseen cells. K, the numbers of bins, their edges and the shrinkage are our choice.

Averaging keeps half of an effect that one table only can predict: if d = c(y) and tokens occur
alike at all places, d* = (c(y) − m) / 2. The target of training is proportional to q(y) exp(−b),
not to q(y).

Shapes: R answers, N tokens of all answers, one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effopd.distill.offline_store import StoredRollout

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Number of folds K.
FOLDS = 5
#: Bins of the position, and of the surprisal.
BINS = 10
#: Pseudo-weight s of the mean of all cells, in average tokens.
SHRINKAGE = 10.0


# -- tables ----------------------------------------------------------------------------------------


def token_weights(length_R: Ints) -> Floats:
    """1 / length of its answer for every token [N]: each answer has the total weight 1."""
    return np.repeat(1 / length_R, length_R)


def position_bins(length_R: Ints, bins: int = BINS) -> Ints:
    """⌊bins · t / T⌋ for token t = 0 … T − 1 of every answer [N].

    Example:
        >>> position_bins(np.array([4, 1]), bins=2).tolist()
        [0, 0, 1, 1, 0]
    """
    start_N = np.repeat(np.cumsum(length_R) - length_R, length_R)
    return bins * (np.arange(len(start_N)) - start_N) // np.repeat(length_R, length_R)


def quantiles(value_N: Floats, weight_N: Floats, bins: int = BINS) -> Floats:
    """Edges [bins − 1] between bins of equal weight; a value at an edge belongs to the lower bin.

    Edge k is the smallest value that has k / bins of the weight at or below it. The edges do not
    depend on the order of the values.

    Example:
        >>> quantiles(np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 2.0]), bins=4).tolist()
        [1.0, 2.0, 2.0]
    """
    order_N = np.lexsort((weight_N, value_N))
    share_N = np.cumsum(weight_N[order_N]) / weight_N.sum()
    level_K = np.arange(1, bins) / bins - 1e-9  # rounding of the sums must not move an edge
    return value_N[order_N][np.searchsorted(share_N, level_K)]


def shrunk_means(cell_N: Ints, value_N: Floats, weight_N: Floats, cells: int, pseudo_weight: float) -> Floats:
    """Weighted mean of the values per cell [cells], shrunk toward the mean of all values.

    Args:
        cell_N: cell of each value, from 0 to cells − 1.
        pseudo_weight: weight of the mean of all values in each cell (κ above, ≥ 0).

    Example:
        >>> shrunk_means(np.array([0, 0, 1]), np.array([1.0, 3, 5]), np.ones(3), 3, 1.0).tolist()
        [2.3333333333333335, 4.0, 3.0]
    """
    mean = float(weight_N @ value_N / weight_N.sum())
    weight_C = np.bincount(cell_N, weight_N, cells)
    sum_C = np.bincount(cell_N, weight_N * value_N, cells) + pseudo_weight * mean
    return np.divide(sum_C, weight_C + pseudo_weight, out=np.full(cells, mean), where=weight_C > 0)


# -- cross-fitting ---------------------------------------------------------------------------------


def folds_of(answers: int) -> Ints:
    """Fold of every answer [R]: its index modulo K."""
    return np.arange(answers) % FOLDS


def cross_fitted_bias(
    token_N: Ints,
    difference_N: Floats,
    surprisal_N: Floats,
    length_R: Ints,
    fold_R: Ints | None = None,
    shrinkage: float = SHRINKAGE,
) -> Floats:
    """b [N] in nats: for each fold, the average of two tables that are fitted on the other folds.

    Args:
        token_N: token ids y_t.
        difference_N: d_t = log q(y_t) − log π_ref(y_t), in nats.
        surprisal_N: −log π_ref(y_t), in nats.
        length_R: tokens of each answer, at least 1.
        fold_R: fold of each answer; at least two folds have answers. Default: `folds_of`.
        shrinkage: s above, in average tokens (≥ 0).
    """
    fold_R = folds_of(len(length_R)) if fold_R is None else fold_R
    fold_N, weight_N = np.repeat(fold_R, length_R), token_weights(length_R)
    place_N = position_bins(length_R)
    kinds, token_N = np.unique(token_N, return_inverse=True)
    bias_N = np.empty(len(token_N))
    for fold in np.unique(fold_R):
        held, fit = fold_N == fold, fold_N != fold
        edges = quantiles(surprisal_N[fit], weight_N[fit])
        cell_N = BINS * place_N + np.searchsorted(edges, surprisal_N)
        pseudo_weight = shrinkage * float(weight_N[fit].mean())
        tables = [
            shrunk_means(index_N[fit], difference_N[fit], weight_N[fit], cells, pseudo_weight)[index_N[held]]
            for index_N, cells in ((token_N, len(kinds)), (cell_N, BINS**2))
        ]
        bias_N[held] = (tables[0] + tables[1]) / 2
    return bias_N


# -- stored rows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class BiasSummary:
    """Size of the bias, over all tokens.

    `left` is the bias that tables of the same kind find in d*.

    Attributes:
        mean, mean_left: mean |b| in nats.
        large, large_left: share of tokens with |b| > 1 nat.
    """

    mean: float
    mean_left: float
    large: float
    large_left: float

    def text(self) -> str:
        """One line."""
        return (
            f"bias of the teacher: mean |b| {self.mean:.3f} nats, {self.mean_left:.3f} after residualizing; above "
            f"1 nat at {100 * self.large:.1f} % of the tokens, {100 * self.large_left:.1f} % after"
        )


def residualized(rows: Sequence[StoredRollout]) -> tuple[list[StoredRollout], BiasSummary]:
    """The rows with log q(y_t) − b_t as `teacher_logprobs`, and the size of b.

    A function of the rows alone. All other columns stay, including the teacher's top-K.

    Args:
        rows: at least two answers of the student.
    """
    length_R = np.array([len(row.completion_ids) for row in rows], dtype=np.int64)
    token_N = _joined([row.completion_ids for row in rows], np.int64)
    teacher_N, reference_N = (
        _joined(column, np.float64)
        for column in ([row.teacher_logprobs for row in rows], [row.student_logprobs for row in rows])
    )
    gap_N = teacher_N - reference_N
    bias_N = cross_fitted_bias(token_N, gap_N, -reference_N, length_R)
    left_N = cross_fitted_bias(token_N, gap_N - bias_N, -reference_N, length_R)
    means = [float(np.abs(each).mean()) for each in (bias_N, left_N)]
    shares = [float((np.abs(each) > 1).mean()) for each in (bias_N, left_N)]
    columns = np.split(teacher_N - bias_N, np.cumsum(length_R)[:-1])
    changed = [replace(row, teacher_logprobs=each.tolist()) for row, each in zip(rows, columns, strict=True)]
    return changed, BiasSummary(*means, *shares)


def _joined(columns: Sequence[Sequence[float]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.asarray(column, dtype=dtype) for column in columns])
