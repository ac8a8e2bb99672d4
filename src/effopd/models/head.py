"""`Head`: a model's output layer as a weight, a bias, a factor and a soft cap.

Shapes: N positions, H hidden width, V shared vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effopd.common.distributed import full_tensor
from effopd.common.zero import is_zero3, whole_parameters
from effopd.models.logit_path import core_of, logit_path


@dataclass(frozen=True)
class Head:
    """Output projection cut to the shared vocabulary: logits = softcap(scale · (h Wᵀ + b)).

    `weight` is [V, H].
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: PreTrainedModel, vocab_size: int) -> Head:
        """The first `vocab_size` rows of the head of `model`; rows past the tokenizer are padding.

        Under ZeRO-3, outside a forward pass, all ranks must call this; the head is then a copy.

        Raises:
            CompatibilityError: the model's logits do not have this form
                (`effopd.models.logit_path`).
        """
        layer, path = core_of(model).get_output_embeddings(), logit_path(model)
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if is_zero3(weight) and weight.numel() == 0:  # outside a forward pass; all ranks gather it
            with whole_parameters(weight, bias):
                weight, bias = (None if each is None else each.detach().clone() for each in (weight, bias))
        if weight.shape[0] != vocab_size:
            weight, bias = weight[:vocab_size], bias[:vocab_size] if bias is not None else None
        return cls(weight, bias, path.scale, path.softcap)

    def whole(self) -> Head:
        """The same head with FSDP2 shards gathered; with shards, every rank must call this."""
        bias = None if self.bias is None else full_tensor(self.bias)
        return replace(self, weight=full_tensor(self.weight), bias=bias)

    def copied(self) -> Head:
        """The same head with copies of its tensors, which do not move with the model."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return replace(self, weight=self.weight.detach().clone(), bias=bias)

    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """Dense float32 logits [N, V], for a small number of positions."""
        logits = torch.nn.functional.linear(hidden.float(), self.weight.float())
        if self.bias is not None:
            logits = logits + self.bias.float()
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if temperature == 1 else logits / temperature
