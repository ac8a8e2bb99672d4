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
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Sharding:
    """Which model states are sharded over the ranks, and the bytes of those that depend on it.

    Attributes:
        ranks: number of ranks that share the sharded states.
        weights, gradients, optimizer: whether these states are sharded; anchor and candidate are
            sharded as the optimizer's.
        masters: whether ranks share fp32 copies of the trained weights and, during an update, of
            their gradients. The anchor is then sharded with adapters, too.
        trained_bytes: bytes per trained weight and its gradient; upper bound of the other weights'.
        gathered_bytes: bytes per parameter of two gathered layers; 0: no layers are gathered.
    """

    ranks: int = 1
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    masters: bool = False
    trained_bytes: int = FP32
    gathered_bytes: int = 0


#: One process, or DDP: every rank holds all states.
REPLICATED = Sharding()


def fsdp2(ranks: int) -> Sharding:
    """FSDP2: all states are sharded, and two layers are gathered in bf16."""
    return Sharding(ranks, weights=True, gradients=True, optimizer=True, gathered_bytes=BF16)


def zero(stage: int, ranks: int, *, half: bool) -> Sharding:
    """DeepSpeed ZeRO.

    Args:
        stage: 1: optimizer states are sharded; 2: gradients too; 3: weights too.
        half: whether the run trains in bf16 or fp16.
    """
    each = BF16 if half else FP32
    return Sharding(
        ranks,
        weights=stage == 3,
        gradients=stage >= 2,
        optimizer=True,
        masters=True,
        trained_bytes=each,
        gathered_bytes=each if stage == 3 else 0,
    )


def model_state_bytes(
    student: ModelSize,
    frozen: int,
    sharding: Sharding = REPLICATED,
    *,
    moved: int | None = None,
    anchor_here: bool = True,
    trained: int | None = None,
    weight_bytes: float = FP32,
    optim: str = "adamw",
) -> dict[str, int]:
    """Estimated bytes of the model states on one rank, by purpose.

    Args:
        frozen: bytes of the teacher and, if there is one, the reference model.
        sharding: which states the ranks share.
        moved: number of parameters moved by the look-ahead, with adapters `trained`. `None`: no
            look-ahead.
        anchor_here: whether the anchor is on the device of the parameters.
        trained: number of adapter parameters. `None`: all parameters of the student are trained.
        weight_bytes: bytes per parameter of the student; adapters are fp32.
        optim: name of the optimizer.
    """
    p, each = student.parameters, sharding.trained_bytes
    updated = p if trained is None else trained
    held = [  # purpose, bytes on all ranks together, whether they are sharded
        ("weights", min(weight_bytes, each) * p + each * (trained or 0), sharding.weights),
        ("gradients", each * updated, sharding.gradients),
    ]
    if sharding.masters:
        held += [("gradients", FP32 * updated, True), ("masters", FP32 * updated, True)]
    held += [("optimizer", optimizer_state_bytes(optim) * updated, sharding.optimizer), ("teacher", frozen, False)]
    if moved is not None:
        # under FSDP2 every rank holds all factors of the adapters
        anchor_sharded = sharding.optimizer and (trained is None or sharding.masters)
        held += [
            ("anchor", FP32 * moved * anchor_here, anchor_sharded),
            ("candidate", FP32 * moved, sharding.optimizer),
        ]
    if sharding.gathered_bytes and student.layers:
        held.append(("gathered", 2 * sharding.gathered_bytes * p / student.layers, False))
    states: dict[str, int] = {}
    for purpose, size, sharded in held:
        states[purpose] = states.get(purpose, 0) + math.ceil(size / (sharding.ranks if sharded else 1))
    return states


def sampled_whole(student: ModelSize, args: Any) -> int:
    """Bytes of the weights that TRL gathers on every rank to sample under ZeRO 3."""
    if args.use_vllm or not args.ds3_gather_for_generation:
        return 0
    return (BF16 if args.bf16 or args.fp16 else FP32) * student.parameters
