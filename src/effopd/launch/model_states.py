"""Memory of a run's weights, gradients, optimizer moments, look-ahead anchor and teacher.

All numbers are bytes on one rank and follow from the sizes of the models. The student has P
parameters, of which R are trained and M are moved by the look-ahead. The teacher has T parameters.
Trained weights are fp32, as TRL loads them. N is the number of ranks under FSDP2 and DeepSpeed, and
1 under DDP.

    weights      4P / N
    gradients    4R / N
    optimizer    8R / N with AdamW
    anchor       4M / N; of adapters 4R, because every rank holds all factors
    candidate    4M / N, during a search
    teacher      T × bytes of its dtype, not sharded; the same for a reference model
    gathered     2 · 2 · P / layers: two layers in bf16, under FSDP2 only

DeepSpeed ZeRO trains b-byte weights, 2 in 16 bits and otherwise 4, and holds fp32 masters of them:

                 stage 1         stage 2         stage 3
    weights      bP              bP              bP / N
    gradients    bR + 4R / N     (b + 4)R / N    (b + 4)R / N; 4R / N are the step's fp32 copy
    masters      4R / N          4R / N          4R / N
    optimizer    8R / N          8R / N          8R / N
    anchor       4M / N          4M / N          4M / N; the same for the candidate
    gathered     –               –               2bP / layers; bP while sampling

Not counted: DeepSpeed's communication buckets and offload, and weights that stage 3 keeps gathered
beyond two layers (`stage3_max_live_parameters`, `stage3_max_reuse_distance`).

`step_memory` adds the memory of a step, and `memory_estimate` sums both.
"""

from __future__ import annotations

import math
from typing import Any

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


def zero_state_bytes(
    student: ModelSize,
    frozen: int,
    stage: int,
    *,
    ranks: int,
    half: bool,
    moved: int | None = None,
    anchor_here: bool = True,
    trained: int | None = None,
    weight_bytes: float = FP32,
    optim: str = "adamw",
) -> dict[str, int]:
    """Estimated bytes of the model states on one rank under DeepSpeed ZeRO, by purpose.

    Args:
        stage: 1: optimizer states are sharded; 2: gradients too; 3: weights too.
        half: whether the run trains in bf16 or fp16.
        frozen, ranks, moved, anchor_here, trained, weight_bytes, optim: as for `model_state_bytes`.
    """
    p, each = student.parameters, BF16 if half else FP32
    updated = p if trained is None else trained
    weights = min(weight_bytes, each) * p + each * (trained or 0)
    states = {
        "weights": math.ceil(weights / (ranks if stage == 3 else 1)),
        "gradients": math.ceil(each * updated / (ranks if stage >= 2 else 1)) + math.ceil(FP32 * updated / ranks),
        "masters": math.ceil(FP32 * updated / ranks),
        "optimizer": math.ceil(optimizer_state_bytes(optim) * updated / ranks),
        "teacher": frozen,
    }
    if moved is not None:
        states |= {
            "anchor": math.ceil(FP32 * moved / ranks) * anchor_here,
            "candidate": math.ceil(FP32 * moved / ranks),
        }
    if stage == 3 and student.layers:
        states["gathered"] = math.ceil(2 * each * p / student.layers)
    return states


def sampled_whole(student: ModelSize, args: Any) -> int:
    """Bytes of the weights that TRL gathers on every rank to sample under ZeRO 3."""
    if args.use_vllm or not args.ds3_gather_for_generation:
        return 0
    return (BF16 if args.bf16 or args.fp16 else FP32) * student.parameters
