"""What a search needs of live weights: full matrices (`LiveWeights`) and LoRA factors
(`LoraWeights`) offer it alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from torch import Tensor

from effopd.common.distributed import ShardSpec

#: (parameter name, origin W, anchor), both fp32 on the parameter's device → direction D of its
#: shape, fp32.
Direction = Callable[[str, Tensor, Tensor], Tensor]


def displacement(name: str, origin: Tensor, anchor: Tensor) -> Tensor:
    """Δ = W − anchor, the paper's direction."""
    return origin - anchor


class MovableWeights(Protocol):
    """Live weights that a search can move and put back bit for bit.

    Life of a search: `begin()` remembers the origin W; `move_to(s)` puts the model at W + s·D, any
    number of times, with D = W − anchor unless `begin` was given another direction; `restore()`
    puts W back; `commit()` ends the search where the model stands and makes that the new anchor.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that move."""

    @property
    def numel(self) -> int:
        """How many numbers move."""

    @property
    def sharded(self) -> Mapping[str, ShardSpec]:
        """This rank's share of every parameter of whose anchor it holds a part only."""

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model on this rank."""

    @property
    def lost_share(self) -> float | None:
        """Of the last point, the largest share of a matrix's jump that the weights could not hold;
        `None`: they hold every one.
        """

    def displacement_norm(self) -> float:
        """‖W − anchor‖ over all selected parameters, over all ranks."""

    def displacements(self) -> Iterator[tuple[str, Tensor]]:
        """(name, W − anchor in fp32) of full matrices, one parameter at a time."""

    def checksum(self) -> int:
        """A number that ranks with equal weights share."""

    def begin(self, direction: Direction = displacement) -> None:
        """Remember the present weights as the origin of a search along `direction`."""

    def move_to(self, scale: float) -> None:
        """Put the model at origin + scale · direction; scale 0 is the origin, bit for bit."""

    def restore(self) -> None:
        """Put the origin back, bit for bit."""

    def abort(self) -> None:
        """Leave a search without a trace: restore the origin and forget it; the anchor stays. Safe
        to call twice.
        """

    def commit(self) -> None:
        """End the search where the model stands now; these weights become the anchor of the next
        search.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """The anchor, fp32, by parameter name."""

    def load_state_dict(self, anchor: Mapping[str, Tensor]) -> None:
        """Take over a saved anchor."""
