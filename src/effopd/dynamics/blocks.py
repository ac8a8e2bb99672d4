"""An update ΔW = W_t − W0 as float64 blocks of columns, so that no float64 copy of a large matrix is ever made.

The difference of two bfloat16, float16 or float32 numbers is exact in float64 unless their exponents differ by more
than 29 bits; taking it in the storage dtype would round it, and the rounding is what fills the tail of a spectrum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Numbers in one float64 block (64 MiB).
_BLOCK = 2**23


@dataclass(frozen=True)
class Blocks:
    """ΔW (or a matrix itself), wide: M ≤ N. `trained_MN` and `base_MN` are views of what is stored, in any dtype."""

    trained_MN: Tensor
    base_MN: Tensor | None
    swapped: bool

    @classmethod
    def of(cls, trained: Tensor, base: Tensor | None = None) -> Blocks:
        """Wrap two matrices of one shape; tall ones are transposed (`swapped`), which swaps left and right.

        Raises:
            ValueError: not matrices, or of different shapes.
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
            block = self.trained_MN[:, part].to(torch.float64)
            yield part, block if self.base_MN is None else block - self.base_MN[:, part]

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The whole matrix [M, N], differences taken in float64 and then rounded to `dtype`."""
        out_MN = torch.empty(self.shape, dtype=dtype, device=self.trained_MN.device)
        for columns, block in self:
            out_MN[:, columns] = block
        return out_MN

    def times(self, x_NK: Tensor) -> Tensor:
        """ΔW x in float64: [M, K]."""
        out_MK = torch.zeros(self.shape[0], x_NK.shape[1], dtype=torch.float64, device=x_NK.device)
        for columns, block in self:
            out_MK.addmm_(block, x_NK[columns])
        return out_MK

    def transposed_times(self, x_MK: Tensor) -> Tensor:
        """ΔWᵀ x in float64: [N, K]."""
        return torch.cat([block.T @ x_MK for _, block in self])
