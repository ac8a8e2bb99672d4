r"""LoRA adapters on disk: updates as factors, ΔW = scaling · B A, without forming the product.

Reads the files of PEFT's `save_pretrained`. Scaling is α/r, or α/√r for rank-stabilized LoRA, with
PEFT's per-module patterns. Refused: DoRA (its update is not B A), other PEFT methods, trained
tokens, and adapters on stacked expert parameters.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effopd.errors import CheckpointError, ConfigError, WeightsError
from effopd.weights.checkpoint_files import ADAPTER, read_json
from effopd.weights.safetensors_files import StoredTensor, read_header, read_tensor

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?$")
_NOT_B_A = (
    "use_dora", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "monteclora_config", "layer_replication",
)  # fmt: skip
#: Initializations that subtract the initial B A from the base weights.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MERGE = (
    "Merge it into its base first: PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(NEW)."
)


@dataclass(frozen=True)
class _Pair:
    """Stored factors of one module."""

    a: str
    b: str
    embedding: bool


class Adapter:
    """A LoRA adapter folder; tensors are read on demand.

    Args:
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`.

    Attributes:
        config: contents of `adapter_config.json`.
        files: stored tensor → file, for error messages.

    Raises:
        CheckpointError: a file is missing or truncated, a factor has no counterpart, or there are
            only pickle files.
        ConfigError: the adapter is not LoRA, or its update is not scaling · B A.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config: dict[str, Any] = read_json(self.path / ADAPTER)
        self._check_config()
        file = self.path / ADAPTER_WEIGHTS
        if not file.is_file() and (self.path / "adapter_model.bin").is_file():
            raise CheckpointError(
                f"{self.path} has only adapter_model.bin, a pickle file, which can run code when it is loaded. If you "
                "trust it, load it with PEFT once and save it again: model.save_pretrained(NEW_FOLDER)."
            )
        self._stored: dict[str, StoredTensor] = read_header(file)
        self.files = {name: stored.file for name, stored in self._stored.items()}
        self._pairs: dict[str, _Pair] = {}
        self._full: dict[str, str] = {}
        self._copies: dict[str, str] = {}
        self._sort()

    def _check_config(self) -> None:
        kind = str(self.config.get("peft_type"))
        if kind != "LORA":
            raise ConfigError(f"{self.path}: expected a LoRA adapter, got peft_type={kind}. {_MERGE}")
        for field in _NOT_B_A:
            if self.config.get(field):
                raise ConfigError(
                    f"{self.path}: adapters with {field} are not supported, because their update is not just "
                    f"scaling · B A. {_MERGE}"
                )
        start = str(self.config.get("init_lora_weights", True))
        if start.lower().startswith(_MOVES_BASE):
            raise ConfigError(
                f"{self.path}: init_lora_weights={start} changed the base weights before training, so the update is "
                "not just scaling · B A. Merge the adapter into the weights it was trained on and save the result, or "
                "save the adapter again with PEFT's path_initial_model_for_weight_conversion."
            )

    def _sort(self) -> None:
        """Sort stored tensors into factors, full tensors and copies of base weights."""
        halves: dict[str, dict[str, str]] = {}
        embeddings = set()
        for name in self._stored:
            factor = _FACTOR.match(name)
            module = _base_name(factor[1] if factor else name)
            if factor is None:
                if ".lora_" in name:
                    raise ConfigError(f"{self.path}: tensor '{name}' belongs to an unknown variant of LoRA. {_MERGE}")
                self._full[module] = name
                continue
            halves.setdefault(module, {})[factor[3]] = name
            if factor[2]:
                embeddings.add(module)
        for module, factors in halves.items():
            if factors.keys() != {"A", "B"}:
                raise CheckpointError(
                    f"{self.path / ADAPTER_WEIGHTS}: module '{module}' has lora_{''.join(factors)} but not its "
                    "counterpart. The file is incomplete; copy it again."
                )
            name = f"{module}.weight"
            self._pairs[name] = _Pair(factors["A"], factors["B"], module in embeddings)
            if name in self._full:  # PEFT stores the base weights of an adapted embedding or head beside its factors
                self._copies[name] = self._full.pop(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the base's tensors that the adapter changes or replaces."""
        return (*self._pairs, *self._full)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(b [out, R], a [R, in]), float64, with ΔW = b a including the scaling.

        `None`: the tensor has no factors.

        Raises:
            WeightsError: a factor is not finite, or the shapes do not multiply.
        """
        pair = self._pairs.get(name)
        if pair is None:
            return None
        a, b = (read_tensor(self._stored[key], key).to(torch.float64) for key in (pair.a, pair.b))
        if a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0]:
            raise WeightsError(
                f"{self.path / ADAPTER_WEIGHTS}: factors of '{name}' have shapes {tuple(b.shape)} and "
                f"{tuple(a.shape)}: expected [out, r] and [r, in]. {_MERGE}"
            )
        b = b * self._scaling(name.removesuffix(".weight"), rank=a.shape[0])
        return (a.T, b.T) if pair.embedding else (b, a)  # an embedding is stored [tokens, width], its update (B A)ᵀ

    def full(self, name: str, device: torch.device | str = "cpu") -> Tensor | None:
        """A tensor stored in full (`modules_to_save`, trained biases), by its name in the base."""
        stored = self._full.get(name)
        return None if stored is None else read_tensor(self._stored[stored], stored).to(device)

    def copy(self, name: str) -> Tensor | None:
        """Copy of the base weights stored with the factors of a tensor; `None`: none."""
        stored = self._copies.get(name)
        return None if stored is None else read_tensor(self._stored[stored], stored)

    def has_same_factors(self, head: str, embedding: str) -> bool:
        """Whether head and token embedding share their update (PEFT's `ensure_weight_tying`)."""
        one, other = self._pairs[head], self._pairs.get(embedding)
        if other is None or one.embedding or not other.embedding:
            return False
        a, b, embedding_a, embedding_b = (
            read_tensor(self._stored[key], key) for key in (one.a, one.b, other.a, other.b)
        )
        scalings = {self._scaling(name.removesuffix(".weight"), len(a)) for name in (head, embedding)}
        return torch.equal(a, embedding_b.T) and torch.equal(b, embedding_a.T) and len(scalings) == 1

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor's update; (out, in) for factors."""
        pair = self._pairs.get(name)
        if pair is None:
            return self._stored[self._full[name]].shape
        a, b = self._stored[pair.a].shape, self._stored[pair.b].shape
        return (a[1], b[0]) if pair.embedding else (b[0], a[1])

    def has_factors(self, name: str) -> bool:
        """Whether a tensor's update is stored as factors."""
        return name in self._pairs

    def is_copied(self, name: str) -> bool:
        """Whether PEFT stored this full tensor without training it (`save_embedding_layers`)."""
        module = name.removesuffix(".weight").rpartition(".")[2]
        return name in self._full and module not in (self.config.get("modules_to_save") or ())

    def _scaling(self, module: str, rank: int) -> float:
        default = self.config.get("lora_alpha")
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, 8 if default is None else default)
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank


def _base_name(name: str) -> str:
    """Name in the base model of a name inside PEFT's wrappers."""
    name = name.removeprefix("base_model.model.")
    for wrapper in (".base_layer", ".modules_to_save.default", ".modules_to_save", ".original_module"):
        name = name.replace(wrapper, "")
    return name


def _by_pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
