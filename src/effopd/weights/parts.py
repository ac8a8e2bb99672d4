"""The matrices and vectors inside the stored tensors of a checkpoint, each with its place.

A fused or stacked tensor has several parts, which together cover it exactly once; `layouts` says
how it is cut, and one whose layout is not known stays whole.
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
        place: where it belongs.
        shape: of the view: (M, N) = (out, in) for matrices.
        expert: index into a stack of experts, if the tensor is one.
        transposed: stored as [in, out].
        rows: start, stop, step along the output dimension, for fused tensors.
        blocks: how many equal blocks the output dimension consists of; `rows` are taken of each.
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
        """Whether it has two dimensions, and numbers in it."""
        return len(self.shape) == 2 and 0 not in self.shape

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its tensor."""
        return self.expert is None and self.rows is None

    def view(self, tensor: Tensor) -> Tensor:
        """This part of the stored tensor, oriented out × in: a view, or a copy where its rows are
        spread over several blocks. Edit with `put`."""
        return self._region(tensor).flatten(0, 1) if self.blocks > 1 else self._region(tensor)

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Write `value`, of this part's shape, into the stored tensor, in place."""
        region = self._region(tensor)
        region.copy_(value.reshape(region.shape))

    def rows_of(self, factor: Tensor) -> Tensor:
        """The rows of this part out of a matrix [out, …] whose rows are those of the whole oriented
        tensor.
        """
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
    """Every matrix and vector of a checkpoint: embeddings, then the layers in order, then the rest.

    A head that is tied to the embedding is left out, so it counts once. Two parts never share a
    place.

    Args:
        config: the checkpoint's `config.json`.
        shapes: name → shape of the stored tensors.
        own_head: whether a stored head is one of its own; default: where the configuration says so,
            or there is no embedding to tie it to.
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
    """Whether a matrix is stored as [in, out]: GPT-2's Conv1D, and stacked experts multiplied from
    the right.

    The shapes decide, the model type where they do not; `None` where neither does.
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
    """Of gate_up [experts, 2I, H] and down [experts, H, I], always told from gate_up [experts, H,
    2I] and down [experts, I, H] by the two shapes together, also where H = 2I."""
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
