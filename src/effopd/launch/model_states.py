"""Memory of a run's weights, gradients, optimizer moments, look-ahead anchor and teacher.

All numbers are bytes on one rank and follow from the sizes of the models. The student has P
parameters, of which R are trained and M are moved by the look-ahead. The teacher has T parameters.
Trained weights are fp32, as TRL loads them. N is the number of ranks under FSDP2 and 1 under DDP.

    weights      4P / N
    gradients    4R / N
    optimizer    8R / N with AdamW
    anchor       4M / N; of adapters 4R, because every rank holds all factors
    candidate    4M / N, during a search
    teacher      T × bytes of its dtype, not sharded; the same for a reference model
    gathered     2 · 2 · P / layers: two layers in bf16, under FSDP2 only

`step_memory` adds the memory of a step, and `memory_estimate` sums both.
"""

from __future__ import annotations

import math

from effopd.launch.model_size import ModelSize

FP32, BF16 = 4, 2

#: Prefix of `--optim` → bytes of optimizer state per trained parameter; the longest match counts.
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
    """Bytes of optimizer state per trained parameter; 8, as for AdamW, for unknown optimizers."""
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
    """Estimated bytes of the model states on one rank, by purpose.

    Args:
        frozen: bytes of the teacher and, if there is one, the reference model.
        ranks: number of data-parallel processes.
        sharded: whether parameters are sharded (FSDP2) rather than replicated (DDP).
        moved: number of parameters moved by the look-ahead, with adapters `trained`. `None`: no
            look-ahead.
        anchor_here: whether the anchor is on the device of the parameters.
        trained: number of adapter parameters. `None`: all parameters of the student are trained.
        weight_bytes: bytes per parameter of the student; adapters are fp32.
        optim: name of the optimizer.
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
            "anchor": math.ceil(FP32 * moved / (share if trained is None else 1)) * anchor_here,
            "candidate": math.ceil(FP32 * moved / share),
        }
    if sharded and student.layers:
        states["gathered"] = math.ceil(2 * BF16 * p / student.layers)
    return states
