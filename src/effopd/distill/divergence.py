"""Student against teacher, token by token: losses and the exact divergence.

Shapes: B sequences, T completion tokens, N = valid tokens, H hidden width, V shared vocabulary.
Hidden states are projected tile by tile by TRL's chunked kernels; no [B, T, V] tensor is ever made.
Every KL here names its distributions: "reverse KL" is KL(student ‖ teacher) = Σ_v π_θ(v)(log π_θ(v)
− log π*(v)), in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from effopd.distill.trl_host.kernels import divergence_kernel, divergence_loss, logprob_kernel
from effopd.distill.trl_host.models import inside_forward
from effopd.errors import CompatibilityError
from effopd.models.logit_path import core_of, logit_path, whole_tensor
from effopd.models.token_batch import TokenBatch

T = TypeVar("T")

#: Width of a vocabulary tile of the sampled-token kernel.
_VOCAB_CHUNK = 8192

#: Cap of π_θ(y) / π_sampler(y), the importance weight of the sampled loss.
_LARGEST_RATIO = 5.0

#: What a batch of a multimodal student has besides tokens, handed on to the forward.
MULTIMODAL_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


@dataclass(frozen=True)
class Head:
    """The output projection of a model, cut to the shared vocabulary, with its logit
    post-processing.

    logits = softcap(scale · (h Wᵀ + b)); `weight` is [V, H].
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: PreTrainedModel, vocab_size: int) -> Head:
        """The head of `model`, its first `vocab_size` rows (rows beyond the tokenizer are padding).

        Raises:
            CompatibilityError: the model's logits have another form (`effopd.models.logit_path`).
        """
        layer, path = core_of(model).get_output_embeddings(), logit_path(model)
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if weight.shape[0] != vocab_size:
            weight, bias = weight[:vocab_size], bias[:vocab_size] if bias is not None else None
        return cls(weight, bias, path.scale, path.softcap)

    def whole(self) -> Head:
        """The same head with its tensors gathered, if FSDP2 shards them (every rank must call this
        then).
        """
        bias = None if self.bias is None else whole_tensor(self.bias)
        return replace(self, weight=whole_tensor(self.weight), bias=bias)

    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """Dense fp32 logits [N, V] of a few positions."""
        logits = torch.nn.functional.linear(hidden.float(), self.weight.float())
        if self.bias is not None:
            logits = logits + self.bias.float()
        logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / temperature


class Predictions(NamedTuple):
    """What a model predicts at the T answer tokens of a batch, before it becomes [B, T, V]
    logits.
    """

    hidden_BTH: Tensor
    head: Head

    def to(self, device: torch.device) -> Predictions:
        """The hidden states moved to `device`."""
        return Predictions(self.hidden_BTH.to(device), self.head)


class Answers(NamedTuple):
    """The T answer tokens of a batch.

    Attributes:
        ids_BT: token ids.
        mask_BT: whether each is trained on.
        sampler_logps_BT: log π_sampler(y), NaN where it was not recorded; `None`: nowhere.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    sampler_logps_BT: Tensor | None = None

    def to(self, device: torch.device) -> Answers:
        """All of it moved to `device`."""
        logps_BT = None if self.sampler_logps_BT is None else self.sampler_logps_BT.to(device)
        return Answers(self.ids_BT.to(device), self.mask_BT.to(device), logps_BT)


def gathered(model: Any, work: Callable[[], T]) -> T:
    """Run `work` with the weights of `model` whole: inside its forward, if FSDP2 shards it (every
    rank must call this), else right away."""
    return inside_forward(model, model, work) if isinstance(model, FSDPModule) else work()


def mixture_head(teacher: Head, reference: Head, weight: float, dtype: torch.dtype = torch.float32) -> Head:
    """The head of ExOPD's target for hidden states made by `mixture_hidden`, so that no logits have
    to be formed.

    The weight is [W* | W_ref], [V, H* + H_ref], the scale λ scale* and the bias b* + b_ref (1−λ)
    scale_ref / (λ scale*). Given both as the teacher, `full_loss` with β = 1 is KL(π_θ ‖ softmax((λ
    z* + (1−λ) z_ref) / temperature)), in nats per token. Make the head once; it is a copy of both,
    of the reference's weight two where `dtype` is not float32.

    Args:
        dtype: what the kernel rounds hidden states to (`kernel_dtype`).

    Raises:
        CompatibilityError: a model caps its logits; capped logits are no linear function of the
            hidden states.

    Source: arXiv 2602.12125 (the maximiser of λ E log(π*/π_ref) − KL(π_θ ‖ π_ref)).
    """
    if teacher.softcap is not None or reference.softcap is not None:
        raise CompatibilityError(
            "ExOPD adds the logits of teacher and reference, but a soft cap (final_logit_softcapping) is set in "
            f"{'the teacher' if teacher.softcap is not None else 'the reference'}. Use lambda_extrapolation=1."
        )
    scale, first, second = _mixture_factors(teacher, reference, weight)
    parts = [(teacher.bias, first), (reference.bias, second)]
    biases = [factor * bias.float().to(teacher.weight.device) for bias, factor in parts if bias is not None]
    other = reference.weight.to(teacher.weight)
    matrix = torch.cat([teacher.weight, other] + [other] * (dtype.itemsize < 4), dim=1)
    return Head(matrix, torch.stack(biases).sum(0) if biases else None, scale, None)


def mixture_hidden(
    h_teacher_BTH: Tensor,
    h_reference_BTH: Tensor,
    teacher: Head,
    reference: Head,
    weight: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[h* | c h_ref] with c = (1−λ) scale_ref / (λ scale*): hidden states [B, T, H* + H_ref] for
    `mixture_head`.

    In half precision c h_ref is two parts, its rounded value and what that leaves out, [B, T, H* +
    2 H_ref]: λ adds no rounding to that of the two models.
    """
    _, first, second = _mixture_factors(teacher, reference, weight)
    scaled = second * h_reference_BTH.float().to(h_teacher_BTH.device)
    rounded = scaled.to(dtype)
    parts = [first * h_teacher_BTH, rounded.to(h_teacher_BTH.dtype)]
    if dtype.itemsize < 4:
        parts.append((scaled - rounded.float()).to(dtype).to(h_teacher_BTH.dtype))
    return torch.cat(parts, dim=-1)


def _mixture_factors(teacher: Head, reference: Head, weight: float) -> tuple[float, float, float]:
    """Scale of the whole, and factors of teacher and reference inside it; the teacher's is 1 (0 for
    λ = 0).
    """
    scale = weight * teacher.scale or 1.0
    return scale, weight * teacher.scale / scale, (1 - weight) * reference.scale / scale


def kernel_dtype(hidden: Tensor) -> torch.dtype:
    """What the kernels round hidden states to: autocast's type, else their own."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def shared_vocab_size(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer_size: int, role: str = "teacher"
) -> int:
    """The vocabulary both models have; padding rows of the larger one are ignored. `role` names the
    second one in errors.

    Checkpoints of one family often pad their embedding differently (Qwen2.5: 151936 and 152064 rows
    for 151665 tokens). That is harmless as long as every token of the tokenizer has a row in both.

    Raises:
        CompatibilityError: a model has fewer rows than the tokenizer has tokens.
    """
    sizes = {
        "student": student.config.get_text_config().vocab_size,
        role: teacher.config.get_text_config().vocab_size,
    }
    for name, size in sizes.items():
        if size < tokenizer_size:
            raise CompatibilityError(
                f"the {name} has {size} vocabulary rows but the tokenizer has {tokenizer_size} tokens: expected at "
                f"least one row a token. Student and {role} must share the tokenizer (for others, see TRL's GOLD)."
            )
    return min(sizes.values())


def full_loss(
    h_student_BTH: Tensor,
    h_teacher_BTH: Tensor,
    student: Head,
    teacher: Head,
    mask_BT: Tensor,
    beta: float,
    temperature: float,
    num_items: Tensor | int | None,
    by_answer: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's exact full-vocabulary divergence; β = 1 is the reverse KL. Returns loss, Σ student
    entropy, N.

    Args:
        num_items: what the sum over tokens (by_answer: over answers) is divided by; `None`: their
            number here.
        by_answer: every answer counts alike, whatever its length: the mean over answers of the mean
            over their tokens.
    """
    if not by_answer:
        return divergence_loss(h_student_BTH, student, h_teacher_BTH, teacher, mask_BT, beta, temperature, num_items)
    valid = mask_BT != 0
    value_N, entropy_N = divergence_kernel(
        h_student_BTH[valid], student.whole(), h_teacher_BTH[valid], teacher.whole(), beta, temperature
    )
    return _weighted_mean(value_N, valid, num_items, by_answer), entropy_N.sum(), valid.sum()


def token_logprobs(hidden_NH: Tensor, head: Head, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log π(target) and the entropy (nats) at N positions, without the [N, V] logits."""
    return logprob_kernel(hidden_NH, head, targets_N, temperature, _VOCAB_CHUNK)


def sampled_loss(
    h_student_BTH: Tensor,
    h_teacher_BTH: Tensor,
    student: Head,
    teacher: Head,
    completion_ids_BT: Tensor,
    mask_BT: Tensor,
    temperature: float,
    num_items: Tensor | int | None,
    reference: tuple[Tensor, Head] | None = None,
    weight: float = 1.0,
    sampler_logps_BT: Tensor | None = None,
    by_answer: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The paper's policy-gradient form: $-\sum_t A_t \log π_θ(y_t)$, $A_t = \log π^*(y_t) − \log
    π_θ(y_t)$ detached.

    Its expectation over y_t ~ π_θ has the gradient of the reverse KL at every prefix. The ratio of
    one update a batch is 1, so there is nothing to clip. Divided by `num_items` (default: the valid
    tokens). With a `reference` (hidden states and head) and `weight` λ it is ExOPD's: $A_t = λ(\log
    π^*(y_t) − \log π_{ref}(y_t)) − (\log π_θ(y_t) − \log π_{ref}(y_t))$.

    Answers that another engine sampled bring `sampler_logps_BT`: every token is then weighted by
    $\min(π_θ(y_t) / π_{sampler}(y_t), 5)$, detached. `by_answer` and `num_items` are those of
    `full_loss`.

    Returns:
        loss, Σ student entropy, number of valid tokens, like `full_loss`.

    Source: arXiv 2605.11739, section 2, and 2602.12125; PPO ratio and clipping left out because
        they are inactive. The cap
    of the importance weight is that of 2605.11739's runs.
    """
    valid = mask_BT != 0
    targets_N = completion_ids_BT[valid]
    logp_student, entropy = token_logprobs(h_student_BTH[valid], student, targets_N, temperature)
    with torch.no_grad():
        logp_teacher, _ = token_logprobs(h_teacher_BTH[valid], teacher, targets_N, temperature)
        goal = logp_teacher
        if reference is not None:
            logp_reference, _ = token_logprobs(reference[0][valid], reference[1], targets_N, temperature)
            goal = weight * logp_teacher + (1 - weight) * logp_reference
    advantage = goal - logp_student.detach()
    if sampler_logps_BT is not None:
        ratio = (logp_student.detach() - sampler_logps_BT[valid]).exp()
        advantage = advantage * ratio.clamp(max=_LARGEST_RATIO)
    return _weighted_mean(-advantage * logp_student, valid, num_items, by_answer), entropy.sum(), valid.sum()


def _weighted_mean(value_N: Tensor, valid_BT: Tensor, num_items: Tensor | int | None, by_answer: bool) -> Tensor:
    """Σ over tokens, or over answers of their token means, divided by `num_items` (default: how
    many there are).
    """
    length_B = valid_BT.sum(1)
    if by_answer:
        value_N = value_N / length_B.clamp(min=1)[:, None].expand_as(valid_BT)[valid_BT]
    if num_items is None:
        num_items = ((length_B > 0).sum() if by_answer else length_B.sum()).clamp(min=1)
    return value_N.sum() / (num_items.to(value_N.device) if isinstance(num_items, Tensor) else num_items)


@torch.no_grad()
def reverse_kl_of_completions(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
    *,
    vocab_size: int,
    pad_token_id: int,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> tuple[list[float], list[int]]:
    r"""Exact reverse KL of given completions: per sequence $\sum_t KL(π_θ(·|x,y_{<t}) ‖
    π^*(·|x,y_{<t}))$.

    Each sequence gets the KL that it has alone, whatever the others' lengths.

    Returns:
        (KL sums in nats, numbers of tokens), one entry a sequence; Σ sums / Σ tokens is the token
        mean.

    Raises:
        CompatibilityError: a token is outside of the shared vocabulary; or the logits of a model
            have a form whose KL cannot be computed (`effopd.models.logit_path`).
    """
    largest = max((max(row, default=0) for rows in (prompt_ids, completion_ids) for row in rows), default=0)
    if largest >= vocab_size:
        raise CompatibilityError(
            f"token {largest} is outside of the vocabulary that student and teacher share "
            f"(ids below {vocab_size}): expected "
            "sequences that both can read. Sample with `vocab_size` (see `effopd.tasks.evaluate.generate`)."
        )

    starts = range(0, len(prompt_ids), batch_size)
    batches = [
        TokenBatch.of(prompt_ids[i : i + batch_size], completion_ids[i : i + batch_size], pad_token_id) for i in starts
    ]
    values = divergences(student, teacher, batches, vocab_size=vocab_size, beta=1.0, temperature=temperature)
    sums = [each for batch, value_N in zip(batches, values, strict=True) for each in batch.sums(value_N)]
    return sums, [len(answer) for answer in completion_ids]


@torch.no_grad()
def divergences(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[TokenBatch],
    *,
    vocab_size: int,
    beta: float,
    temperature: float,
    teacher_hidden: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """D(student, teacher) [N] at the N scored positions of each batch, in nats, exact over the
    vocabulary.

    D is the reverse KL(π ‖ π*) at β = 1 and the forward KL(π* ‖ π) at β = 0; between them it is
    (1−β) KL(π ‖ m) + β KL(π* ‖ m) with m = (1−β) π + β π*.

    Args:
        teacher_hidden: `batch.hidden(teacher)` of each batch, if it is known.
    """

    def measure() -> list[Tensor]:
        values = []
        for index, batch in enumerate(batches):
            h_student_NH = batch.hidden(student)
            h_teacher_NH = batch.hidden(teacher) if teacher_hidden is None else teacher_hidden[index]
            # after the forward: before it, the head of a sharded student is not whole yet
            heads = [Head.of(model, vocab_size) for model in (student, teacher)]
            h_teacher_NH = h_teacher_NH.to(h_student_NH.device)
            values.append(divergence_kernel(h_student_NH, heads[0], h_teacher_NH, heads[1], beta, temperature)[0])
        return values

    return gathered(student, measure)
