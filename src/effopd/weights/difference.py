"""A base and a trained checkpoint as a stream of updates, one matrix at a time.

Everything that can be told from headers (architecture, vocabulary, names, shapes) is checked before a tensor is read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from effopd.errors import CompatibilityError, WeightsError
from effopd.weights.adapter import Adapter
from effopd.weights.layouts import text_config
from effopd.weights.naming import Part, is_tied, place_of
from effopd.weights.reader import Checkpoint

#: Numbers in one float64 block (64 MiB).
_BLOCK = 2**23
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|transformer|model|language_model)\.)+")


class Update:
    """One matrix or vector of the base and of the trained model, oriented out × in.

    Attributes:
        part: where it belongs.
        base: W0, stored dtype. Not to be edited: it may be shared.
        factors: (b_MR, a_RN), float64, with ΔW = b a exactly, where the update is a LoRA adapter's; else `None`.
    """

    def __init__(
        self,
        part: Part,
        base: Tensor,
        trained: Tensor | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
    ):
        self.part, self.base, self.factors = part, base, factors
        self._trained = trained

    @property
    def trained(self) -> Tensor:
        """W_t in its stored dtype; for an adapter W0 + b a, added in float64 and rounded to float32 (W0 where nothing
        was trained)."""
        if self._trained is None:
            self._trained = self.base
            if self.factors is not None:
                b_MR, a_RN = self.factors
                self._trained = torch.addmm(self.base.to(torch.float64), b_MR, a_RN).to(torch.float32)
        return self._trained

    def delta(self) -> Tensor:
        """ΔW = W_t − W0, dense float64; from the factors where there are any."""
        if self.factors is not None:
            return self.factors[0] @ self.factors[1]
        return self.trained.to(torch.float64) - self.base.to(torch.float64)

    def norm(self) -> float:
        """‖ΔW‖ (Frobenius), differences and sums in float64, without a float64 copy of the tensor; of an adapter from the
        triangular factors of its factors, without forming b a."""
        if self.factors is not None:
            triangle_b, triangle_a = (torch.linalg.qr(x, mode="r").R for x in (self.factors[0], self.factors[1].T))
            return float(torch.linalg.matrix_norm(triangle_b @ triangle_a.T))
        base, trained = (t if t.ndim > 1 else t.reshape(1, -1) for t in (self.base, self.trained))
        total, rows = 0.0, max(1, _BLOCK // max(1, math.prod(base.shape[1:])))
        for b, w in zip(base.split(rows), trained.split(rows), strict=True):
            total += float((w.to(torch.float64) - b.to(torch.float64)).square().sum())
        return math.sqrt(total)


class Difference:
    """Base against trained.

    Args:
        base: the checkpoint training started from.
        trained: a checkpoint of the same model, or an adapter for it.

    Attributes:
        parts: the base's matrices and vectors; an update has the same.

    Raises:
        CompatibilityError: another architecture or vocabulary.
        WeightsError: tensors are missing, extra or mis-shaped; the first few are named with their files.
    """

    def __init__(self, base: Checkpoint, trained: Checkpoint | Adapter):
        self.base, self.trained = base, trained
        self.parts = base.parts()
        self._several = Counter(part.tensor for part in self.parts)
        self._names: dict[str, str] = {}
        if isinstance(trained, Adapter):
            self._match_adapter(trained)
        else:
            _check_architecture(base, trained)
            self._match(trained)

    def update(self, part: Part, device: torch.device | str = "cpu") -> Update:
        """The update of one part; reads the tensors it lies in."""
        base = part.view(self.base.load(part.tensor, device))
        name = self._names.get(part.tensor)
        if isinstance(self.trained, Checkpoint):
            assert name is not None
            return Update(part, base, part.view(self.trained.load(name, device)))
        if name is None:
            return Update(part, base)
        factors = self.trained.factors(name)
        if factors is None:
            full = self.trained.full(name, device)
            assert full is not None
            return Update(part, base, part.view(full))
        b_MR, a_RN = (factor.to(device) for factor in factors)
        return Update(part, base, factors=(b_MR if part.rows is None else b_MR[slice(*part.rows)], a_RN))

    def updates(self, device: torch.device | str = "cpu") -> Iterator[Update]:
        """All updates in the order of `parts`, each stored tensor read once."""
        for name, parts in groupby(self.parts, key=lambda part: part.tensor):
            # as long as a tensor is held, it is not read again for its other parts
            held = [c.load(n, device) for c, n in self._sources(name)] if self._several[name] > 1 else []
            for part in parts:
                yield self.update(part, device)
            del held

    def _sources(self, name: str) -> list[tuple[Checkpoint, str]]:
        """Where a tensor of the base is stored, and its counterpart where that is a tensor too."""
        trained = [(self.trained, self._names[name])] if isinstance(self.trained, Checkpoint) else []
        return [(self.base, name), *trained]

    def _match(self, trained: Checkpoint) -> None:
        """Pair the names, with or without wrappers' prefixes, and compare shapes."""
        mine = {part.tensor: self.base.shapes[part.tensor] for part in self.parts}
        theirs = dict(trained.shapes)
        if is_tied(trained.config) and any(place_of(name).module == "embedding" for name in theirs):
            theirs = {name: shape for name, shape in theirs.items() if place_of(name).module != "head"}
        self._names = {name: name for name in mine if name in theirs}
        left = {_bare(name): name for name in theirs if name not in self._names}
        for name in mine:
            if name not in self._names and _bare(name) in left:
                self._names[name] = left.pop(_bare(name))
        missing = [name for name in mine if name not in self._names]
        if missing or left:
            raise WeightsError(
                f"{trained.path} does not hold the same tensors as the base {self.base.path}: "
                + "; ".join(
                    f"{len(names)} {kind} ({', '.join(where)})"
                    for kind, names, where in (
                        (
                            "missing",
                            missing,
                            [f"'{n}', in the base in {self.base.files[n].name}" for n in missing[:3]],
                        ),
                        ("extra", left, [f"'{n}' in {trained.files[n].name}" for n in list(left.values())[:3]]),
                    )
                    if names
                )
                + ". Expected a checkpoint trained from this base."
                + _tie_hint([*missing, *left])
            )
        wrong = [name for name in mine if mine[name] != theirs[self._names[name]]]
        if wrong:
            listed = ", ".join(f"'{n}' {theirs[self._names[n]]} instead of {mine[n]}" for n in wrong[:3])
            raise WeightsError(
                f"{trained.files[self._names[wrong[0]]]}: {len(wrong)} tensors have another shape than in the base "
                f"{self.base.path}: {listed}. Expected a checkpoint trained from this base."
            )

    def _match_adapter(self, adapter: Adapter) -> None:
        parts: dict[str, list[Part]] = {}
        for part in self.parts:
            parts.setdefault(part.tensor, []).append(part)
        bare = {_bare(name): name for name in parts}
        for name in adapter.names:
            tensor = name if name in parts else bare.get(_bare(name))
            if tensor is None and place_of(name).module == "head" and is_tied(self.base.config):
                if adapter.is_copied(name):
                    continue
                raise WeightsError(
                    f"{adapter.path} trains a head of its own ('{name}'), but the base {self.base.path} ties its head to the "
                    "token embedding. Merge it into a base that is saved with tie_word_embeddings=False, and compare that."
                )
            if tensor is None:
                raise WeightsError(
                    f"{adapter.path} adapts '{name}', which the base {self.base.path} does not have. Expected an adapter "
                    "trained on this base."
                )
            expected = self.base.shapes[tensor]
            if adapter.has_factors(name) and parts[tensor][0].transposed:
                expected = expected[::-1]
            if adapter.shape(name) != expected:
                raise WeightsError(
                    f"{adapter.path} adapts '{name}' with shape {adapter.shape(name)}, but the base {self.base.path} has "
                    f"{expected}. Expected an adapter trained on this base."
                )
            self._names[tensor] = name


def _bare(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _tie_hint(names: list[str]) -> str:
    if not names or any(place_of(name).module != "head" for name in names):
        return ""
    return (
        " Only one of them ties its output head to the token embedding (tie_word_embeddings in config.json): save the tied "
        "one with a head of its own, and compare again."
    )


def _check_architecture(base: Checkpoint, trained: Checkpoint) -> None:
    kinds = [text_config(c.config).get("model_type", c.config.get("model_type")) for c in (base, trained)]
    if kinds[0] != kinds[1]:
        raise CompatibilityError(
            f"base and trained are of different architectures: {base.path} is {kinds[0]}, {trained.path} is {kinds[1]}. "
            "Expected a checkpoint trained from this base."
        )
    rows = [_vocabulary(c) for c in (base, trained)]
    if None not in rows and rows[0] != rows[1]:
        raise CompatibilityError(
            f"base and trained have different vocabularies: {base.path} has {rows[0]} rows of embeddings, {trained.path} "
            f"{rows[1]}. Resize the base the same way (model.resize_token_embeddings) and save it, then compare."
        )


def _vocabulary(checkpoint: Checkpoint) -> int | None:
    for name, shape in checkpoint.shapes.items():
        place = place_of(name)
        if place.module == "embedding" and place.matrix == "tokens" and len(shape) == 2:
            return shape[0]
    return None
