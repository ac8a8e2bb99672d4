"""`EffOPDCallback` on unmodified hosts under DDP or FSDP2, as a script that torchrun starts (for
the tests beside it).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

from helpers.tiny_models import make_model, make_task, make_tokenizer
from helpers.trl_hosts import rows
from plain_loop import whole
from train import FSDP2, fsdp2_on_the_cpu
from transformers import Trainer, TrainingArguments
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

from effopd import EffOPDCallback, EffOPDConfig
from effopd.common.distributed import exit_gloo


def trl_host(settings):
    args = DistillationConfig(
        max_completion_length=6, learning_rate=2e-3, activation_checkpointing=False, bf16=False, **settings
    )
    task = make_task(32)
    trainer = DistillationTrainer(
        make_model(0), make_model(1), args, train_dataset=task.to_dataset(), processing_class=make_tokenizer()
    )
    trainer.add_callback(EffOPDCallback(trainer, EffOPDConfig(validation_size=10), task=task))
    return trainer


def transformers_host(settings):
    torch.manual_seed(0)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(5, 30, (64, 12))]
    trainer = Trainer(make_model(0), TrainingArguments(learning_rate=2e-3, **settings), train_dataset=data)

    def scorer(model):  # every rank takes the same rows, so every rank gets the same number
        ids = torch.stack([row["input_ids"] for row in data[:8]])
        with torch.no_grad():
            return -float(model(input_ids=ids, labels=ids).loss)

    trainer.add_callback(EffOPDCallback(trainer, EffOPDConfig(parameters="all"), scorer=scorer))
    return trainer


def sft_host(settings):
    args = SFTConfig(learning_rate=2e-3, bf16=False, gradient_checkpointing=False, **settings)
    data = rows("prompt", "completion")
    trainer = SFTTrainer(make_model(0), args, train_dataset=data, processing_class=make_tokenizer())
    config = EffOPDConfig("effopd", parameters="all", score_rollouts=8)
    trainer.add_callback(EffOPDCallback(trainer, config, scorer="next_batch_loss"))
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--host", choices=["trl", "transformers", "sft"])
    parser.add_argument("--mode", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {
        "output_dir": str(arguments.out),
        "max_steps": arguments.steps,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "lr_scheduler_type": "constant",
    }
    if arguments.mode == "fsdp2":
        fsdp2_on_the_cpu()
        settings |= {"fsdp": True, "fsdp_config": FSDP2 | {"state_dict_type": "FULL_STATE_DICT"}}
    trainer = {"trl": trl_host, "transformers": transformers_host, "sft": sft_host}[arguments.host](settings)
    trainer.train(resume_from_checkpoint=arguments.resume)
    if trainer.accelerator.is_main_process:
        trainer.state.save_to_json(str(arguments.out / "state.json"))
    weights = {
        name: whole(p.detach()).clone()
        for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    }
    if trainer.accelerator.is_main_process:
        torch.save(weights, arguments.out / "weights.pt")
    exit_gloo()


if __name__ == "__main__":
    main()
