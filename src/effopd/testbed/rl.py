"""Teacher of the testbed: the base student tuned by GRPO (TRL's `GRPOTrainer`) on both families.

The reward is 1 for a correct answer and 0 otherwise. reasoning-gym's partial credit is not used, so
that the reward is the accuracy.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback, Qwen3ForCausalLM, Trainer, TrainerCallback

from effopd.errors import ConfigError
from effopd.tasks.base import Example, Verifier
from effopd.tasks.testbed_families import verify


@dataclass(frozen=True)
class RLSettings:
    """GRPO settings.

    Attributes:
        questions: training questions per family.
        steps: optimizer steps.
        prompts_per_step: distinct prompts per step, each with `num_generations` samples.
        learning_rate: constant learning rate.
        max_completion_length: limit in tokens, including the end token.
    """

    questions: int = 4_000
    steps: int = 120
    prompts_per_step: int = 48
    num_generations: int = 8
    learning_rate: float = 5e-5
    max_completion_length: int = 24
    temperature: float = 1.0
    beta: float = 0.0
    epsilon: float = 0.2
    loss_type: str = "dapo"
    scale_rewards: str = "group"
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("questions", "steps", "prompts_per_step"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rl.{name}: expected at least 1, got {getattr(self, name)}. Raise it.")
        if self.num_generations < 2:
            raise ConfigError(f"rl.num_generations: expected at least 2, got {self.num_generations}. Raise it.")


def train_teacher(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: RLSettings,
    seed: int,
    log: Callable[[str], None] = print,
    verify: Verifier = verify,
) -> None:
    """Tune `model` in place with GRPO; `verify` grades a completion (1.0: correct)."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    examples = list(examples)
    random.Random(seed).shuffle(examples)
    by_id = {example.id: example for example in examples}

    def correct(completions, example_id, **_) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [float(verify(text, by_id[i]) >= 1.0) for text, i in zip(texts, example_id, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.prompts_per_step * settings.num_generations,
            num_generations=settings.num_generations,
            max_completion_length=settings.max_completion_length,
            temperature=settings.temperature,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            beta=settings.beta,
            epsilon=settings.epsilon,
            loss_type=settings.loss_type,
            scale_rewards=settings.scale_rewards,
            max_grad_norm=settings.max_grad_norm,
            seed=seed,
            **trainer_defaults(),
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=correct,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": e.prompt, "example_id": e.id} for e in examples]),
            processing_class=tokenizer,
            callbacks=[_LogReward(log, settings.steps)],
        )
        run_quietly(trainer)
    model.eval()


def run_quietly(trainer: Trainer) -> None:
    """Train without the console line that transformers prints per logged step."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def trainer_defaults() -> dict:
    """Settings shared by the recipe's trainers: fp32 on the CPU, no checkpoints, no reports."""
    return {
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


class _LogReward(TrainerCallback):
    """Log every twentieth of the run: mean reward since the last line, mean length of the step."""

    def __init__(self, log: Callable[[str], None], steps: int) -> None:
        self.log, self.every = log, max(1, steps // 20)
        self.rewards: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "reward" not in logs:
            return
        self.rewards.append(logs["reward"])
        if len(self.rewards) == self.every:
            mean = float(torch.tensor(self.rewards).mean())
            self.log(f"rl step {state.global_step}: reward {mean:.3f}, length {logs['completions/mean_length']:.1f}")
            self.rewards = []
