"""`OPDTrainer` on the tiny models under DDP, as a script that torchrun starts (for the tests beside it)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "distill")]

from tiny_run import make_trainer

from effopd import EffOPDConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--strategy", default="none")
    parser.add_argument("--rows", type=int, default=8, help="prompts a step and process")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = (
        EffOPDConfig(arguments.strategy, validation_size=10, score_rollouts=8)
        if arguments.strategy != "none"
        else None
    )
    trainer = make_trainer(
        arguments.out,
        effopd=config,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.rows,
        eval_steps=2,
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        torch.save({name: p.detach().clone() for name, p in model.named_parameters()}, arguments.out / "weights.pt")


if __name__ == "__main__":
    main()
