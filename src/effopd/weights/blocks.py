"""`Blocks`: an update ΔW = W_t − W_0 in float64, block by block, without a full float64 copy.

In float64, the difference of two bfloat16, float16 or float32 numbers is exact unless their
exponents differ by more than 29. In the storage dtype it would be rounded, and that rounding error
would dominate the tail of the spectrum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Elements of one float64 block of columns (64 MiB): large, because each block updates a large sum.
_BLOCK = 2**23
#: Elements of one block in products with a few vectors: fits a core's cache; fills an accelerator.
_STRIP, _DEVICE_STRIP = 2**20, 2**24


@dataclass(frozen=True)
class Blocks:
    """ΔW, or one matrix, oriented so that M ≤ N.

    `trained_MN` and `base_MN` are views of the stored tensors, in any dtype.
    """

    trained_MN: Tensor
    base_MN: Tensor | None
    swapped: bool

    @classmethod
    def of(cls, trained: Tensor, base: Tensor | None = None) -> Blocks:
        """Wrap one matrix, or two of the same shape; tall ones are transposed (`swapped`).

        Raises:
            ValueError: not matrices, or different shapes.
        """
        if trained.ndim != 2 or (base is not None and base.shape != trained.shape):
            got = f"{tuple(trained.shape)}" + ("" if base is None else f" and {tuple(base.shape)}")
            raise ValueError(f"expected one matrix, or two of the same shape, got {got}.")
        swapped = trained.shape[0] > trained.shape[1]
        if swapped:
            trained, base = trained.T, base.T if base is not None else None
        return cls(trained, base, swapped)

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N) with M ≤ N."""
        return self.trained_MN.shape[0], self.trained_MN.shape[1]

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, float64 block [M, C]) from left to right."""
        rows, columns = self.shape
        step = max(1, min(columns, _BLOCK // max(1, rows)))
        for start in range(0, columns, step):
            part = slice(start, min(start + step, columns))
            yield part, self._difference(slice(None), part)

    def strips(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, columns, float64 block) along whichever side is contiguous in memory."""
        rows, columns = self.shape
        by_rows = self.trained_MN.stride(0) >= self.trained_MN.stride(1)
        size = _STRIP if self.trained_MN.device.type == "cpu" else _DEVICE_STRIP
        length, across = (rows, columns) if by_rows else (columns, rows)
        step, everything = max(1, size // max(1, across)), slice(None)
        for start in range(0, length, step):
            part = slice(start, min(start + step, length))
            where = (part, everything) if by_rows else (everything, part)
            yield *where, self._difference(*where)

    def _difference(self, rows: slice, columns: slice) -> Tensor:
        if self.base_MN is None:
            return self.trained_MN[rows, columns].to(torch.float64)
        # copy even float64 weights, because the caller owns them
        return (
            self.trained_MN[rows, columns]
            .to(torch.float64, copy=True)
            .sub_(self.base_MN[rows, columns].to(torch.float64))
        )

    def dense(self) -> Tensor:
        """The full matrix [M, N], float64."""
        return self._filled(torch.float64, 1.0)

    def scaled(self, dtype: torch.dtype) -> Tensor:
        """The full matrix [M, N] divided by its largest absolute entry, rounded to `dtype`.

        A zero matrix is not scaled. Products of the scaled matrix neither overflow nor underflow in
        float32, however small the update is.
        """
        largest = max((float(block.abs().max()) for _, _, block in self.strips()), default=0.0)
        return self._filled(dtype, largest or 1.0)

    def _filled(self, dtype: torch.dtype, divisor: float) -> Tensor:
        out_MN = torch.empty(self.shape, dtype=dtype, device=self.trained_MN.device)
        for rows, columns, block in self.strips():
            out_MN[rows, columns] = block if divisor == 1.0 else block / divisor
        return out_MN

    def times(self, x_NK: Tensor) -> Tensor:
        """ΔW x in float64: [M, K]."""
        out_MK = torch.zeros(self.shape[0], x_NK.shape[1], dtype=torch.float64, device=x_NK.device)
        for rows, columns, block in self.strips():
            out_MK[rows] += block @ x_NK[columns]
        return out_MK

    def transposed_times(self, x_MK: Tensor) -> Tensor:
        """ΔWᵀ x in float64: [N, K]."""
        out_NK = torch.zeros(self.shape[1], x_MK.shape[1], dtype=torch.float64, device=x_MK.device)
        for rows, columns, block in self.strips():
            out_NK[columns] += block.T @ x_MK[rows]
        return out_NK
