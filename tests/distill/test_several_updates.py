"""Several optimizer steps per batch of rollouts: what is sampled, replayed, charged and resumed."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from helpers.tiny_run import make_trainer
from transformers import TrainerCallback

from effopd import EffOPDCallback, EffOPDConfig, OPDConfig, OPDTrainer
from effopd.common.files import read_rows
from effopd.distill.dataset import check_stream
from effopd.distill.divergence import Predictions
from effopd.distill.replay import ReplayBuffer
from effopd.distill.teachers.kept import for_checkpoint, kept_or_made
from effopd.distill.teachers.several import Part
from effopd.errors import ConfigError
from effopd.extrapolate.learning_rate import calibrated_factor
from effopd.extrapolate.newton import WAY_OF_ONE_STEP
from effopd.extrapolate.saved_state import STATE_FILE

SETTINGS = {
    "updates_per_rollouts": 2, "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    "eval_strategy": "no", "save_steps": 1, "save_total_limit": None,
}  # fmt: skip


class Steps(TrainerCallback):
    def __init__(self, trainer):
        self.trainer, self.prompts, self.weights, self.rollouts = trainer, [], [], []
        self.teacher: list[int] = []
        self.costs: list[dict] = []
        turn = trainer.around_turn

        def sampled(generate, prompts, *, multimodal):
            self.prompts.append((trainer.state.global_step, prompts))
            return turn(generate, prompts, multimodal=multimodal)

        trainer.around_turn = sampled
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(torch.cat([each.detach().flatten().clone() for each in model.parameters()]))
        costs = self.trainer.ledger.snapshot()
        self.costs.append(costs)
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
    assert resumed.teacher[-1] == whole.teacher[-1]


@pytest.mark.slow
def test_only_the_search_that_finds_the_rate_scores_rollouts_that_were_trained_on(tmp_path):
    settings = SETTINGS | {"max_steps": 6}
    every_step = EffOPDConfig("newton_search", schedule="every_step")

    def train(folder, **resume):
        trainer = make_trainer(tmp_path / folder, effopd=every_step, **settings)
        steps = Steps(trainer)
        look = next(each for each in trainer.callback_handler.callbacks if isinstance(each, EffOPDCallback))
        factors: list[float] = []
        steps.on_pre_optimizer_step = lambda *_, **__: factors.append(look.look_ahead.learning_rate_factor)
        trainer.train(**resume)
        return steps, factors, list(read_rows(tmp_path / folder / "searches.jsonl"))

    whole, factors, searches = train("a")
    assert [row["step"] for row in searches] == [2, 3, 5]  # 2: the rate; 3, 5: the first steps of a batch of rollouts
    scored = [len(row["trials"][0]["per_example"]) for row in searches]
    assert scored == [8, 4, 4]  # all of the first batch, half of the others
    best, accepted = (searches[0][name] for name in ("best_scale", "accepted_scale"))
    assert searches[0]["learning_rate_factor_total"] == pytest.approx(calibrated_factor(best))
    passing = [t["scale"] for t in searches[0]["trials"] if t["verdict"] == "accepted" and "score" in t]
    assert accepted == WAY_OF_ONE_STEP * passing[-1] > 0
    (state,) = (tmp_path / "a/checkpoints/step-000003").rglob(STATE_FILE)
    assert json.loads(state.read_text())["settled_factor"] == pytest.approx(calibrated_factor(best) / 2**0.5)
    assert whole.teacher[0] == whole.teacher[1]  # the search reads the predictions of the first loss
    assert whole.teacher[1] < whole.teacher[2] == whole.teacher[3]  # asked once, for search and losses
    assert factors[3] == factors[4]  # step 4 trained on the rollouts of step 3, so it steered nothing
    for checkpoint in ("step-000001", "step-000002", "step-000003"):
        resumed, _, _ = train(checkpoint, resume_from_checkpoint=str(tmp_path / "a/checkpoints" / checkpoint))
        assert torch.equal(resumed.weights[-1], whole.weights[-1])


@pytest.mark.slow
def test_a_jump_between_steps_on_the_same_rollouts_keeps_them_and_resumes(tmp_path):
    def train(folder, **resume):
        look_ahead = EffOPDConfig("line_search", schedule="every_step", validation_size=12, gate="not_worse")
        trainer = make_trainer(tmp_path / folder, effopd=look_ahead, **SETTINGS)
        steps = Steps(trainer)
        trainer.train(**resume)
        return steps

    whole = train("a")
    accepted = [row["step"] for row in read_rows(tmp_path / "a/searches.jsonl") if row["accepted_scale"]]
    assert accepted[0] == 1  # in mid-cycle
    assert [step for step, _ in whole.prompts] == [0, 2]
    for checkpoint in ("step-000001", "step-000003"):
        resumed = train(checkpoint, resume_from_checkpoint=str(tmp_path / "a/checkpoints" / checkpoint))
        assert torch.equal(resumed.weights[-1], whole.weights[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "searched"), [("effopd", [3, 5, 9]), ("newton_search", [2, 5, 9]), ("line_search", [3, 5, 9])]
)
def test_a_search_that_is_due_in_mid_cycle_waits_for_new_rollouts(tmp_path, strategy, searched):
    look_ahead = EffOPDConfig(strategy, schedule="powers_of_two", score_rollouts=4)  # due at 2, 4 and 8
    trainer = make_trainer(tmp_path, effopd=look_ahead, **SETTINGS | {"max_steps": 9, "save_strategy": "no"})
    trainer.train()
    assert [row["step"] for row in read_rows(tmp_path / "searches.jsonl")] == searched


def test_refused():
    with pytest.raises(ConfigError, match="updates_per_rollouts=2: loss_type='sampled'"):
        OPDConfig(output_dir="unused", updates_per_rollouts=2, loss_type="sampled", use_cpu=True, report_to="none")


def test_a_stream_is_refused_before_models_are_loaded(tmp_path):
    """Several steps per batch need a sampler that repeats prompts, and a stream has none."""
    args = OPDConfig(output_dir=str(tmp_path), updates_per_rollouts=2, max_steps=2, use_cpu=True, report_to="none")
    stream = Dataset.from_dict({"prompt": ["a"] * 64}).to_iterable_dataset()
    with pytest.raises(ConfigError, match=r"updates_per_rollouts=2 .*got an IterableDataset.*updates_per_rollouts=1"):
        OPDTrainer("no-student", "no-teacher", args, train_dataset=stream)
    check_stream(stream, 1)


REPLAY = SETTINGS | {"max_steps": 8, "replay_batches": 3}


class Trained(TrainerCallback):
    """Completions of the first micro-batch of every step."""

    def __init__(self, trainer):
        self.ids: list[torch.Tensor] = []
        loss, seen = trainer.distillation_loss, set()

        def recorded(student, inputs, num_items):
            if trainer.state.global_step not in seen:
                seen.add(trainer.state.global_step)
                self.ids.append(inputs["completion_ids"].clone())
            return loss(student, inputs, num_items)

        trainer.distillation_loss = recorded


@pytest.mark.slow
def test_replay_trains_the_last_step_of_a_cycle_on_a_batch_of_the_last_three(tmp_path):
    trainer = make_trainer(tmp_path / "a", **REPLAY)
    whole, trained = Steps(trainer), Trained(trainer)
    trainer.train()
    sampled = [trained.ids[step] for step in (0, 2, 4, 6)]  # first steps of the cycles
    ages = [row["replay/age"] for row in trainer.state.log_history if "replay/age" in row]
    assert len(ages) == 4 and ages[0] == 0 and any(ages) and all(age <= min(i, 2) for i, age in enumerate(ages))
    for cycle, age in enumerate(ages):
        assert torch.equal(trained.ids[2 * cycle + 1], sampled[cycle - int(age)])
    # the teacher is asked once per batch, also for those that are drawn later
    assert [whole.teacher[i] - whole.teacher[i - 1] for i in (1, 3, 5, 7)] == [0] * 4

    for checkpoint in ("step-000004", "step-000005"):  # between two cycles and inside one
        again = make_trainer(tmp_path / checkpoint, **REPLAY)
        resumed = Steps(again)
        again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoints" / checkpoint))
        assert torch.equal(resumed.weights[-1], whole.weights[-1])
        assert resumed.teacher[-1] == whole.teacher[-1]  # what the checkpoint lacks is made again without charge


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 12:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"updates_per_rollouts": 3, "replay_batches": 2},
        {"updates_per_rollouts": 4},
        {"updates_per_rollouts": 4, "num_mini_batches": 2, "replay_batches": 3},
    ],
    ids=["replay", "cycle", "replay of parts"],
)
def test_a_killed_and_resumed_run_costs_what_an_uninterrupted_one_costs(tmp_path, settings):
    """Killed at step 12 and resumed from step 10, in mid-cycle."""

    def train(folder, *callbacks, **resume):
        trainer = make_trainer(tmp_path / folder, **SETTINGS | settings | {"max_steps": 14, "save_steps": 5})
        forward, passes = trainer._hidden_states, []

        def hidden_states(*args, **kwargs):
            passes.append(True)
            return forward(*args, **kwargs)

        trainer._hidden_states = hidden_states
        trainer.ledger._clock = lambda: len(passes)  # a second per forward pass of student or teacher
        steps = Steps(trainer)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train(**resume)
        return steps

    whole = train("a")
    with pytest.raises(KeyboardInterrupt):
        train("b", Kill())
    resumed = train("b", resume_from_checkpoint=True)
    assert len(resumed.weights) == 4 and torch.equal(resumed.weights[-1], whole.weights[-1])
    assert resumed.costs[-1] == whole.costs[-1]  # tokens and seconds of every kind


def test_a_draw_depends_on_seed_and_step_alone_and_reaches_every_batch():
    def buffer(count):
        made = ReplayBuffer(3, seed=5, device="cpu")
        for index in range(count):
            made.add([{"completion_ids": torch.tensor([index])}])
        return made

    first = [buffer(9).draw(step, 0, 1) for step in range(40)]
    assert [age for age, _ in first] == [age for age, _ in (buffer(9).draw(step, 0, 1) for step in range(40))]
    assert {int(micro_batch["completion_ids"]) for _, micro_batch in first} == {6, 7, 8}
    assert all(int(micro_batch["completion_ids"]) == 8 - age for age, micro_batch in first)
    full = buffer(2)
    full.add(full.batches[-1])  # the next micro-step of the same optimizer step
    assert len(full.batches) == 2


def test_predictions_stay_with_a_batch_until_it_leaves_the_buffer():
    made = []

    def make():
        made.append(Part("teacher", None, Predictions(torch.ones(1, 2, 3), None)))
        return made[-1:]

    buffer = ReplayBuffer(2, seed=0, device="cpu")
    batches = [[{"completion_ids": torch.tensor([index])}] for index in range(3)]
    for batch in batches:
        buffer.add(batch)
        for _ in range(3):
            kept_or_made(buffer.batches[-1][0], make)
    assert len(made) == 3
    assert kept_or_made(buffer.batches[0][0], make)[0].teacher.hidden_BTH.equal(torch.ones(1, 2, 3)) and len(made) == 3
    buffer.restore([list(map(for_checkpoint, batch)) for batch in buffer.batches])
    free = []  # they were charged before the checkpoint
    for _ in range(2):
        kept_or_made(buffer.batches[0][0], make, lambda: nullcontext(free.append(True)))
    assert len(made) == 4 and len(free) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replay_batches": 4}, "replay_batches=4 with updates_per_rollouts=1"),
        ({"replay_batches": 1, "updates_per_rollouts": 2}, "replay_batches"),
        (
            {"replay_batches": 4, "updates_per_rollouts": 2, "curriculum": "prompt_length",
             "curriculum_teachers": ["a", "b"]},
            "replay_batches=4 trains on rollouts of earlier stages",
        ),
    ],
)  # fmt: skip
def test_replay_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        OPDConfig(output_dir="unused", use_cpu=True, report_to="none", **settings)
