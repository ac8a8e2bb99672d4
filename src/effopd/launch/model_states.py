"""Memory of the model states of a run: weights, gradients, optimizer moments, the look-ahead's
anchor, the teacher.

Every number is bytes on one rank, from the sizes of the models alone. fp32 masters as TRL loads
them; N ranks; P parameters of the student, R of them trained, M of them moved by the look-ahead, T
of the teacher:

    weights 4P, gradients 4R, optimizer 8R (AdamW), anchor 4M, candidate 4M (during a search): each
    / N under FSDP2, whole under DDP teacher (and reference): its dtype × T, whole on every rank, as
    TRL and accelerate place it gathered: under FSDP2 two layers at a time in the compute dtype, 2 ·
    2 · P / layers

`step_memory` has what a step works with beside these, and `memory_estimate` the sum.
"""

from __future__ import annotations

import math

from effopd.launch.model_size import ModelSize

FP32, BF16 = 4, 2

#: Bytes of optimizer state per trained parameter, by the start of `--optim`; the longest start that
#: fits counts.
_OPTIMIZER_STATES = {
    "adamw": 8.0,
    "paged_adamw": 8.0,
    "ademamix": 12.0,
    "paged_ademamix": 12.0,
    "adafactor": 0.1,
    "sgd": 0.0,
    "adagrad": 4.0,
    "rmsprop": 4.0,
    "lion": 4.0,
    "paged_lion": 4.0,
    "lomo": 0.0,
    "adalomo": 0.1,
    "adamw_torch_8bit": 2.0,
    "adamw_torch_4bit": 1.0,
    "adamw_bnb_8bit": 2.0,
    "adamw_8bit": 2.0,
    "ademamix_8bit": 3.0,
    "paged_ademamix_8bit": 3.0,
    "paged_adamw_8bit": 2.0,
    "lion_8bit": 1.0,
    "paged_lion_8bit": 1.0,
    "rmsprop_bnb_8bit": 1.0,
    "galore": 2.0,
    "apollo": 2.0,
    "schedule_free_sgd": 4.0,
}


def optimizer_state_bytes(optim: str) -> float:
    """Bytes of optimizer state per trained parameter; AdamW's where the optimizer is not known."""
    starts = [start for start in _OPTIMIZER_STATES if optim.startswith(start)]
    return _OPTIMIZER_STATES[max(starts, key=len)] if starts else 8.0


def model_state_bytes(
    student: ModelSize,
    frozen: int,
    *,
    ranks: int = 1,
    sharded: bool = False,
    moved: int | None = None,
    anchor_here: bool = True,
    trained: int | None = None,
    weight_bytes: float = FP32,
    optim: str = "adamw",
) -> dict[str, int]:
    """Estimated bytes of the model states on one rank, by what they are for.

    Args:
        frozen: bytes of the teacher and, if there is one, the reference.
        ranks: data-parallel processes.
        sharded: FSDP2 rather than DDP.
        moved: parameters that the look-ahead moves; `None`: no look-ahead.
        anchor_here: whether the anchor is beside the parameters rather than on another device.
        trained: parameters of the adapters; `None`: all of the student's are trained.
        weight_bytes: of a parameter of the student; adapters are fp32.
        optim: the optimizer's name.
    """
    share, p = (ranks if sharded else 1), student.parameters
    updated = p if trained is None else trained
    states = {
        "weights": math.ceil((weight_bytes * p + FP32 * (trained or 0)) / share),
        "gradients": math.ceil(FP32 * updated / share),
        "optimizer": math.ceil(optimizer_state_bytes(optim) * updated / share),
        "teacher": frozen,
    }
    if moved is not None:
        states |= {
            "anchor": math.ceil(FP32 * moved / share) * anchor_here,
            "candidate": math.ceil(FP32 * moved / share),
        }
    if sharded and student.layers:
        states["gathered"] = math.ceil(2 * BF16 * p / student.layers)
    return states
