"""A base and a trained checkpoint as a stream of updates, one matrix at a time.

Everything that can be told from headers (architecture, vocabulary, names, shapes) is checked before
a tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from effopd.errors import WeightsError
from effopd.weights.adapter import Adapter
from effopd.weights.naming import is_head, is_tied, is_token_embedding
from effopd.weights.pairing import bare, check_architecture, pair, untie, vocabulary_hint
from effopd.weights.parts import Part
from effopd.weights.reader import Checkpoint, open_checkpoint

#: Numbers in one float64 block (64 MiB).
_BLOCK = 2**23


class Update:
    """One matrix or vector of the base and of the trained model, oriented out × in.

    Attributes:
        part: where it belongs.
        base: W0, stored dtype. Not to be edited: it may be shared.
        factors: (b_MR, a_RN), float64, with ΔW = b a exactly, where the update is a LoRA adapter's;
            else `None`.
    """

    def __init__(
        self,
        part: Part,
        base: Tensor,
        trained: Tensor | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
        sources: tuple[Tensor, ...] = (),
    ):
        self.part, self.base, self.factors = part, base, factors
        self._trained = trained
        self._sources = sources  # the stored tensors: kept alive, so that the next part of them is not read again

    @property
    def trained(self) -> Tensor:
        """W_t in its stored dtype; for an adapter W0 + b a, added in float64 and rounded to float32
        (W0 where nothing was trained)."""
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
        """‖ΔW‖ (Frobenius), differences and sums in float64, without a float64 copy of the tensor;
        of an adapter from the triangular factors of its factors, without forming b a."""
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
        trained: a checkpoint of the same model, in the same layout or another one that transformers
            writes, or an adapter for it.

    Attributes:
        parts: the base's matrices and vectors; an update has the same.

    Raises:
        CompatibilityError: another architecture or vocabulary.
        WeightsError: tensors are missing, extra or mis-shaped; the first few are named with their
            files.
    """

    def __init__(self, base: Checkpoint, trained: Checkpoint | Adapter):
        self.base, self.trained = base, trained
        self._names: dict[str, str] = {}
        self._pairs: dict[Part, Part] = {}
        if isinstance(trained, Adapter):
            self.parts = base.parts()
            self._match_adapter(trained)
            return
        check_architecture(base, trained)
        untie([base, trained])
        self.parts = base.parts()
        self._pairs = pair(base, trained, self.parts)

    def update(self, part: Part, device: torch.device | str = "cpu") -> Update:
        """The update of one part; reads the tensors it lies in."""
        stored = self.base.load(part.tensor, device)
        base = part.view(stored)
        if isinstance(self.trained, Checkpoint):
            other = self._pairs[part]
            if other.expert is not None and part.expert is None:  # stacked there, not here: read this expert alone
                return Update(part, base, replace(other, expert=None).view(self.trained.load_expert(other, device)))
            theirs = self.trained.load(other.tensor, device)
            return Update(part, base, other.view(theirs), sources=(stored, theirs))
        name = self._names.get(part.tensor)
        if name is None:
            return Update(part, base, sources=(stored,))
        factors = self.trained.factors(name)
        if factors is None:
            full = self.trained.full(name, device)
            assert full is not None
            return Update(part, base, part.view(full), sources=(stored, full))
        b_MR, a_RN = (factor.to(device) for factor in factors)
        return Update(part, base, factors=(part.rows_of(b_MR), a_RN), sources=(stored,))

    def updates(self, device: torch.device | str = "cpu") -> Iterator[Update]:
        """All updates in the order of `parts`, each stored tensor read once."""
        for _, parts in groupby(self.parts, key=lambda part: part.tensor):
            update = None  # as long as it is held, its tensors are not read again for their other parts
            for part in parts:
                update = self.update(part, device)
                yield update
            del update

    def _match_adapter(self, adapter: Adapter) -> None:
        """Pair the adapter's modules with the base's tensors; `_names` becomes tensor of the base →
        name there.
        """
        parts = {part.tensor: part for part in self.parts}
        bare_names = {bare(name): name for name in parts}
        for name in adapter.names:
            tensor = name if name in parts else bare_names.get(bare(name))
            if tensor is None and is_head(name) and is_tied(self.base.config):
                self._check_tied_head(adapter, name)
                continue
            if tensor is None:
                raise WeightsError(
                    f"{adapter.path} adapts '{name}', which the base {self.base.path} does "
                    "not have. Expected an adapter "
                    "trained on this base."
                )
            expected = self.base.shapes[tensor]
            if adapter.has_factors(name) and parts[tensor].transposed:
                expected = expected[::-1]
            if adapter.shape(name) != expected:
                raise WeightsError(
                    f"{adapter.path} adapts '{name}' with shape {adapter.shape(name)}, but "
                    f"the base {self.base.path} has "
                    f"{expected}. Expected an adapter trained on this base."
                    + vocabulary_hint(name, (adapter.shape(name), expected))
                )
            self._check_copy(adapter, name, tensor)
            self._names[tensor] = name
        moved = [name for name in self._names if is_token_embedding(name)]
        if moved and self.base.is_untied:
            raise WeightsError(
                f"{adapter.path} trains the token embedding '{moved[0]}' of the base "
                f"{self.base.path}, whose head is tied to it, "
                "but another checkpoint of this comparison has a head of its own. Compare them separately."
            )

    def _check_copy(self, adapter: Adapter, name: str, tensor: str) -> None:
        """The base weights that PEFT stores beside the factors of an embedding or a head have to be
        this base's.
        """
        copy = adapter.copy(name)
        if copy is not None and not _same(copy, self.base.load(tensor)):
            raise WeightsError(
                f"{adapter.path} was trained on another base: it holds a copy of '{name}' "
                "that differs from the tensor of "
                f"{self.base.path}. Expected the checkpoint it was trained from."
            )

    def _check_tied_head(self, adapter: Adapter, name: str) -> None:
        """What an adapter stores of a tied head has to be what the embedding is: PEFT stores copies
        unasked.
        """
        embedding = next((key for key in adapter.names if is_token_embedding(key)), None)
        tensor = next((key for key in self.base.shapes if is_token_embedding(key)), None)
        if adapter.has_factors(name):
            same = embedding is not None and adapter.has_same_factors(name, embedding)
        else:
            full = adapter.full(name)
            known = [None if embedding is None else adapter.full(embedding)]
            known += [] if tensor is None else [self.base.load(tensor)]
            same = adapter.is_copied(name) and any(x is not None and _same(full, x) for x in known)
        if not same:
            raise WeightsError(
                f"{adapter.path} trains a head of its own ('{name}'), but the base "
                f"{self.base.path} ties its head to the "
                "token embedding. Merge it into a base that is saved with tie_word_embeddings=False, and compare that."
            )


def open_differences(base: Checkpoint, runs: Sequence[Sequence[Path]]) -> list[tuple[Difference, ...]]:
    """The differences of a base and of every snapshot of every run; all of them have the same
    parts.

    Args:
        base: with `untie` where one of the others has a head of its own: then the head is apart
            everywhere.
        runs: the folders of each run.

    Raises:
        CheckpointError, WeightsError, CompatibilityError: a folder that cannot be used or does not
        belong to the base.
    """
    opened = [[open_checkpoint(path) for path in paths] for paths in runs]
    untie([base, *(c for run in opened for c in run if isinstance(c, Checkpoint))])
    return [tuple(Difference(base, c) for c in run) for run in opened]


def _same(one: Tensor | None, other: Tensor) -> bool:
    """Whether two tensors are equal in the coarser of their dtypes."""
    if one is None or one.shape != other.shape:
        return False
    return torch.equal(one, other.to(one.dtype)) or torch.equal(one.to(other.dtype), other)
