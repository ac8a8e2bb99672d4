"""dGRPO: the exact KL to the teacher beside TRL's GRPO loss, its averages and its weight."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer
from transformers import TrainerCallback

from effopd.commands.rl import parse_rl
from effopd.common.files import read_rows
from effopd.distill.dgrpo import TaskDGRPOTrainer, averaged, teacher_weight
from effopd.distill.rl_config import PRESETS, TaskDGRPOConfig
from effopd.errors import CompatibilityError, ConfigError
from effopd.launch.rl import build_rl_trainer

SETTINGS = {
    "per_device_train_batch_size": 8, "num_generations": 4, "beta": 0.5, "max_completion_length": 5,
    "learning_rate": 2e-3, "report_to": "none", "activation_checkpointing": False, "disable_tqdm": True,
    "use_cpu": True, "bf16": False, "logging_steps": 1, "max_steps": 3, "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2, "loss_type": "grpo",
}  # fmt: skip


def make_trainer(root, teacher=None, **settings):
    args = TaskDGRPOConfig(output_dir=str(root), **(SETTINGS | settings))
    teacher = make_model(1) if teacher is None else teacher
    return TaskDGRPOTrainer(
        make_model(0), args, make_task(32), processing_class=make_tokenizer(), teacher_model=teacher
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("run"), loss_type="dapo")


def batch():
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    ids = torch.randint(4, 40, (3, 7), generator=g)
    return {
        "prompt_ids": ids[:, :3], "completion_ids": ids[:, 3:], "completion_mask": mask,
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]]), "advantages": torch.zeros(3),
        "num_items_in_batch": torch.tensor(23.0),
    }  # fmt: skip


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_equal_rewards_leave_the_exact_kl_averaged_like_the_hosts_loss(trainer, kind):
    trainer.model.train()
    trainer.args.loss_type = trainer.loss_type = kind
    trainer.current_gradient_accumulation_steps = 2
    inputs = batch()
    loss = trainer._compute_loss(trainer.model, inputs)
    made = gradients(trainer, loss)
    mask, values = inputs["completion_mask"], []
    for model in (trainer.model, trainer.teacher_model):
        rows = []
        for row in range(3):  # one row at a time, without padding
            use = inputs["prompt_mask"][row].bool()
            ids = torch.cat([inputs["prompt_ids"][row][use], inputs["completion_ids"][row]])[None]
            rows.append(model(ids).logits[0, -5:-1].log_softmax(-1))
        values.append(torch.stack(rows))
    kl = (values[0].exp() * (values[0] - values[1].detach())).sum(-1)
    divisors = {
        "grpo": (mask.sum(1, keepdim=True) * 3 * 2), "bnpo": mask.sum() * 2, "dr_grpo": torch.tensor(3 * 5 * 2),
        "dapo": torch.tensor(23.0) * 2 / trainer.args.steps_per_generation,
    }  # fmt: skip
    wanted = 0.5 * (kl * mask / divisors[kind]).sum()
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)
    for name, value in gradients(trainer, wanted).items():
        torch.testing.assert_close(made[name], value, rtol=1e-3, atol=1e-5)
    # the host's own average: advantage −1 and ratio 1 give 1 at every token
    inputs["advantages"] = -torch.ones(3)
    host = trainer._compute_loss(trainer.model, inputs) - loss
    ones = averaged(
        kind, torch.ones(3, 4), mask, longest=5, parts=2, items=torch.tensor(46.0) / trainer.args.steps_per_generation
    )
    torch.testing.assert_close(host, ones)


@pytest.mark.slow
def test_a_run_comes_closer_to_the_teacher_and_resumes_exactly(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    settings = {"max_steps": 4, "beta_decay": 0.1, "beta_min": 0.2}
    whole = make_trainer(tmp_path / "whole", **settings)
    teacher = {name: tensor.clone() for name, tensor in whole.teacher_model.state_dict().items()}
    whole.train()
    rows = list(read_rows(tmp_path / "whole" / "metrics.jsonl"))
    assert rows[-1]["kl"] < rows[0]["kl"] and rows[-1]["cost/teacher_forward_tokens"] > 0
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in whole.teacher_model.state_dict().items())
    assert whole.ref_model is None and whole.args.beta == 0.5
    part = make_trainer(tmp_path / "part", **settings)
    part.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        part.train()
    again = make_trainer(tmp_path / "part", **settings)
    again.train(resume_from_checkpoint=True)
    end = dict(whole.model.named_parameters())
    assert all(torch.equal(p, end[name]) for name, p in again.model.named_parameters())


def test_the_weight_of_the_teacher():
    assert [teacher_weight(k, 0.5) for k in (0, 9)] == [0.5, 0.5]
    kdrl = PRESETS["dgrpo_kdrl_annealed"]
    weights = [teacher_weight(k, kdrl["beta"], kdrl["beta_decay"], kdrl["beta_min"]) for k in (0, 40, 80, 999)]
    assert weights == pytest.approx([5e-3, 3e-3, 1e-3, 1e-3])


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="num_generations"):
        TaskDGRPOConfig(output_dir=str(tmp_path), num_generations=1)
    for bad in ({"beta_min": 0.1}, {"beta_min": 2.0, "beta_decay": 0.1}, {"sync_ref_model": True}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            TaskDGRPOConfig(output_dir=str(tmp_path), num_generations=4, **bad)
    with pytest.raises(CompatibilityError, match="rows"):
        make_trainer(tmp_path, teacher=make_model(1, vocab_size=60))
    bare = ["--algorithm", "dgrpo", "--model_name_or_path", "testbed:student", "--task", "testbed:chain_sum"]
    with pytest.raises(ConfigError, match="--teacher_model_name_or_path is missing"):
        build_rl_trainer(parse_rl([*bare, "--output_dir", str(tmp_path / "run")]))
