"""Which part of a trained checkpoint is which part of its base; everything is settled from headers,
before tensors are read.

Parts are paired by place, so that one model in two layouts is one model: with other prefixes, with
experts stacked or one by one, transposed or not. Only a head that may be tied has to be looked at:
see `reader.Checkpoint.own_head`.
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
RESIZE = "Resize the base the same way (model.resize_token_embeddings) and save it, then compare."


def bare(name: str) -> str:
    """A tensor's name without the prefixes of wrappers."""
    return _WRAPPERS.sub("", name)


def untie(checkpoints: Sequence[Checkpoint]) -> None:
    """Read a tied head as a copy of the token embedding where another of these checkpoints has a
    head of its own.

    All configurations have to say tied: a file with two different tensors is then an untied model
    all the same, which is what merging an adapter of the head leaves. Where the configurations
    disagree, nothing is changed.
    """
    heads = [next(name for name in c.shapes if is_head(name)) for c in checkpoints if c.own_head]
    if not heads or not all(is_tied(c.config) for c in checkpoints):
        return
    for checkpoint in checkpoints:
        if not checkpoint.own_head:
            checkpoint.untie(heads[0])


def check_architecture(base: Checkpoint, trained: Checkpoint) -> None:
    """Refuse another architecture or vocabulary.

    Raises:
        CompatibilityError: with both values.
    """
    kinds = [model_type(c.config) for c in (base, trained)]
    if kinds[0] != kinds[1]:
        raise CompatibilityError(
            f"base and trained are of different architectures: {base.path} is {kinds[0]}, "
            f"{trained.path} is {kinds[1]}. "
            "Expected a checkpoint trained from this base."
        )
    rows = [_vocabulary(c) for c in (base, trained)]
    if None not in rows and rows[0] != rows[1]:
        raise CompatibilityError(
            f"base and trained have different vocabularies: {base.path} has {rows[0]} rows of "
            f"embeddings, {trained.path} "
            f"{rows[1]}. {RESIZE}"
        )


def pair(base: Checkpoint, trained: Checkpoint, parts: Sequence[Part]) -> dict[Part, Part]:
    """Part of the base → part of the trained checkpoint, of the same place and shape.

    Raises:
        WeightsError: tensors are missing, extra, mis-shaped, or integer tables differ; the first
            few are named.
    """
    theirs = trained.parts()
    by_place = {_key(part): part for part in theirs}
    by_name = {bare(part.tensor): part.tensor for part in theirs}
    pairs: dict[Part, Part] = {}
    as_base: set[str] = set()
    for part in parts:
        other = by_place.get(_key(part))
        if other is None or other.shape != part.shape:  # cut otherwise, as where a configuration says less
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
            " Only one of them ties its output head to the token embedding "
            "(tie_word_embeddings in config.json): save the "
            "tied one with a head of its own, and compare again."
        )
    sizes = [sum(math.prod(c.shapes[n]) for n in names) for c, names in ((base, missing), (trained, extra))]
    if sizes[0] == sizes[1]:
        return (
            " Both sides have the same number of parameters there, so this may be one model "
            "saved in two layouts: load and "
            "save both with transformers "
            "(AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)), and "
            ""
            "compare those."
        )
    return ""


def _check_tables(base: Checkpoint, trained: Checkpoint) -> None:
    """Integer tensors are no weights: they have to be the same on both sides."""
    mine, theirs = ({bare(name): name for name in c.tables} for c in (base, trained))
    for name in sorted(mine.keys() | theirs.keys()):
        same = name in mine and name in theirs and base.table_equals(mine[name], trained, theirs[name])
        if not same:
            raise WeightsError(
                f"the integer or boolean tensor '{mine.get(name, theirs.get(name))}' is not "
                f"the same in the base {base.path} and in "
                f"{trained.path}. An update is measured of floating-point weights; expected a checkpoint trained from "
                "this base."
            )


def vocabulary_hint(name: str, shapes: Iterable[Sequence[int]]) -> str:
    """How to go on where a token embedding or a head has another number of rows; empty for other
    mismatches.
    """
    one, other = shapes
    resized = len(one) == len(other) == 2 and one[0] != other[0] and one[1] == other[1]
    return f" {RESIZE}" if resized and (is_head(name) or is_token_embedding(name)) else ""


def _vocabulary(checkpoint: Checkpoint) -> int | None:
    shapes: Mapping[str, tuple[int, ...]] = checkpoint.shapes
    return next((shape[0] for name, shape in shapes.items() if is_token_embedding(name) and len(shape) == 2), None)
