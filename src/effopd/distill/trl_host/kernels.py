"""TRL's chunked divergence and log-probability kernels, which project hidden states in tiles.

A head has `weight` [V, H], `bias`, `scale` and `softcap`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.kernels.chunked_divergence import TOKEN_CHUNK_SIZE, VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.distillation_trainer import _chunked_divergence_loss

#: Positions and vocabulary rows per tile of logits in `divergence_kernel`.
KERNEL_TILE = (TOKEN_CHUNK_SIZE, VOCAB_CHUNK_SIZE)


def _mark_whole(*heads: Any) -> None:
    """Under ZeRO-3, mark head tensors that are no sharded parameters as whole.

    The kernels gather all heads that are not, in the forward and in the backward pass.
    """
    if not is_deepspeed_zero3_enabled():
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for tensor in (tensor for head in heads for tensor in (head.weight, head.bias) if tensor is not None):
        if not hasattr(tensor, "ds_status"):
            tensor.ds_status = ZeroParamStatus.AVAILABLE


def divergence_kernel(
    h_student_NH: Tensor, student: Any, h_teacher_NH: Tensor, teacher: Any, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """The divergence and the student's entropy [N], in nats, in tiles of `KERNEL_TILE`."""
    _mark_whole(student, teacher)
    return ChunkedDivergenceFunction.apply(
        h_student_NH, student.weight, student.bias, h_teacher_NH, teacher.weight, teacher.bias, beta, temperature,
        student.scale, student.softcap, teacher.scale, teacher.softcap,
    )  # fmt: skip


def divergence_loss(
    h_student_BTH: Tensor, student: Any, h_teacher_BTH: Tensor, teacher: Any, mask_BT: Tensor, beta: float,
    temperature: float, num_items: Tensor | int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """TRL's loss: Σ divergence / `num_items` (default: positions), Σ student entropy, positions."""
    _mark_whole(student, teacher)
    return _chunked_divergence_loss(
        h_student_BTH,
        h_teacher_BTH,
        student.weight,
        teacher.weight,
        mask_BT,
        beta,
        num_items_in_batch=num_items,
        student_lm_head_bias=student.bias,
        teacher_lm_head_bias=teacher.bias,
        student_logit_scale=student.scale,
        teacher_logit_scale=teacher.scale,
        student_final_logit_softcapping=student.softcap,
        teacher_final_logit_softcapping=teacher.softcap,
        temperature=temperature,
    )


def logprob_kernel(
    hidden_NH: Tensor, head: Any, targets_N: Tensor, temperature: float, tile: int
) -> tuple[Tensor, Tensor]:
    """log π(target) and the entropy [N], in nats, in tiles of `tile` vocabulary rows."""
    _mark_whole(head)
    logp_N, entropy_N, *_ = ChunkedLogProbFunction.apply(
        hidden_NH, head.weight, head.bias, targets_N, temperature, tile, head.softcap, head.scale, ("entropy",)
    )
    return logp_N, entropy_N
