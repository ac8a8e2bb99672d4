"""Memory of a training step: sampling, activations, loss, evaluation and health metrics.

Activations are counted. The model is built with fake tensors, which have shapes but no memory, and
one forward pass runs with hooks that add up the tensors saved by autograd. The count therefore
reflects the model's attention, MLP widths, adapters and autocast. Models that fake tensors cannot
run (data-dependent experts) are assumed to save as much as a Llama layer: 6 hidden states, 6
attention widths and 4 MLP widths per token and layer.

B sequences of L tokens, of which T are the answer; N = B·T; V vocabulary size; H hidden size:

    activations  tensors saved by one forward pass; with checkpointing, one hidden state per
                 layer and the saved tensors of one layer
    loss         fp32 tiles of min(N, 4096) × min(V, 32768) logits, 3 with Triton and 11
                 without; plus the head's gradient, 4VH
    sampling     keys and values of all positions, and six fp32 copies of the [B, V] logits; of the
                 teacher, too, if it samples along
    health       eight fp32 copies of [tokens, V] logits
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from effopd.distill.trl_host.kernels import KERNEL_TILE
from effopd.launch.meta_model import model_of
from effopd.launch.model_states import BF16, FP32

logger = logging.getLogger(__name__)

#: fp32 tiles of logits that the chunked divergence holds at the same time: in torch, in Triton.
_TILES, _TILES_TRITON = 11, 3
#: The same in torch without a gradient.
_TILES_FORWARD = 8
_LOGIT_COPIES, _HEALTH_COPIES = 6, 8
#: Bytes of a Python process with torch, transformers and TRL; a CUDA context takes about as much.
PROCESS = 900_000_000


@dataclass(frozen=True)
class StepShape:
    """Shapes of a rank's training and evaluation batches.

    Attributes:
        rows: sequences per micro-batch.
        prompt, answer: maximum lengths in tokens.
        eval_rows: sequences per evaluation batch; 0 without evaluation.
        health_tokens: number of tokens with dense logits for the health metrics.
        checkpointing: whether activations are checkpointed.
        bf16: whether forward passes use 16-bit autocast.
        triton: whether the loss uses Triton kernels.
        sampled: sequences sampled at once; 0: `rows`.
        mixed: whether the teacher samples along.
    """

    rows: int = 1
    prompt: int = 0
    answer: int = 0
    eval_rows: int = 0
    health_tokens: int = 0
    checkpointing: bool = True
    bf16: bool = False
    triton: bool = False
    sampled: int = 0
    mixed: bool = False

    @property
    def length(self) -> int:
        """Maximum length of a sequence in tokens."""
        return self.prompt + self.answer


#: Number of layers that are run; the saved bytes are scaled up to all layers.
_RUN_LAYERS = 4


def _shallow(config: Any) -> tuple[Any, float]:
    """(the configuration with at most `_RUN_LAYERS` layers, layers / layers run)."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    if layers <= _RUN_LAYERS:
        return config, 1.0
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:_RUN_LAYERS])
    text.num_hidden_layers = _RUN_LAYERS
    return config, layers / _RUN_LAYERS


def saved_bytes(config: Any, shape: StepShape, *, attention: str | None = None, adapter: Any = None) -> int:
    """Bytes saved by autograd in one forward pass of the backbone, except parameters and buffers.

    Args:
        adapter: PEFT configuration. `None`: all weights are trained.
    """
    try:
        with _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
            shallow, times = _shallow(config)
            return math.ceil(times * _saved_by_fakes(shallow, shape, attention, adapter))
    except Exception as error:  # fake tensors cannot run this model; an estimate is sufficient
        logger.debug("activations of %s are assumed, not counted: %s", type(config).__name__, error)
        return _saved_by_formula(config.get_text_config(), shape)


def _saved_by_fakes(config: Any, shape: StepShape, attention: str | None, adapter: Any) -> int:
    model: Any = model_of("model", "", config, attention, device="cpu").train()
    if adapter is not None:
        from peft import get_peft_model

        model = get_peft_model(model, adapter).base_model.model
    persistent = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    alive = []  # keeps storages alive, because a freed address could be reused and counted only once

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in persistent:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.zeros(shape.rows, max(1, shape.length), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast(
        "cpu", torch.bfloat16, enabled=shape.bf16
    ):  # fmt: skip
        model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(sizes.values())


def _saved_by_formula(text: Any, shape: StepShape) -> int:
    heads = text.num_attention_heads
    width = (getattr(text, "head_dim", None) or text.hidden_size // heads) * heads
    inner = (
        getattr(text, "moe_intermediate_size", None)
        or getattr(text, "intermediate_size", None)
        or 4 * text.hidden_size
    )
    experts = getattr(text, "num_experts_per_tok", None) or 1
    per_token = 6 * text.hidden_size + 6 * width + 4 * inner * experts
    return (BF16 if shape.bf16 else FP32) * text.num_hidden_layers * shape.rows * shape.length * per_token


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("transformers").setLevel(level)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step on one rank, by purpose. They are not all allocated at the same time."""

    sampling: int
    activations: int
    loss: int
    evaluation: int
    health: int

    def sampled_with(self, weights: int) -> StepMemory:
        """The same step if all weights are gathered, in so many bytes, while it samples."""
        evaluation = self.evaluation + weights if self.evaluation else 0
        return replace(self, sampling=self.sampling + weights, evaluation=evaluation)

    def peak(self, gradients: int, accumulates: bool) -> int:
        """Peak bytes of a step, including gradients but not weights, moments and teacher.

        Args:
            gradients: bytes of the gradients.
            accumulates: whether gradients are accumulated, and so exist during forward passes.
        """
        update = self.activations + self.loss + gradients * accumulates
        return max(self.sampling, update, self.activations // 8 + gradients + self.health, self.evaluation)


def step_memory(
    config: Any, teacher: Any, shape: StepShape, *, attention: str | None = None, adapter: Any = None
) -> StepMemory:
    """Bytes of a step on one rank.

    Args:
        config: configuration of the student.
        teacher: configuration of the teacher. `None`: not available.
    """
    text = config.get_text_config()
    layers, vocab = text.num_hidden_layers, text.vocab_size
    width = BF16 if shape.bf16 else FP32
    saved = saved_bytes(config, shape, attention=attention, adapter=adapter)
    activations = saved
    if shape.checkpointing:
        activations = FP32 * layers * shape.rows * shape.length * text.hidden_size + saved // layers
    scored = 0
    if teacher:
        same = adapter is None and _settings(teacher) == _settings(config)
        whole = saved if same else saved_bytes(teacher, shape, attention=attention)
        scored = whole // teacher.get_text_config().num_hidden_layers
    tiles = _TILES_TRITON if shape.triton else _TILES
    head = FP32 * vocab * text.hidden_size if adapter is None else 0
    loss = max(scored, tiles * _tile(shape.rows * shape.answer, vocab) + head)
    per_row = _decoded_row(text, shape.length)
    along = _decoded_row(teacher.get_text_config(), shape.length) if shape.mixed and teacher else 0
    forward = (_TILES_TRITON if shape.triton else _TILES_FORWARD) * _tile(shape.eval_rows * shape.answer, vocab)
    measured = 2 * width * shape.eval_rows * shape.length * text.hidden_size + saved * shape.eval_rows // (
        layers * shape.rows
    )
    return StepMemory(
        sampling=(per_row + along) * (shape.sampled or shape.rows),
        activations=activations,
        loss=loss,
        evaluation=max(per_row * shape.eval_rows, forward + measured if shape.eval_rows else 0),
        health=_HEALTH_COPIES * FP32 * min(shape.health_tokens, shape.rows * shape.answer) * vocab,
    )


def _decoded_row(text: Any, length: int) -> int:
    """Bytes per sequence while a model decodes it: keys, values and logits."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * FP32 * text.num_hidden_layers * heads * size * length + _LOGIT_COPIES * FP32 * text.vocab_size


def _settings(config: Any) -> dict[str, Any]:
    """All settings of a configuration, without the folder that it was read from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def _tile(tokens: int, vocab: int) -> int:
    return FP32 * min(tokens, KERNEL_TILE[0]) * min(vocab, KERNEL_TILE[1])
