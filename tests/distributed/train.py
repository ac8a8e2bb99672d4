"""`OPDTrainer` on the tiny models under DDP or FSDP2, as a script that torchrun starts (for the
tests beside it).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from helpers.tiny_models import make_model, small_scores
from helpers.tiny_run import make_trainer
from peft import LoraConfig, get_peft_model
from plain_loop import whole

from effopd import EffOPDCallback, EffOPDConfig
from effopd.common.distributed import exit_gloo, rank
from effopd.common.zero import whole_parameters
from effopd.extrapolate.scorers.accuracy import AccuracyScorer

FSDP2 = {
    "fsdp_version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": "Qwen3DecoderLayer",
}


def _arm(trainer, step: int) -> None:
    """Arrange a SIGKILL of rank 1 at the second point of the first search after `step` steps."""
    real, calls = AccuracyScorer.__call__, []

    def scored(self, model):
        calls.extend([1] if trainer.state.global_step >= step else [])
        if rank() == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, model)

    AccuracyScorer.__call__ = scored


def fsdp2_on_the_cpu() -> None:
    """accelerate 1.15 shards on accelerators only: on the CPU it takes `fsdp_config` and trains
    with DDP. The state that it would set on a GPU is set here, so that everything above it runs as
    it does there."""
    real = AcceleratorState.__init__

    def initialize(self, *args, fsdp_plugin=None, **kwargs):
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialize


def deepspeed_without_kernels() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives, which takes a minute; gloo's are
    used instead."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False


def zero_config(stage: int) -> dict:
    """DeepSpeed config of a stage; the thresholds of ZeRO-3 suit the tiny model."""
    zero = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 100}
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


@torch.no_grad()
def check_restore(trainer, model) -> None:
    """A candidate that is undone leaves masters and model as they were, bit for bit."""
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EffOPDCallback))
    weights = callback.look_ahead.weights
    held = weights._anchored.parameters

    def now() -> list[torch.Tensor]:
        with whole_parameters(*model.parameters()):
            seen = [whole(p.detach()).clone() for p in model.parameters()]
        return seen + [whole(p.detach()).clone() for p in held.values()]

    before = now()
    for anchor in weights._anchored.anchor.values():
        anchor.mul_(0.9)
    weights.begin()
    weights.move_to(3.0)
    moved = now()
    weights.abort()
    after = now()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    shown = [not torch.equal(a, b) for a, b in zip(before, moved, strict=True)]
    assert sum(shown[: -len(held)]) == len(held)  # the forward pass sees each of them move, and no other


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--strategy", default="none")
    parser.add_argument("--rows", type=int, default=8, help="prompts a step and process")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--mode", choices=["ddp", "fsdp2", "zero1", "zero2", "zero3"], default="ddp")
    parser.add_argument("--files", choices=["FULL_STATE_DICT", "SHARDED_STATE_DICT"], default="FULL_STATE_DICT")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--by-path", action="store_true", help="let the trainer load the student, as a command does")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of --rows prompts a step")
    parser.add_argument("--parts", type=int, default=1, help="parts of a batch of rollouts, one per step")
    parser.add_argument("--kill-at", type=int, default=0, help="kill rank 1 in the first search after this step")
    parser.add_argument("--shard-teacher", action="store_true")
    parser.add_argument("--whole-share", type=float, default=0, help="above 0: the other answers have 2 tokens")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = (
        EffOPDConfig(
            arguments.strategy, **small_scores(arguments.strategy, 10 if arguments.strategy == "effopd" else 8)
        )
        if arguments.strategy != "none"
        else None
    )
    host = {}
    if arguments.mode == "fsdp2":
        fsdp2_on_the_cpu()
        host = {"fsdp": True, "fsdp_config": FSDP2 | {"state_dict_type": arguments.files}}
    if arguments.mode.startswith("zero"):
        deepspeed_without_kernels()
        host = {"deepspeed": zero_config(int(arguments.mode[-1]))}
    if arguments.whole_share:
        host |= {"rollout_horizon": "esr", "horizon_tokens": 2, "horizon_whole_share": arguments.whole_share}
    student = make_model(0)
    if arguments.by_path:
        folder = arguments.out / f"student-{rank()}-{os.getpid()}"
        student.save_pretrained(folder)
        student = str(folder)
    if arguments.lora:
        student = get_peft_model(student, LoraConfig(r=4, target_modules="all-linear"))
    trainer = make_trainer(
        arguments.out,
        student=student,
        effopd=config,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.rows,
        gradient_accumulation_steps=arguments.accumulate,
        updates_per_rollouts=arguments.parts,
        num_mini_batches=arguments.parts,
        eval_steps=2,
        eval_on_start=True,
        eval_temperature=0.0,
        trajectory="powers_of_two",
        teacher_shard=arguments.shard_teacher,
        bf16=arguments.bf16,
        **host,
    )
    if arguments.kill_at:
        _arm(trainer, arguments.kill_at)
    if arguments.shard_teacher:  # a rank holds half of every matrix of the teacher's layers
        layers = [p for layer in trainer.teacher_model.model.layers for p in layer.parameters() if p.ndim == 2]
        assert all(2 * p.to_local().numel() == p.numel() for p in layers), "the teacher is not sharded"
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model(str(arguments.out))
    model = trainer.accelerator.unwrap_model(trainer.model)
    if config is not None and not arguments.lora:
        check_restore(trainer, model)
    with whole_parameters(*model.parameters()):
        weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    if trainer.accelerator.is_main_process:
        torch.save(weights, arguments.out / "weights.pt")
    exit_gloo()


if __name__ == "__main__":
    main()
