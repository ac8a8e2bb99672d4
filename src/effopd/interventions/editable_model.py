"""A base model in memory that moves to a point and is restored bit for bit; points as checkpoints.

Edited tensors are restored from the base's files, not from clones, which takes the memory of one
tensor instead of a second model. The restore is exact because loading is checked first: every
parameter must equal its tensor on disk, cast to the parameter's dtype.

Not supported: models whose parameters are not the checkpoint's tensors, apart from a name prefix,
such as Mixture-of-Experts models whose experts transformers merges on loading. For those, write the
points as checkpoints and evaluate each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effopd.common.float64 import for_float64, has_float64
from effopd.errors import CompatibilityError, NonFiniteWeightsError
from effopd.interventions.points import Point
from effopd.interventions.sources import Sources
from effopd.weights.difference import Difference
from effopd.weights.parts import Part
from effopd.weights.writer import write_checkpoint


@torch.no_grad()
def apply_point(target: Tensor, parts: Sequence[Part], point: Point, difference: Difference) -> float:
    """Edit a base tensor in place to its values at `point`; float64, rounded once, part by part.

    Args:
        target: the whole stored tensor, holding the base's values.
        parts: the parts of that tensor.

    Returns:
        ‖new − base‖² after rounding.

    Raises:
        NonFiniteWeightsError: the new tensor contains a NaN or an infinity. `target` may then be
            partly edited.
    """
    device = target.device if has_float64(target.device) else "cpu"
    square = 0.0
    for part in parts:
        if not point.selects(part):
            continue
        update = difference.update(part, device)  # kept while its tensor's other parts are read
        new = point.edit(update)
        if new is None:
            continue
        view, new = part.view(target), new.to(target.device, target.dtype)
        if not bool(torch.isfinite(new).all()):
            raise NonFiniteWeightsError(
                f"point {point.id}: '{part.place}' ({part.tensor}) is not finite in {target.dtype}. Expected finite "
                "weights: use smaller factors, or --dtype float32."
            )
        square += float(torch.linalg.vector_norm(for_float64(new).double() - for_float64(view)) ** 2)
        part.put(target, new)
    return square


class EditableModel:
    """A loaded base model that can be moved to a point and is restored bit for bit.

    Raises:
        CompatibilityError: the model's parameters are not the checkpoint's tensors, in name, shape
            or value.
    """

    def __init__(self, model: PreTrainedModel, sources: Sources):
        self.model = model
        self._sources = sources
        _untie(model, sources)
        self._live = _match(model, sources)
        self._check_values()

    @contextmanager
    def at(self, point: Point) -> Iterator[float]:
        """Context in which the model is at `point`; the base is restored on exit, errors included.

        Yields:
            ‖W − W0‖ of the edited model, after rounding to its dtype.
        """
        touched: list[str] = []
        try:
            yield self._apply(point, touched)
        finally:
            self._restore(touched)

    def _apply(self, point: Point, touched: list[str]) -> float:
        difference = self._sources.difference(point)
        if difference is None:
            return 0.0
        square = 0.0
        for name, parts in self._sources.parts_of.items():
            if any(map(point.selects, parts)):
                touched.append(name)
                square += apply_point(self._live[name], parts, point, difference)
        return square**0.5

    @torch.no_grad()
    def _restore(self, names: Sequence[str]) -> None:
        for name in names:
            live = self._live[name]
            live.copy_(self._sources.base.load(name).to(live.dtype))

    def _check_values(self) -> None:
        for name, live in self._live.items():
            stored = self._sources.base.load(name).to(live.dtype)
            if not torch.equal(live.detach().cpu(), stored):
                raise CompatibilityError(
                    f"parameter '{name}' of the loaded {type(self.model).__name__} differs from the tensor in "
                    f"{self._sources.base.files[name]}: expected equal values, so that edits can be undone exactly. "
                    "transformers changes this tensor on loading. " + _WAY_OUT
                )


_WAY_OUT = "Write the points with --save_dir DIR (without --task), then evaluate each with `effopd eval`."


def _untie(model: PreTrainedModel, sources: Sources) -> None:
    """Give the loaded model an untied head if one of the checkpoints has one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and sources.base.own_head and head.weight is embedding.weight:
        head.register_parameter("weight", torch.nn.Parameter(embedding.weight.detach().clone()))
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _match(model: PreTrainedModel, sources: Sources) -> dict[str, Tensor]:
    """Stored name → live parameter or buffer; every shape is checked before any tensor is used."""
    live: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    prefix = model.base_model_prefix  # absent in checkpoints of a bare backbone
    matched: dict[str, Tensor] = {}
    for name in sources.parts_of:
        tensor = live.get(name, live.get(f"{prefix}.{name}"))
        shape = sources.base.shapes[name]
        if tensor is None or tuple(tensor.shape) != tuple(shape):
            got = "has no such parameter" if tensor is None else f"has it with shape {tuple(tensor.shape)}"
            raise CompatibilityError(
                f"the base has a tensor '{name}' of shape {tuple(shape)}, the loaded {type(model).__name__} {got}: "
                f"transformers renames or merges tensors on loading, for example experts. {_WAY_OUT}"
            )
        matched[name] = tensor
    return matched


def save_point(point: Point, sources: Sources, out: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the model at `point` as a checkpoint, one tensor at a time.

    Args:
        dtype: of the floating-point tensors. `None`: the base's. With the dtype of the evaluated
            model, the checkpoint equals that model bit for bit.
    """
    difference = sources.difference(point)
    # a tied head that is stored anyway must stay equal to the embeddings
    tied = [part for part in sources.base.parts() if str(part.place) == "embedding.tokens"]

    def edit(name: str, tensor: Tensor) -> Tensor:
        target = tensor.to(dtype or tensor.dtype, copy=True)
        if difference is not None:
            apply_point(target, sources.parts_of.get(name, tied), point, difference)
        return target

    return write_checkpoint(sources.base, edit, out, dtype=dtype)
