"""GRPO on the tiny models under DDP, as a script that torchrun starts: rollouts serve two steps,
one is resumed in between.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

from distill.test_rl import make_trainer

from effopd.common.distributed import exit_gloo


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", default=False)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trainer = make_trainer(
        arguments.out,
        per_device_train_batch_size=8,
        num_iterations=2,
        save_strategy="steps",
        save_steps=3,
        max_steps=6,
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.accelerator.is_main_process:
        torch.save({name: p.detach().clone() for name, p in model.named_parameters()}, arguments.out / "weights.pt")
    exit_gloo()


if __name__ == "__main__":
    main()
