"""Tokens that the ledger counts in reinforcement learning: those that the models computed."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer
from helpers.tiny_run import make_trainer as make_opd_trainer
from peft import LoraConfig

from effopd.distill.rl import TaskGRPOTrainer, TaskRLOOTrainer
from effopd.distill.rl_config import TaskGRPOConfig, TaskRLOOConfig

SETTINGS = {
    "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 5, "learning_rate": 2e-3,
    "report_to": "none", "activation_checkpointing": False, "disable_tqdm": True, "use_cpu": True, "bf16": False,
    "max_steps": 2, "save_strategy": "no", "dataloader_pin_memory": False,
}  # fmt: skip
GRPO, RLOO = (TaskGRPOTrainer, TaskGRPOConfig), (TaskRLOOTrainer, TaskRLOOConfig)


class Passes:
    """Tokens of the forward passes that score answers, counted at the models."""

    def __init__(self, trainer):
        self.tokens = dict.fromkeys(("loss", "before", "reference"), 0)
        self.trainer = trainer
        for model in filter(None, (trainer.model, trainer.ref_model)):
            model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model, args, kwargs):
        if "labels" not in kwargs:  # a pass of generation
            return
        kind = "loss" if torch.is_grad_enabled() else "before"
        if model is self.trainer.ref_model or self._adapter_off(model):
            kind = "reference"
        self.tokens[kind] += int(kwargs["attention_mask"].sum())

    @staticmethod
    def _adapter_off(model):
        return hasattr(model, "get_model_status") and not model.get_model_status().enabled


def make_trainer(output_dir, kind, config, **settings):
    extra = {name: settings.pop(name) for name in ("peft_config", "rollout_func") if name in settings}
    args = config(output_dir=str(output_dir), **(SETTINGS | settings))
    make_model(0).save_pretrained(output_dir / "start")  # the reference is loaded from the model's own folder
    make_tokenizer().save_pretrained(output_dir / "start")
    task = make_task(16)
    trainer = kind(str(output_dir / "start"), args, task, processing_class=make_tokenizer(), **extra)
    return trainer, task


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "passes"),
    [
        (GRPO, {"beta": 0.0}, {"loss"}),
        (GRPO, {"beta": 0.1}, {"loss", "reference"}),
        (GRPO, {"beta": 0.0, "num_iterations": 2}, {"loss", "before"}),
        (GRPO, {"beta": 0.1, "steps_per_generation": 2}, {"loss", "before", "reference"}),
        (GRPO, {"beta": 0.1, "peft_config": LoraConfig(target_modules=["q_proj"])}, {"loss", "reference"}),
        (RLOO, {"beta": 0.0}, {"loss", "before"}),
        (RLOO, {"beta": 0.1}, {"loss", "before", "reference"}),
    ],
)
def test_forward_tokens_are_those_of_the_passes(tmp_path, kind, settings, passes):
    trainer, task = make_trainer(tmp_path, *kind, **settings)
    seen = Passes(trainer)
    trainer.train()
    costs = trainer.costs
    assert {name for name, tokens in seen.tokens.items() if tokens} == passes
    assert costs.student_backward_tokens == seen.tokens["loss"]
    assert costs.teacher_tokens == seen.tokens["reference"]
    assert costs.student_forward_tokens == seen.tokens["loss"] + seen.tokens["before"]
    assert costs.eval_forward_tokens == 0
    assert (costs.teacher_seconds > 0) == ("reference" in passes)

    trainer.evaluate(task.sample(4, 1).to_dataset())  # the host's evaluation
    assert trainer.costs.net_forward_tokens == costs.net_forward_tokens
    evaluated = sum(seen.tokens.values()) - costs.net_forward_tokens
    assert trainer.ledger.snapshot()["cost/eval_forward_tokens"] == evaluated > 0


TOOL = [5, 6, 7]


def with_tool(trainer):
    """Let every answer of a trainer be followed by a tool's output and a second answer of at most
    two tokens; return the lists of numbers of tokens that were sampled.
    """
    sampled, turn = [], trainer._generate_single_turn

    def single_turn(*args, **kwargs):
        output = turn(*args, **kwargs)
        sampled.extend(map(len, output[0] if isinstance(output, tuple) else output))
        return output

    def tool_loop(prompts, prompt_ids, completion_ids, completions, *rest):
        begun = [prompt + answer + TOOL for prompt, answer in zip(prompt_ids, completion_ids, strict=True)]
        more = single_turn(begun, None, {}, *([1] if isinstance(trainer, TaskGRPOTrainer) else []))
        more = more[0] if isinstance(more, tuple) else more
        mask = [
            [1] * len(answer) + [0] * len(TOOL) + [1] * len(second[:2])
            for answer, second in zip(completion_ids, more, strict=True)
        ]
        whole = [answer + TOOL + second[:2] for answer, second in zip(completion_ids, more, strict=True)]
        logprobs = rest[:-2]
        return mask, completions, whole, *logprobs, 1, 0, [[] for _ in whole]

    trainer.tools, trainer._tool_call_loop, trainer._generate_single_turn = [{"name": "tool"}], tool_loop, single_turn
    return sampled


@pytest.mark.slow
def test_tool_output_is_not_sampled(tmp_path):
    trainer, _ = make_trainer(tmp_path / "rl", *GRPO, beta=0.0, mask_truncated_completions=True)
    sampled = with_tool(trainer)
    trainer.train()
    assert trainer.costs.rollout_generated_tokens == sum(sampled) > 0

    trainer = make_opd_trainer(tmp_path / "opd", max_steps=1, health_tokens=0, eval_strategy="no")
    sampled = with_tool(trainer)
    trainer.train()
    assert trainer.costs.rollout_generated_tokens == sum(sampled) > 0


@pytest.mark.slow
def test_a_rollout_function_samples_what_its_mask_says(tmp_path):
    def rollouts(prompts, trainer):
        answers = [[5, 6, 7, 8, 2] for _ in prompts]
        logprobs = [[0.0] * 5 for _ in prompts]
        mask = [[1, 0, 0, 1, 1] for _ in prompts]
        ids = [[1, 9] for _ in prompts]
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": logprobs, "env_mask": mask}

    trainer, _ = make_trainer(tmp_path, *GRPO, beta=0.0, rollout_func=rollouts)
    trainer.train()
    assert trainer.costs.rollout_generated_tokens == 2 * 8 * 3
    assert trainer.costs.update_forward_tokens == 2 * 8 * 7
