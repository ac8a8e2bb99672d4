"""The matrices and vectors inside the stored tensors of a checkpoint, each with its place.

The parts of a fused or stacked tensor cover it exactly once, as `layouts` defines. A tensor of
unknown layout is a single part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from effopd.weights.layouts import CONV1D, EXPERTS_IN_BY_OUT, hidden_size, is_known, model_type, pieces_of
from effopd.weights.naming import Place, is_head, is_tied, is_token_embedding, place_of


@dataclass(frozen=True)
class Part:
    """One matrix or vector inside one stored tensor.

    Attributes:
        tensor: name of the stored tensor.
        place: its place in the model.
        shape: shape of the view; (M, N) = (out, in) for matrices.
        expert: index into a stack of experts; `None`: not a stack.
        transposed: whether it is stored as [in, out].
        rows: start, stop, step inside each block of the output dimension; `None`: all rows.
        blocks: number of equal blocks along the output dimension.
    """

    tensor: str
    place: Place
    shape: tuple[int, ...]
    expert: int | None = None
    transposed: bool = False
    rows: tuple[int, int, int] | None = None
    blocks: int = 1

    @property
    def is_matrix(self) -> bool:
        """Whether it has two dimensions and is not empty."""
        return len(self.shape) == 2 and 0 not in self.shape

    @property
    def is_whole(self) -> bool:
        """Whether it covers its whole tensor."""
        return self.expert is None and self.rows is None

    def view(self, tensor: Tensor) -> Tensor:
        """This part of the stored tensor, oriented out × in.

        A view, or a copy if its rows are spread over several blocks. Edit with `put`.
        """
        return self._region(tensor).flatten(0, 1) if self.blocks > 1 else self._region(tensor)

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Write `value`, of this part's shape, into the stored tensor, in place."""
        region = self._region(tensor)
        region.copy_(value.reshape(region.shape))

    def rows_of(self, factor: Tensor) -> Tensor:
        """This part's rows of a matrix [out, …] with the rows of the whole oriented tensor."""
        part = Part(self.tensor, self.place, self.shape, rows=self.rows, blocks=self.blocks)
        return part.view(factor)

    def _region(self, tensor: Tensor) -> Tensor:
        """A view: [rows, …], or [blocks, rows of a block, …]."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.transposed:
            tensor = tensor.T
        if self.rows is None:
            return tensor
        if self.blocks == 1:
            return tensor[slice(*self.rows)]
        return tensor.unflatten(0, (self.blocks, -1))[:, slice(*self.rows)]


def parts_of(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], own_head: bool | None = None
) -> list[Part]:
    """All matrices and vectors of a checkpoint: embeddings, layers in order, then the rest.

    A tied head is left out, because it is the embedding. Two parts never share a place.

    Args:
        config: the checkpoint's `config.json`.
        shapes: name → shape of the stored tensors.
        own_head: whether a stored head is a separate tensor; `None`: if the configuration does not
            tie it, or there is no embedding to tie it to.
    """
    if own_head is None:
        own_head = not is_tied(config) or not any(is_token_embedding(name) for name in shapes)
    parts: list[Part] = []
    for name, shape in shapes.items():
        place = place_of(name)
        if is_head(name) and not own_head:
            continue
        parts += _split(name, tuple(shape), place, config, shapes)
    order = {"embedding": -1, "other": 1, "norm": 2, "head": 3}
    parts.sort(
        key=lambda part: (
            0 if part.place.layer is not None else order.get(part.place.module, 1),
            part.place.layer or 0,
        )
    )
    seen: set[Place] = set()
    for i, part in enumerate(parts):
        if part.place in seen:
            place = Place(part.place.layer, "other", f"{part.tensor}:{part.place.matrix}")
            parts[i] = replace(part, place=place)
        seen.add(parts[i].place)
    return parts


def _split(
    name: str,
    shape: tuple[int, ...],
    place: Place,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[Part]:
    """The parts of one stored tensor."""
    if place.module == "other":
        return [Part(name, place, shape)]
    matrix, kind = (
        (place.matrix.removesuffix("_bias"), "_bias") if place.matrix.endswith("_bias") else (place.matrix, "")
    )
    stacked = bool(re.match(r"experts\.[a-z]", matrix))
    dimensions = len(shape) - stacked
    if dimensions not in (1, 2) or (stacked and not shape[0]):
        return [Part(name, Place(place.layer, "other", name), shape)]
    transposed = dimensions == 2 and _is_transposed(name, shape, matrix, config, shapes)
    inner = shape[1:] if stacked else shape
    inner = inner[::-1] if transposed else inner
    pieces = pieces_of(matrix, inner[0], config)
    if transposed is None or pieces is None:
        return [Part(name, Place(place.layer, "other", name), shape)]
    parts = []
    for expert in range(shape[0]) if stacked else (None,):
        for piece in pieces:
            label = piece.name if expert is None else piece.name.replace("experts.", f"experts.{expert}.", 1)
            size = inner[0] if piece.rows is None else len(range(*piece.rows)) * piece.blocks
            where = Place(place.layer, place.module, label + kind)
            parts.append(Part(name, where, (size, *inner[1:]), expert, transposed, piece.rows, piece.blocks))
    return parts


def _is_transposed(
    name: str,
    shape: tuple[int, ...],
    matrix: str,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> bool | None:
    """Whether a matrix is stored as [in, out]: GPT-2's Conv1D, and some stacked experts.

    Decided by the shapes, or by the model type if they are ambiguous; `None`: undecided.
    """
    hidden = hidden_size(config)
    if len(shape) == 3:
        return _are_experts_transposed(name, shape, matrix, config, shapes)
    conv1d = re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name)
    if conv1d is not None or matrix == "router":
        first, second = (shape[1], shape[0]) if conv1d is not None and conv1d[1] == "c_proj" else shape
        if hidden is not None and first != second and hidden in (first, second):
            return first == hidden
        return conv1d is not None and model_type(config) in CONV1D
    return False


def _are_experts_transposed(
    name: str,
    shape: tuple[int, ...],
    matrix: str,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> bool | None:
    """Whether stacked experts are stored as [experts, in, out].

    The shapes of gate_up and down together distinguish [experts, 2I, H] and [experts, H, I] from
    [experts, H, 2I] and [experts, I, H], even if H = 2I.
    """
    for one, other in (("gate_up_proj", "down_proj"), ("input_linear", "output_linear")):
        names = [name, name.replace(one, other)] if one in name else [name.replace(other, one), name]
        if one in names[0] and names[0] in shapes and len(shapes.get(names[1], ())) == 3:
            (_, a, b), (_, c, d) = shapes[names[0]], shapes[names[1]]
            if (a, b) == (2 * d, c):
                return False
            if (a, b) == (d, 2 * c):
                return True
    hidden = hidden_size(config)
    first, second = shape[1:] if not matrix.endswith("down") else shape[:0:-1]
    if hidden is not None and first != second and hidden in (first, second):
        return first == hidden
    if model_type(config) in EXPERTS_IN_BY_OUT:
        return True
    return False if is_known(config) and not matrix.endswith("gate_up") else None
