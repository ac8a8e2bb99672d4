"""Updates between a base and a trained checkpoint, streamed one matrix at a time.

Architecture, vocabulary, names and shapes are checked from headers before a tensor is read.
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

#: Elements of one float64 block (64 MiB).
_BLOCK = 2**23


class Update:
    """Update of one matrix or vector, oriented out × in.

    Attributes:
        part: the part of the checkpoint.
        base: W_0 in its stored dtype. Do not edit it: it can be shared.
        factors: (b_MR, a_RN), float64, with ΔW = b a, for an adapted weight; otherwise `None`.
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
        self._sources = sources  # kept alive so that the next part of the same tensors is not read again

    @property
    def trained(self) -> Tensor:
        """W_t in its stored dtype; for factors W_0 + b a, added in float64 and rounded to float32.

        W_0 if the adapter does not change this part.
        """
        if self._trained is None:
            self._trained = self.base
            if self.factors is not None:
                b_MR, a_RN = self.factors
                self._trained = torch.addmm(self.base.to(torch.float64), b_MR, a_RN).to(torch.float32)
        return self._trained

    def delta(self) -> Tensor:
        """ΔW = W_t − W_0, dense, float64; the product of the factors if there are any."""
        if self.factors is not None:
            return self.factors[0] @ self.factors[1]
        return self.trained.to(torch.float64) - self.base.to(torch.float64)

    def norm(self) -> float:
        """‖ΔW‖ (Frobenius), in float64, without a float64 copy of the tensor.

        For factors, computed from their QR decompositions without forming b a.
        """
        if self.factors is not None:
            triangle_b, triangle_a = (torch.linalg.qr(x, mode="r").R for x in (self.factors[0], self.factors[1].T))
            return float(torch.linalg.matrix_norm(triangle_b @ triangle_a.T))
        base, trained = (t if t.ndim > 1 else t.reshape(1, -1) for t in (self.base, self.trained))
        total, rows = 0.0, max(1, _BLOCK // max(1, math.prod(base.shape[1:])))
        for b, w in zip(base.split(rows), trained.split(rows), strict=True):
            total += float((w.to(torch.float64) - b.to(torch.float64)).square().sum())
        return math.sqrt(total)


class Difference:
    """All updates between a base and a trained checkpoint or adapter.

    Args:
        base: the checkpoint from which training started.
        trained: a checkpoint of the same model, in any layout that transformers writes, or an
            adapter of it.

    Attributes:
        parts: matrices and vectors of the base, one per update.

    Raises:
        CompatibilityError: architecture or vocabulary differ.
        WeightsError: tensors are missing, extra or have another shape.
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
        """Update of one part; reads the tensors that contain it."""
        stored = self.base.load(part.tensor, device)
        base = part.view(stored)
        if isinstance(self.trained, Checkpoint):
            other = self._pairs[part]
            if other.expert is not None and part.expert is None:  # stacked in `trained` only: read a single expert
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
        """All updates in the order of `parts`; each stored tensor is read once."""
        for _, parts in groupby(self.parts, key=lambda part: part.tensor):
            update = None  # holding it avoids reading its tensors again for their other parts
            for part in parts:
                update = self.update(part, device)
                yield update
            del update

    def _match_adapter(self, adapter: Adapter) -> None:
        """Fill `_names`: tensor of the base → name in the adapter."""
        parts = {part.tensor: part for part in self.parts}
        bare_names = {bare(name): name for name in parts}
        for name in adapter.names:
            tensor = name if name in parts else bare_names.get(bare(name))
            if tensor is None and is_head(name) and is_tied(self.base.config):
                self._check_tied_head(adapter, name)
                continue
            if tensor is None:
                raise WeightsError(
                    f"{adapter.path} adapts '{name}', which the base {self.base.path} does not have. Expected an "
                    "adapter trained on this base."
                )
            expected = self.base.shapes[tensor]
            if adapter.has_factors(name) and parts[tensor].transposed:
                expected = expected[::-1]
            if adapter.shape(name) != expected:
                raise WeightsError(
                    f"{adapter.path} adapts '{name}' with shape {adapter.shape(name)}, but the base {self.base.path} "
                    f"has {expected}. Expected an adapter trained on this base."
                    + vocabulary_hint(name, (adapter.shape(name), expected))
                )
            self._check_copy(adapter, name, tensor)
            self._names[tensor] = name
        moved = [name for name in self._names if is_token_embedding(name)]
        if moved and self.base.is_untied:
            raise WeightsError(
                f"{adapter.path} trains the token embedding '{moved[0]}' of the base {self.base.path}, whose head is "
                "tied to it, but another checkpoint of this comparison has a separate head. Compare them separately."
            )

    def _check_copy(self, adapter: Adapter, name: str, tensor: str) -> None:
        """Check that PEFT's copy of the base weights of an embedding or head equals this base."""
        copy = adapter.copy(name)
        if copy is not None and not _same(copy, self.base.load(tensor)):
            raise WeightsError(
                f"{adapter.path} was trained on another base: its copy of '{name}' differs from the tensor of "
                f"{self.base.path}. Pass the checkpoint from which it was trained."
            )

    def _check_tied_head(self, adapter: Adapter, name: str) -> None:
        """Check that an adapter's entry for a tied head equals the embedding."""
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
                f"{adapter.path} trains a head of its own ('{name}'), but the base {self.base.path} ties its head to "
                "the token embedding. Merge it into a base that is saved with tie_word_embeddings=False, and compare "
                "the result."
            )


def open_differences(base: Checkpoint, runs: Sequence[Sequence[Path]]) -> list[tuple[Difference, ...]]:
    """Differences between a base and every snapshot of every run, all with the same parts.

    If one checkpoint has a separate head, the tied heads of all others are untied, see `untie`.

    Args:
        base: the checkpoint from which training started; untying modifies it.
        runs: for each run, the folders of its snapshots.

    Raises:
        CheckpointError, WeightsError, CompatibilityError: a folder cannot be read, or does not
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
