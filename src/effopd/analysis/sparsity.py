r"""Changed entries of a tensor: their share, size, and overlap with small and principal entries.

Tensors stream in blocks: temporaries take a few megabytes (a few hundred on an accelerator) for
any size of tensor. Nothing is sorted. Order statistics come from histograms of the bit patterns of
|w|, 16 bits at a time, which order like the numbers. They are exact, ties included, with one pass
for 16-bit weights and two for float32.

M below is the set of *changed* entries: those that differ after both sides are rounded to bfloat16,
the precision in which models are served.

Differs from the sources: a bf16 matrix has thousands of entries of exactly the same magnitude, so
"the 30 % smallest" is ambiguous. Ties at the threshold count fractionally, which is the expected
overlap if they are broken at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from effopd.errors import WeightsError

#: Relative change above which an entry counts in `update_density`.
RELATIVE_CHANGE = 1e-3
#: Share of entries in the low-magnitude and in the principal mask.
ALPHA = 0.3

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Elements per block: one fits a core's cache, the other keeps an accelerator busy.
_BLOCK, _DEVICE_BLOCK = 2**18, 2**24

#: Yields (magnitudes, changed) in blocks, the same at every call.
_Stream = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def entry_metrics(base: Tensor, trained: Tensor) -> dict[str, float]:
    r"""Entrywise metrics of Δ = W₊ − W0; differences and sums in float64.

    - `bf16_unchanged_share`: share of entries equal after rounding both sides to bfloat16 (−0
        equals 0)
    - `update_density`: share with |w₊ − w| > 10⁻³ · max(|w|, |w₊|)
    - `max_abs_update`: max |Δ|, in the unit of the weights
    - `relative_norm`: ‖Δ‖/‖W0‖
    - `low_magnitude_overlap`: |M ∩ the ⌊0.3 n⌋ entries of smallest |W0|| / |M|, M the bf16-changed
      entries; ties at the threshold count fractionally
    - `low_magnitude_overlap_chance`: ⌊0.3 n⌋/n, the expected value for an M independent of W0
    - `rounding_noise_to_update`: $\sqrt{\sum (\mathrm{ulp}(w)^2 + \mathrm{ulp}(w_+)^2) / 12} /
      ‖Δ‖$, the expected norm of the error of rounding both sides to their stored dtypes, relative
      to the update. Near 1 and above, the spectrum of Δ is dominated by rounding

    Ratios with a zero denominator (Δ = 0, W0 = 0, M empty, no entries) are NaN.

    Args:
        base, trained: tensors of the same shape, with any strides, in bf16, fp16, fp32 or fp64; the
            dtypes can differ. Both on one device, which needs float64.

    Raises:
        WeightsError: the shapes differ, or a dtype is not supported.

    Source: arXiv 2606.07082, 2606.13657; masks and the bf16 comparison after arXiv 2511.08567.
    """
    _check(base, trained)
    n = base.numel()
    sums = _Sums(base.device)
    for b, w in _blocks(base, trained):
        sums.add(b, w)
    changed, update = int(sums.changed), float(sums.delta_square.sqrt())
    m = math.floor(ALPHA * n)
    ulps = _ulp_squares(sums.magnitudes[0], base.dtype) + _ulp_squares(sums.magnitudes[2], trained.dtype)

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        return ((b, _changed(b, w)) for b, w in _blocks(base, trained))

    return {
        "bf16_unchanged_share": 1.0 - _divide(changed, n),
        "update_density": _divide(int(sums.dense), n),
        "max_abs_update": float(sums.max_abs) if n else math.nan,
        "relative_norm": _divide(update, float(sums.base_square.sqrt())),
        "low_magnitude_overlap": _divide(_smallest(sums.magnitudes[:2], stream, m, base.dtype), changed),
        "low_magnitude_overlap_chance": _divide(m, n),
        "rounding_noise_to_update": _divide(math.sqrt(ulps / 12), update),
    }


def principal_overlap(
    base: Tensor, trained: Tensor, u_MK: Tensor, s_K: Tensor, v_NK: Tensor, alpha: float = ALPHA
) -> float:
    """|M ∩ top-α entries of |W0's rank-K part|| / |M|, M the bf16-changed entries; NaN if M = ∅.

    The principal weights are the ⌊α · rows · columns⌋ largest entries of |U S Vᵀ|, rebuilt in
    float64 block by block and rounded to float32 for ranking. Ties at the threshold count
    fractionally. An M independent of W0 gives α on average.

    Args:
        base, trained: [M, N], as in `entry_metrics`.
        u_MK, s_K, v_NK: the leading singular triplets of W0.

    Raises:
        WeightsError: shapes do not fit, or a dtype is not supported.
        ValueError: alpha is outside 0–1.

    Source: arXiv 2606.07082; the mask is that of arXiv 2511.08567.
    """
    _check(base, trained)
    k = len(s_K)
    if base.ndim != 2 or u_MK.shape != (base.shape[0], k) or v_NK.shape != (base.shape[1], k):
        raise WeightsError(
            f"W0 of shape {tuple(base.shape)} does not fit singular triplets u {tuple(u_MK.shape)}, "
            f"s {tuple(s_K.shape)}, v {tuple(v_NK.shape)}: expected [M, K], [K], [N, K] of the same matrix."
        )
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}.")
    left_MK = (u_MK.to(torch.float64) * s_K.to(torch.float64)).to(base.device)
    right_KN = v_NK.to(base.device, torch.float64).T.contiguous()
    if _is_transposed(base):
        base, trained, left_MK, right_KN = base.T, trained.T, right_KN.T.contiguous(), left_MK.T.contiguous()
    rows = max(1, _block_size(base) // max(1, base.shape[1]))

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, len(base), rows):
            part = slice(i, i + rows)
            rebuilt = (left_MK[part] @ right_KN).to(torch.float32)
            yield rebuilt.reshape(-1), _changed(base[part], trained[part]).reshape(-1)

    first = torch.zeros(2, 2**16, dtype=torch.int64, device=base.device)
    for magnitudes, changed in stream():
        keys = _keys(magnitudes)
        first += torch.stack([_histogram(keys, 16), _histogram(keys[changed], 16)])
    n, m = base.numel(), math.floor(alpha * base.numel())
    changed_count = int(first[1].sum())
    return _divide(changed_count - _smallest(first, stream, n - m, torch.float32), changed_count)


class _Sums:
    """Running totals of one pass, kept on the device of the tensors."""

    def __init__(self, device: torch.device):
        self.base_square = torch.zeros((), dtype=torch.float64, device=device)
        self.delta_square = self.base_square.clone()
        self.max_abs = self.base_square.clone()
        self.dense = torch.zeros((), dtype=torch.int64, device=device)
        self.changed = self.dense.clone()
        # histograms of the 16 leading bits of |w|, of |w| where changed, and of |w₊|
        self.magnitudes = torch.zeros(3, 2**16, dtype=torch.int64, device=device)

    def add(self, b: Tensor, w: Tensor) -> None:
        b_keys, w_keys, changed = _keys(b), _keys(w), _changed(b, w)
        b_shift, w_shift = 8 * b.element_size() - 16, 8 * w.element_size() - 16
        self.magnitudes[0] += _histogram(b_keys, b_shift)
        self.magnitudes[1] += _histogram(b_keys[changed], b_shift)
        self.magnitudes[2] += _histogram(w_keys, w_shift)
        self.changed += changed.sum()
        b, w = b.to(torch.float64), w.to(torch.float64)
        delta = w - b
        self.base_square += b.dot(b)
        self.delta_square += delta.dot(delta)
        delta.abs_()
        self.max_abs = torch.maximum(self.max_abs, delta.max())
        # float64 inputs are not copied by .to(): never modify b and w in place
        self.dense += (delta > torch.maximum(b.abs(), w.abs()).mul_(RELATIVE_CHANGE)).sum()


def _smallest(first: Tensor, stream: _Stream, m: int, dtype: torch.dtype) -> float:
    """Number of changed entries among the m of smallest magnitude; ties count fractionally.

    Args:
        first: histograms of the 16 leading bits, of all entries and of the changed ones.
        stream: read once more for each further 16 bits of `dtype`, to split the threshold's bin.
    """
    shift = 8 * dtype.itemsize - 16
    counts, prefix, below, inside = first, 0, 0, 0
    while True:
        cumulated = counts.cumsum(1)
        digit = int((cumulated[0] < m - below).sum())
        if digit:
            below += int(cumulated[0, digit - 1])
            inside += int(cumulated[1, digit - 1])
        if shift == 0:
            ties, changed_ties = (int(count) for count in counts[:, digit])
            return inside + (m - below) / ties * changed_ties if ties else float(inside)
        prefix = (prefix << 16) | digit
        shift -= 16
        counts = torch.zeros_like(first)
        for magnitudes, changed in stream():
            keys = _keys(magnitudes)
            in_bucket = keys >> (shift + 16) == prefix
            keys, changed = keys[in_bucket], changed[in_bucket]
            counts += torch.stack([_histogram(keys, shift), _histogram(keys[changed], shift)])


def _keys(x: Tensor) -> Tensor:
    """Bit patterns of |x| as integers; they order like |x|."""
    return x.contiguous().view(_BITS[x.element_size()]) & torch.iinfo(_BITS[x.element_size()]).max


def _histogram(keys: Tensor, shift: int) -> Tensor:
    """Counts [65536] of the 16 bits of `keys` above `shift`."""
    digits = keys >> shift if shift else keys
    if keys.element_size() > 2:
        digits = digits & 0xFFFF
    return torch.bincount(digits, minlength=2**16)


def _changed(b: Tensor, w: Tensor) -> Tensor:
    return b.to(torch.bfloat16) != w.to(torch.bfloat16)


def _ulp_squares(counts: Tensor, dtype: torch.dtype) -> float:
    """Σ ulp(w)² from a histogram of the 16 leading bits, which contain the exponents."""
    info = torch.finfo(dtype)
    mantissa = round(-math.log2(info.eps))
    exponent_bits = 8 * dtype.itemsize - 1 - mantissa
    exponents = torch.arange(2**16, device=counts.device) >> (15 - exponent_bits)
    per_exponent = torch.bincount(exponents, counts.to(torch.float64)).tolist()
    lowest = round(math.log2(info.tiny))
    # exponent field 0 holds zero and the subnormals, spaced like field 1
    return math.fsum(
        count * 4.0 ** (lowest + max(field, 1) - 1 - mantissa) for field, count in enumerate(per_exponent) if count
    )


def _blocks(base: Tensor, trained: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat blocks of corresponding entries in memory order; each entry once."""
    if base.numel() <= _block_size(base):
        if base.numel():
            yield base.reshape(-1), trained.reshape(-1)
        return
    if base.ndim == 2 and _is_transposed(base):
        base, trained = base.T, trained.T
    slab = base.numel() // len(base)
    if slab > _block_size(base):
        for b, w in zip(base, trained, strict=True):
            yield from _blocks(b, w)
    else:
        rows = max(1, _block_size(base) // slab)
        for b, w in zip(base.split(rows), trained.split(rows), strict=True):
            yield b.reshape(-1), w.reshape(-1)


def _block_size(tensor: Tensor) -> int:
    return _BLOCK if tensor.device.type == "cpu" else _DEVICE_BLOCK


def _is_transposed(matrix: Tensor) -> bool:
    return matrix.stride(0) < matrix.stride(1)


def _divide(a: float, b: float) -> float:
    return a / b if b else math.nan


def _check(base: Tensor, trained: Tensor) -> None:
    if base.shape != trained.shape:
        raise WeightsError(
            f"expected two tensors of the same shape, got {tuple(base.shape)} and {tuple(trained.shape)}. "
            "Compare checkpoints of the same architecture."
        )
    for tensor in (base, trained):
        if not tensor.is_floating_point() or tensor.element_size() not in _BITS:
            raise WeightsError(
                f"expected bfloat16, float16, float32 or float64 weights, got {tensor.dtype}. "
                "Dequantize the checkpoint."
            )
