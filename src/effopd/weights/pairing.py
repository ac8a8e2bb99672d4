"""Pair the parts of a base and a trained checkpoint by place, from headers.

Pairing by place accepts different layouts of one model: other prefixes, stacked or separate
experts, transposed matrices. Tensors are read only to compare a head that can be tied (see
`reader.Checkpoint.own_head`) and integer tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from effopd.errors import CompatibilityError, WeightsError
from effopd.weights.layouts import model_type
from effopd.weights.naming import is_head, is_tied, is_token_embedding, place_of
from effopd.weights.parts import Part
from effopd.weights.reader import Checkpoint

_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|transformer|model|language_model)\.)+")
RESIZE = "Resize the base the same way (model.resize_token_embeddings), save it, and compare again."


def bare(name: str) -> str:
    """A tensor's name without the prefixes of wrappers."""
    return _WRAPPERS.sub("", name)


def untie(checkpoints: Sequence[Checkpoint]) -> None:
    """Give tied checkpoints a head, a copy of the embedding, if another one has a separate head.

    This happens only if all configurations are tied. A file with two different tensors is then an
    untied model nevertheless, as merging an adapter of the head leaves it. If the configurations
    disagree, nothing changes.
    """
    heads = [next(name for name in c.shapes if is_head(name)) for c in checkpoints if c.own_head]
    if not heads or not all(is_tied(c.config) for c in checkpoints):
        return
    for checkpoint in checkpoints:
        if not checkpoint.own_head:
            checkpoint.untie(heads[0])


def check_architecture(base: Checkpoint, trained: Checkpoint) -> None:
    """Check that two checkpoints have the same architecture and vocabulary.

    Raises:
        CompatibilityError: they differ.
    """
    kinds = [model_type(c.config) for c in (base, trained)]
    if kinds[0] != kinds[1]:
        raise CompatibilityError(
            f"base and trained have different architectures: {base.path} is {kinds[0]}, {trained.path} is {kinds[1]}. "
            "Expected a checkpoint trained from this base."
        )
    rows = [_vocabulary(c) for c in (base, trained)]
    if None not in rows and rows[0] != rows[1]:
        raise CompatibilityError(
            f"base and trained have different vocabularies: {base.path} has {rows[0]} rows of embeddings, "
            f"{trained.path} {rows[1]}. {RESIZE}"
        )


def pair(base: Checkpoint, trained: Checkpoint, parts: Sequence[Part]) -> dict[Part, Part]:
    """Part of the base → part of the trained checkpoint, of the same place and shape.

    Raises:
        WeightsError: tensors are missing, extra or have another shape, or integer tables differ.
    """
    theirs = trained.parts()
    by_place = {_key(part): part for part in theirs}
    by_name = {bare(part.tensor): part.tensor for part in theirs}
    pairs: dict[Part, Part] = {}
    as_base: set[str] = set()
    for part in parts:
        other = by_place.get(_key(part))
        if (
            other is None or other.shape != part.shape
        ):  # split differently, for example because of a sparser configuration
            name = by_name.get(bare(part.tensor))
            if name is not None and trained.shapes[name] == base.shapes[part.tensor]:
                other = replace(part, tensor=name)
                as_base.add(name)
        if other is not None:
            pairs[part] = other
    used = set(pairs.values())
    missing = list(dict.fromkeys(part.tensor for part in parts if part not in pairs))
    extra = list(dict.fromkeys(p.tensor for p in theirs if p not in used and p.tensor not in as_base))
    _check_complete(base, trained, missing, extra)
    wrong = {a.tensor: b.tensor for a, b in pairs.items() if a.shape != b.shape}
    if wrong:
        listed = ", ".join(
            f"'{a}' {trained.shapes[b]} instead of {base.shapes[a]}" for a, b in list(wrong.items())[:3]
        )
        raise WeightsError(
            f"{trained.files[next(iter(wrong.values()))]}: {len(wrong)} tensors have another shape than in the base "
            f"{base.path}: {listed}. Expected a checkpoint trained from this base."
        )
    _check_tables(base, trained)
    return pairs


def _key(part: Part) -> tuple[int | None, str, str]:
    place = part.place
    return (place.layer, place.module, bare(place.matrix) if place.module == "other" else place.matrix)


def _check_complete(base: Checkpoint, trained: Checkpoint, missing: list[str], extra: list[str]) -> None:
    if not missing and not extra:
        return
    kinds = (
        ("missing", missing, [f"'{name}', in the base in {base.files[name].name}" for name in missing[:3]]),
        ("extra", extra, [f"'{name}' in {trained.files[name].name}" for name in extra[:3]]),
    )
    raise WeightsError(
        f"{trained.path} does not hold the same tensors as the base {base.path}: "
        + "; ".join(
            f"{len(names)} {kind} ({', '.join(where)}{', …' if len(names) > 3 else ''})"
            for kind, names, where in kinds
            if names
        )
        + ". Expected a checkpoint trained from this base."
        + _hint(base, trained, missing, extra)
    )


def _hint(base: Checkpoint, trained: Checkpoint, missing: list[str], extra: list[str]) -> str:
    if all(place_of(name).module == "head" for name in [*missing, *extra]):
        return (
            " Only one of them ties its output head to the token embedding (tie_word_embeddings in config.json). Save "
            "the tied one with a separate head, and compare again."
        )
    sizes = [sum(math.prod(c.shapes[n]) for n in names) for c, names in ((base, missing), (trained, extra))]
    if sizes[0] == sizes[1]:
        return (
            " Both have the same number of parameters in these tensors, so this may be one model saved in two "
            "layouts: load and save both with transformers "
            "(AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)), and compare the results."
        )
    return ""


def _check_tables(base: Checkpoint, trained: Checkpoint) -> None:
    """Check that integer tensors, which are not weights, are equal on both sides."""
    in_base, in_trained = ({bare(name): name for name in c.tables} for c in (base, trained))
    for name in sorted(in_base.keys() | in_trained.keys()):
        both = name in in_base and name in in_trained
        same = both and base.table_equals(in_base[name], trained, in_trained[name])
        if not same:
            raise WeightsError(
                f"the integer or boolean tensor '{in_base.get(name, in_trained.get(name))}' is not the same in the "
                f"base {base.path} and in {trained.path}. Only floating-point weights can differ. Expected a "
                "checkpoint trained from this base."
            )


def vocabulary_hint(name: str, shapes: Iterable[Sequence[int]]) -> str:
    """Fix for a token embedding or head with another number of rows; "" for other mismatches."""
    one, other = shapes
    resized = len(one) == len(other) == 2 and one[0] != other[0] and one[1] == other[1]
    return f" {RESIZE}" if resized and (is_head(name) or is_token_embedding(name)) else ""


def _vocabulary(checkpoint: Checkpoint) -> int | None:
    shapes: Mapping[str, tuple[int, ...]] = checkpoint.shapes
    return next((shape[0] for name, shape in shapes.items() if is_token_embedding(name) and len(shape) == 2), None)
