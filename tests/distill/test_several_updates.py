"""Several optimizer steps per batch of rollouts: what is sampled, charged, refused and resumed."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_run import make_trainer
from transformers import TrainerCallback

from effopd import EffOPDConfig, OPDConfig
from effopd.distill.scoring import check_rollouts
from effopd.errors import ConfigError

SETTINGS = {
    "updates_per_rollouts": 2, "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    "eval_strategy": "no", "save_steps": 1, "save_total_limit": None,
}  # fmt: skip


class Steps(TrainerCallback):
    def __init__(self, trainer):
        self.trainer, self.prompts, self.weights, self.rollouts = trainer, [], [], []
        turn = trainer.around_turn

        def sampled(generate, prompts, *, multimodal):
            self.prompts.append((trainer.state.global_step, prompts))
            return turn(generate, prompts, multimodal=multimodal)

        trainer.around_turn = sampled
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(torch.cat([each.detach().flatten().clone() for each in model.parameters()]))
        self.rollouts.append(self.trainer.ledger.snapshot()["cost/rollout_generated_tokens"])


@pytest.mark.slow
def test_two_steps_share_rollouts_and_resume_between_them(tmp_path):
    trainer = make_trainer(tmp_path / "a", **SETTINGS)
    whole = Steps(trainer)
    trainer.train()
    assert [step for step, _ in whole.prompts] == [0, 2]  # rollouts of steps 1 and 3
    assert all(len(prompts) == 8 for _, prompts in whole.prompts)
    assert whole.prompts[0][1] != whole.prompts[1][1]
    assert whole.rollouts[0] == whole.rollouts[1] < whole.rollouts[2] == whole.rollouts[3]  # charged once
    assert not torch.equal(whole.weights[0], whole.weights[1])

    again = make_trainer(tmp_path / "b", **SETTINGS)
    resumed = Steps(again)
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoints/step-000003"))
    assert resumed.prompts == []
    assert torch.equal(resumed.weights[-1], whole.weights[-1])


def test_refused():
    args = OPDConfig(output_dir="unused", updates_per_rollouts=2, use_cpu=True, report_to="none")
    with pytest.raises(ConfigError, match=r"updates_per_rollouts=2 .*teacher_kl"):
        check_rollouts(args, EffOPDConfig("line_search").score_rollouts)
    with pytest.raises(ConfigError, match="updates_per_rollouts=2: loss_type='sampled'"):
        OPDConfig(output_dir="unused", updates_per_rollouts=2, loss_type="sampled", use_cpu=True, report_to="none")
