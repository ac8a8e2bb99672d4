"""`MovableWeights`: protocol of live weights in a search, for full matrices and LoRA factors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Protocol

from torch import Tensor

from effopd.common.distributed import ShardSpec

#: (parameter name, origin W, anchor) → direction D; all fp32, of the parameter's shape and device.
Direction = Callable[[str, Tensor, Tensor], Tensor]


def displacement(name: str, origin: Tensor, anchor: Tensor) -> Tensor:
    """Δ = W − anchor, the paper's direction."""
    return origin - anchor


class MovableWeights(Protocol):
    """Live weights that a search can move and restore bit for bit.

    A search calls `begin()` to copy the origin W, and `move_to(s)` any number of times to set the
    model to W + s·D. The default direction is D = W − anchor. `commit()` ends the search and makes
    the current weights the anchor; `abort()` ends it and restores W.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that move."""

    @property
    def numel(self) -> int:
        """Number of elements that move."""

    @property
    def sharded(self) -> Mapping[str, ShardSpec]:
        """This rank's shard of every parameter whose anchor it holds only in part."""

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model on this rank."""

    @property
    def lost_share(self) -> float | None:
        """Largest share of a matrix's last jump that its rank cannot represent (0–1).

        `None`: every point can be represented.
        """

    def unfrozen(self) -> Mapping[str, Tensor]:
        """Parameters that should move and do not, because they were frozen at construction."""

    def take_unfrozen(self, only: Collection[str] | None = None) -> tuple[str, ...]:
        """Move these parameters from now on, with their present values as the anchor.

        Args:
            only: names of the parameters; `None`: all.

        Returns:
            The names of those that move now.
        """

    def displacement_norm(self) -> float:
        """‖W − anchor‖ (Frobenius) over the selected parameters, all ranks together."""

    def displacements(self, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, W − anchor in fp32) of full matrices, one parameter at a time.

        Args:
            only: names of the parameters; `None`: all.
        """

    def checksum(self) -> int:
        """Checksum of the weights; equal on ranks with equal weights."""

    def begin(self, direction: Direction = displacement) -> None:
        """Copy the current weights as the origin of a search along `direction`."""

    def move_to(self, scale: float) -> None:
        """Set the weights to origin + scale · direction; scale 0 is the origin, bit for bit."""

    def restore(self) -> None:
        """Restore the origin, bit for bit."""

    def abort(self) -> None:
        """End the search and restore the origin; the anchor is unchanged. Safe to call twice."""

    def commit(self) -> None:
        """End the search and make the current weights the anchor."""

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's anchor, fp32, by parameter name."""

    def load_state_dict(self, anchor: Mapping[str, Tensor]) -> None:
        """Load a saved anchor."""
