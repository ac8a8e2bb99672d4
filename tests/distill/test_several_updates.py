"""Several optimizer steps per batch of rollouts: what is sampled, charged, refused and resumed."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_run import make_trainer
from transformers import TrainerCallback

from effopd import EffOPDCallback, EffOPDConfig, OPDConfig
from effopd.common.files import read_rows
from effopd.errors import ConfigError

SETTINGS = {
    "updates_per_rollouts": 2, "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    "eval_strategy": "no", "save_steps": 1, "save_total_limit": None,
}  # fmt: skip


class Steps(TrainerCallback):
    def __init__(self, trainer):
        self.trainer, self.prompts, self.weights, self.rollouts = trainer, [], [], []
        self.teacher: list[int] = []
        turn = trainer.around_turn

        def sampled(generate, prompts, *, multimodal):
            self.prompts.append((trainer.state.global_step, prompts))
            return turn(generate, prompts, multimodal=multimodal)

        trainer.around_turn = sampled
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(torch.cat([each.detach().flatten().clone() for each in model.parameters()]))
        costs = self.trainer.ledger.snapshot()
        self.rollouts.append(costs["cost/rollout_generated_tokens"])
        self.teacher.append(costs["cost/teacher_forward_tokens"])


@pytest.mark.slow
def test_two_steps_share_rollouts_and_resume_between_them(tmp_path):
    trainer = make_trainer(tmp_path / "a", **SETTINGS)
    whole = Steps(trainer)
    trainer.train()
    assert [step for step, _ in whole.prompts] == [0, 2]  # rollouts of steps 1 and 3
    assert all(len(prompts) == 8 for _, prompts in whole.prompts)
    assert whole.prompts[0][1] != whole.prompts[1][1]
    assert whole.rollouts[0] == whole.rollouts[1] < whole.rollouts[2] == whole.rollouts[3]  # charged once
    assert whole.teacher[0] == whole.teacher[1] < whole.teacher[2] == whole.teacher[3]  # asked once
    assert not torch.equal(whole.weights[0], whole.weights[1])

    again = make_trainer(tmp_path / "b", **SETTINGS)
    resumed = Steps(again)
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoints/step-000003"))
    assert resumed.prompts == []
    assert torch.equal(resumed.weights[-1], whole.weights[-1])


@pytest.mark.slow
def test_a_look_ahead_searches_and_steers_on_new_rollouts_only(tmp_path):
    settings = SETTINGS | {"max_steps": 6}
    every_step = EffOPDConfig("newton_search", schedule="every_step")

    def train(folder, **resume):
        trainer = make_trainer(tmp_path / folder, effopd=every_step, **settings)
        steps = Steps(trainer)
        look = next(each for each in trainer.callback_handler.callbacks if isinstance(each, EffOPDCallback))
        factors: list[float] = []
        steps.on_pre_optimizer_step = lambda *_, **__: factors.append(look.look_ahead.learning_rate_factor)
        trainer.train(**resume)
        assert look.look_ahead._optimizer.rate._unseen() in (0, 2)  # two steps share rollouts
        return steps, factors, read_rows(tmp_path / folder / "searches.jsonl")

    whole, factors, searches = train("a")
    assert [row["step"] for row in searches] == [3, 5]  # the first steps of a batch of rollouts
    assert whole.teacher[1] < whole.teacher[2] == whole.teacher[3]  # asked once, for search and losses
    assert factors[3] == factors[4]  # step 4 trained on the rollouts of step 3, so it steered nothing
    for checkpoint in ("step-000002", "step-000003"):
        resumed, _, _ = train(checkpoint, resume_from_checkpoint=str(tmp_path / "a/checkpoints" / checkpoint))
        assert torch.equal(resumed.weights[-1], whole.weights[-1])


def test_refused():
    with pytest.raises(ConfigError, match="updates_per_rollouts=2: loss_type='sampled'"):
        OPDConfig(output_dir="unused", updates_per_rollouts=2, loss_type="sampled", use_cpu=True, report_to="none")
