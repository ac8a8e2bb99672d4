"""Exact student–teacher divergence over the vocabulary, as a loss and as a score.

Shapes: B sequences, T completion tokens, N = valid tokens, H hidden width, V shared vocabulary.
TRL's chunked kernels project hidden states tile by tile; no [B, T, V] tensor is ever made.
Reverse KL is KL(student ‖ teacher) = Σ_v π_θ(v)(log π_θ(v) − log π*(v)), in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effopd.common.distributed import is_sharded
from effopd.distill.search_kl import in_float32_on_cpu, reverse_kl
from effopd.distill.trl_host.kernels import divergence_kernel, divergence_loss, logprob_kernel
from effopd.distill.trl_host.models import inside_forward
from effopd.errors import CompatibilityError
from effopd.models.head import Head
from effopd.models.token_batch import TokenBatch

T = TypeVar("T")

#: Width of a vocabulary tile of the sampled-token kernel.
_VOCAB_CHUNK = 8192

#: Non-token inputs of a multimodal student, passed on to its forward.
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


def multimodal_inputs(rollouts: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a forward pass besides tokens that a micro-batch has."""
    return {key: rollouts[key] for key in MULTIMODAL_KEYS if key in rollouts}


class Predictions(NamedTuple):
    """A model's hidden states at the T answer tokens of a batch, and the head for their logits."""

    hidden_BTH: Tensor
    head: Head

    def to(self, device: torch.device) -> Predictions:
        """Copy with the hidden states, but not the head, on `device`."""
        return Predictions(self.hidden_BTH.to(device), self.head)

    def finite(self) -> bool:
        """Whether all hidden states are finite."""
        return bool(torch.isfinite(self.hidden_BTH).all())


class Answers(NamedTuple):
    """The T answer tokens of a batch.

    Attributes:
        ids_BT: token ids.
        mask_BT: nonzero for tokens that are trained on.
        sampler_logps_BT: log π_sampler(y) in nats, NaN if not recorded; `None`: none recorded.
        weight_BT: factors of the tokens' losses; `None`: 1.
        teacher_share_B: α of answers that were sampled from α q + (1−α) p; `None`: 0.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    sampler_logps_BT: Tensor | None = None
    weight_BT: Tensor | None = None
    teacher_share_B: Tensor | None = None

    def to(self, device: torch.device) -> Answers:
        """Copy with all tensors on `device`."""
        return Answers(*(None if each is None else each.to(device) for each in self))  # type: ignore[arg-type]


class AnswerKL(NamedTuple):
    """Sums over an answer's tokens, in nats.

    Attributes:
        kl: reverse KL; with a served teacher, on its support.
        late: its part beyond a horizon; equal to `kl` without one.
        tail_mass, tail_kl: of a served teacher outside its top k: probability, and an estimate of
            what `kl` leaves out.
    """

    kl: float = 0.0
    late: float = 0.0
    tail_mass: float = 0.0
    tail_kl: float = 0.0


def gathered(model: Any, work: Callable[[], T]) -> T:
    """Run `work` with the weights of `model` gathered.

    A model sharded by FSDP2 or ZeRO-3 runs it inside its forward, so every rank must call this; any
    other model runs it directly.
    """
    return inside_forward(model, model, work) if is_sharded(model) else work()


def mixture_head(teacher: Head, reference: Head, weight: float, dtype: torch.dtype = torch.float32) -> Head:
    """Head of ExOPD's target λ z* + (1−λ) z_ref, for the hidden states of `mixture_hidden`.

    Weight: [W* | W_ref], [V, H* + H_ref]. Scale: λ scale*. Bias: b* + b_ref (1−λ) scale_ref / (λ
    scale*). With this head and these hidden states as the teacher, `full_loss` with β = 1 is
    KL(π_θ ‖ softmax((λ z* + (1−λ) z_ref) / temperature)), in nats per token. The head copies both
    weights, the reference's twice in half precision, so build it once.

    Args:
        dtype: type to which the kernel rounds hidden states (`kernel_dtype`).

    Raises:
        CompatibilityError: a model caps its logits, which are then not linear in the hidden states.

    Source: arXiv 2602.12125 (the maximizer of λ E log(π*/π_ref) − KL(π_θ ‖ π_ref)).
    """
    if teacher.softcap is not None or reference.softcap is not None:
        raise CompatibilityError(
            "ExOPD adds the logits of teacher and reference, but "
            f"{'the teacher' if teacher.softcap is not None else 'the reference'} caps its logits "
            "(final_logit_softcapping). Use lambda_extrapolation=1."
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
    """[h* | c h_ref], c = (1−λ) scale_ref / (λ scale*): hidden states for `mixture_head`.

    Shape [B, T, H* + H_ref]. In half precision c h_ref is split into its rounded value and the
    rounding error, [B, T, H* + 2 H_ref], so that λ adds no rounding of its own.
    """
    _, first, second = _mixture_factors(teacher, reference, weight)
    scaled = second * h_reference_BTH.float().to(h_teacher_BTH.device)
    rounded = scaled.to(dtype)
    parts = [first * h_teacher_BTH, rounded.to(h_teacher_BTH.dtype)]
    if dtype.itemsize < 4:
        parts.append((scaled - rounded.float()).to(dtype).to(h_teacher_BTH.dtype))
    return torch.cat(parts, dim=-1)


def _mixture_factors(teacher: Head, reference: Head, weight: float) -> tuple[float, float, float]:
    """Overall scale, teacher factor (1, or 0 for λ = 0) and reference factor."""
    scale = weight * teacher.scale or 1.0
    return scale, weight * teacher.scale / scale, (1 - weight) * reference.scale / scale


def kernel_dtype(hidden: Tensor) -> torch.dtype:
    """Type to which the kernels round hidden states: autocast's if enabled, otherwise their own."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def shared_vocab_size(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer_size: int, role: str = "teacher"
) -> int:
    """Size of the vocabulary that both models have: the smaller number of rows.

    Checkpoints of one family often pad their embedding differently. Qwen2.5, for example, has
    151936 or 152064 rows for 151665 tokens. That is harmless if both have a row for every token.
    `role` names the second model in errors.

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
                f"least one row per token. Student and {role} must share the tokenizer; for models that do not, use "
                "TRL's GOLD."
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
    weight_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's exact full-vocabulary divergence; β = 1 is the reverse KL.

    Args:
        num_items: divisor of the sum over tokens, or over answers with `by_answer`; `None`: their
            number in this batch.
        by_answer: mean over answers of their token means, so that length does not matter.
        weight_BT: factors of the tokens' losses, which leave the divisor as it is; `None`: 1.

    Returns:
        loss in nats, Σ student entropy, number of valid tokens.
    """
    if not by_answer and weight_BT is None:
        return divergence_loss(h_student_BTH, student, h_teacher_BTH, teacher, mask_BT, beta, temperature, num_items)
    valid = mask_BT != 0
    value_N, entropy_N = divergence_kernel(
        h_student_BTH[valid], student.whole(), h_teacher_BTH[valid], teacher.whole(), beta, temperature
    )
    return weighted_mean(value_N, valid, num_items, by_answer, weight_BT), entropy_N.sum(), valid.sum()


def interior_factor(beta: float) -> float:
    """1 / (β(1−β)) for 0 < β < 1, otherwise 1: it undoes the decay of the divergence at the ends.

    TRL's divergence for 0 < β < 1 vanishes as β tends to 0 or 1, although it is a KL at 0 and at 1.
    Times this factor, it tends to the forward KL at 0 and to the reverse KL at 1.
    """
    return 1 / (beta * (1 - beta)) if 0 < beta < 1 else 1.0


def token_logprobs(hidden_NH: Tensor, head: Head, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log π(target) and the entropy (nats) at N positions, without the [N, V] logits."""
    return logprob_kernel(hidden_NH, head, targets_N, temperature, _VOCAB_CHUNK)


def item_count(valid_BT: Tensor, by_answer: bool) -> Tensor:
    """Number of valid tokens, or of answers that have any; at least 1."""
    length_B = valid_BT.sum(1)
    return ((length_B > 0).sum() if by_answer else length_B.sum()).clamp(min=1)


def weighted_mean(
    value_N: Tensor,
    valid_BT: Tensor,
    num_items: Tensor | int | None,
    by_answer: bool,
    weight_BT: Tensor | None = None,
) -> Tensor:
    """Σ over tokens, or Σ over answers of token means, divided by `num_items` (default: count).

    Args:
        value_N: values of the valid tokens.
        valid_BT: bool; marks the valid tokens.
        weight_BT: factors of the values, which do not enter the count; `None`: 1.
    """
    length_B = valid_BT.sum(1)
    if weight_BT is not None:
        value_N = value_N * weight_BT[valid_BT]
    if by_answer:
        value_N = value_N / length_B.clamp(min=1)[:, None].expand_as(valid_BT)[valid_BT]
    if num_items is None:
        num_items = item_count(valid_BT, by_answer)
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
    r"""Exact reverse KL per completion: $\sum_t KL(π_θ(·|x,y_{<t}) ‖ π^*(·|x,y_{<t}))$, in nats.

    The value of a sequence does not depend on the other sequences of its batch.

    Returns:
        (KL sums in nats, numbers of tokens), one entry per sequence. Σ sums / Σ tokens is the mean
        per token.

    Raises:
        CompatibilityError: as `answer_kls`.
    """
    sums = answer_kls(
        student, teacher, prompt_ids, completion_ids, vocab_size=vocab_size, pad_token_id=pad_token_id,
        temperature=temperature, batch_size=batch_size,
    )  # fmt: skip
    return [each.kl for each in sums], [len(answer) for answer in completion_ids]


@torch.no_grad()
def answer_kls(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
    *,
    vocab_size: int,
    pad_token_id: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    horizon: int = 0,
) -> list[AnswerKL]:
    """`reverse_kl_of_completions`, and its part beyond the first `horizon` tokens of each answer.

    Raises:
        CompatibilityError: a token is outside the shared vocabulary, or a model's logits have a
            form that is not supported (`effopd.models.logit_path`).
    """
    largest = max((max(row, default=0) for rows in (prompt_ids, completion_ids) for row in rows), default=0)
    if largest >= vocab_size:
        raise CompatibilityError(
            f"token {largest} is outside the vocabulary that student and teacher share: expected ids below "
            f"{vocab_size}. Sample with `vocab_size` (see `effopd.tasks.evaluate.generate`)."
        )

    starts = range(0, len(prompt_ids), batch_size)
    batches = [
        TokenBatch.of(prompt_ids[i : i + batch_size], completion_ids[i : i + batch_size], pad_token_id) for i in starts
    ]
    values = divergences(student, teacher, batches, vocab_size=vocab_size, beta=1.0, temperature=temperature)
    return [
        AnswerKL(*each)
        for batch, value_N in zip(batches, values, strict=True)
        for each in zip(batch.sums(value_N), batch.sums(value_N, horizon), strict=True)
    ]


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
    teacher_logits: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    keep: list[Tensor] | None = None,
) -> list[Tensor]:
    """Exact divergence D [N], in nats, at the N scored positions of each batch.

    D is the reverse KL(π ‖ π*) at β = 1 and the forward KL(π* ‖ π) at β = 0. For 0 < β < 1 it is
    (1−β) KL(π ‖ m) + β KL(π* ‖ m) with m = (1−β) π + β π*.

    Args:
        teacher_hidden: `batch.hidden(teacher)` of each batch; `None`: computed here.
        teacher_logits: `Target.logits` of `search_kl` for each batch, for β = 1; `None`: not made.
        keep: the student's hidden states of each batch are appended to it, if it is a list.
    """

    def measure() -> list[Tensor]:
        values = []
        for index, batch in enumerate(batches):
            h_student_NH = batch.hidden(student)
            if keep is not None:
                keep.append(h_student_NH)
            h_teacher_NH = batch.hidden(teacher) if teacher_hidden is None else teacher_hidden[index]
            # after the forward: before it, the head of a sharded student is not whole yet
            heads = [Head.of(model, vocab_size) for model in (student, teacher)]
            if teacher_logits and (kept := teacher_logits[index]) and in_float32_on_cpu(h_student_NH):
                values.append(reverse_kl(h_student_NH, heads[0], kept, temperature))
                continue
            h_teacher_NH = h_teacher_NH.to(h_student_NH.device)
            values.append(divergence_kernel(h_student_NH, heads[0], h_teacher_NH, heads[1], beta, temperature)[0])
        return values

    return gathered(student, measure)
