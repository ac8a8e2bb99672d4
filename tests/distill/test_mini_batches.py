"""`num_mini_batches`: what each step trains on, is charged, is scored, and how a run resumes."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_run import make_trainer
from transformers import TrainerCallback

from effopd import EffOPDCallback, EffOPDConfig, OPDConfig
from effopd.common.files import read_rows
from effopd.distill.replay import ReplayBuffer
from effopd.distill.scoring import rollouts_per_step, rollouts_per_update, token_batch, wanted_rollouts
from effopd.distill.trl_host.state import split_rollouts
from effopd.errors import ConfigError

#: Two passes over two parts of 2 × 4 rollouts.
SETTINGS = {
    "updates_per_rollouts": 4, "num_mini_batches": 2, "max_steps": 8, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2, "eval_strategy": "no", "save_steps": 1, "save_total_limit": None,
}  # fmt: skip


class Recorder(TrainerCallback):
    """Per step: rows, tokens and number of items of its micro-batches; weights; costs."""

    def __init__(self, trainer):
        self.trainer, self.steps, self.weights, self.costs = trainer, {}, [], []
        loss = trainer.distillation_loss

        def recorded(student, inputs, num_items):
            rows = [tuple(row[mask.bool()].tolist()) for row, mask in zip(
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1), strict=True)]  # fmt: skip
            scored = inputs.get("train_mask", token_batch(inputs).scored_BT)
            self.steps.setdefault(trainer.state.global_step, []).append((rows, int(scored.sum()), int(num_items)))
            return loss(student, inputs, num_items)

        trainer.distillation_loss = recorded
        trainer.add_callback(self)

    def rows(self, step):
        return [row for micro_batch in self.steps[step] for row in micro_batch[0]]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(torch.cat([each.detach().flatten().clone() for each in model.parameters()]))
        self.costs.append(self.trainer.ledger.snapshot())

    def charged(self, name):
        return [row[f"cost/{name}"] for row in self.costs]


def tokens(run):
    """All token counts at the end: of every kind, as prices and comparisons read them."""
    return {name: value for name, value in run.costs[-1].items() if name.endswith("_tokens")}


def train(folder, effopd=None, resume=None, **more):
    trainer = make_trainer(folder, **SETTINGS | more, **({"effopd": effopd} if effopd else {}))
    recorder = Recorder(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return recorder


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"token_mask": "first_special"}], ids=["all tokens", "masked"])
def test_every_step_trains_on_one_part_and_every_pass_on_the_whole_batch(tmp_path, more):
    run = train(tmp_path, save_strategy="no", **more)
    for cycle in (0, 4):
        parts = [sorted(run.rows(cycle + step)) for step in range(4)]
        assert [len(part) for part in parts] == [4] * 4
        assert parts[0] == parts[2] != parts[1] == parts[3]  # the second pass
    assert sorted(run.rows(0) + run.rows(1)) != sorted(run.rows(4) + run.rows(5))
    for micro_batches in run.steps.values():  # the loss is the mean over the tokens of the part
        assert {items for _, _, items in micro_batches} == {sum(tokens for _, tokens, _ in micro_batches)}
    sampled, teacher, update = map(
        run.charged, ("rollout_generated_tokens", "teacher_forward_tokens", "update_forward_tokens")
    )
    assert len(set(sampled[:4])) == len(set(sampled[4:])) == 1 and sampled[4] > sampled[3]
    assert teacher[0] < teacher[1] == teacher[2] == teacher[3] < teacher[4]  # asked once per part
    assert teacher[3] == update[1] and update[3] == 2 * update[1]  # two parts are one pass


@pytest.mark.slow
def test_answers_are_counted_per_part(tmp_path):
    run = train(tmp_path, save_strategy="no", max_steps=4, loss_weighting="answer")
    assert {items for each in run.steps.values() for _, _, items in each} == {4}


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"replay_batches": 2}], ids=["no replay", "replay"])
def test_a_run_resumes_inside_a_pass(tmp_path, more):
    look_ahead = EffOPDConfig("newton_search", schedule="every_step")
    whole = train(tmp_path / "a", look_ahead, **more)
    for step in (1, 2, 3, 5):
        checkpoint = str(tmp_path / f"a/checkpoints/step-{step:06}")
        resumed = train(tmp_path / f"b{step}", look_ahead, checkpoint, **more)
        assert torch.equal(resumed.weights[-1], whole.weights[-1])
        assert tokens(resumed) == tokens(whole)


@pytest.mark.slow
def test_a_search_is_charged_for_predictions_that_were_released_before_it(tmp_path):
    """The first step has rate 0, so the search at 2 has no candidates; that at 4 finds the rate."""
    look_ahead = EffOPDConfig("newton_search", schedule="powers_of_two")
    warm = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "max_steps": 4}
    whole = train(tmp_path / "a", look_ahead, **warm)
    assert [row["step"] for row in read_rows(tmp_path / "a/searches.jsonl")] == [2, 4]
    first = whole.charged("teacher_forward_tokens")
    assert first[2] == whole.charged("update_forward_tokens")[1]  # both parts once, for search and losses
    released = sum(len(row) for row in whole.rows(2))  # the last loss on the first part was that of step 3
    assert first[3] == first[2] + released
    for step in (1, 2, 3):
        resumed = train(tmp_path / f"b{step}", look_ahead, str(tmp_path / f"a/checkpoints/step-{step:06}"), **warm)
        assert torch.equal(resumed.weights[-1], whole.weights[-1])
        assert tokens(resumed) == tokens(whole)


@pytest.mark.slow
def test_searches_and_slopes_read_parts_that_no_step_has_trained_on(tmp_path):
    settings = {"save_strategy": "no", "num_mini_batches": 4, "updates_per_rollouts": 8, "max_steps": 13}
    look_ahead = EffOPDConfig("newton_search", schedule="powers_of_two", score_rollouts=4)  # due at 2, 4 and 8
    trainer = make_trainer(tmp_path, **SETTINGS | settings, effopd=look_ahead)
    run = Recorder(trainer)
    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, EffOPDCallback))
    take, scored, factors = callback.scorer.take, {}, []

    def taken(batches, **flags):
        batches = list(batches)
        take(batches, **flags)
        scored[trainer.state.global_step] = {
            tuple(row[mask.bool()].tolist()) for batch in callback.scorer._batches
            for row, mask in zip(batch.ids_BL, batch.mask_BL, strict=True)
        }  # fmt: skip

    callback.scorer.take = taken
    run.on_pre_optimizer_step = lambda *_, **__: factors.append(callback.look_ahead.learning_rate_factor)
    trainer.train()
    searches = list(read_rows(tmp_path / "searches.jsonl"))
    assert [row["step"] for row in searches] == [2, 4, 9]  # 8 is in the second pass and waits for new rollouts
    trained = set()
    for step in range(9):
        if step + 1 in (2, 4, 9):
            assert scored[step] and not trained & scored[step]
        trained |= set(run.rows(step))
    assert len(set(factors[4:9])) == 1  # the second pass steers nothing
    assert len(set(factors[9:])) > 1  # the first pass does


@pytest.mark.slow
def test_the_first_search_scores_all_parts_that_are_left(tmp_path):
    settings = {"save_strategy": "no", "num_mini_batches": 4, "updates_per_rollouts": 8, "max_steps": 4}
    every_step = EffOPDConfig("newton_search", schedule="every_step")
    make_trainer(tmp_path, **SETTINGS | settings | {"per_device_train_batch_size": 16}, effopd=every_step).train()
    searches = list(read_rows(tmp_path / "searches.jsonl"))
    assert [row["step"] for row in searches] == [2, 3, 4]
    # 3 parts of 8 rollouts, then half of a part
    assert [len(row["trials"][0]["per_example"]) for row in searches] == [24, 4, 4]


def test_images_and_rows_stay_together():
    rollouts = {
        "completion_ids": torch.arange(8).view(4, 2), "pixel_values": torch.arange(6).view(6, 1),
        "image_grid_thw": torch.ones(6, 3, dtype=torch.long), "num_images": [1, 2, 0, 3],
        "num_items_in_batch": torch.tensor(8),
    }  # fmt: skip
    first, second = split_rollouts(rollouts, 2)
    assert first["completion_ids"].tolist() == [[0, 1], [2, 3]]
    assert first["pixel_values"].flatten().tolist() == [0, 1, 2] and first["num_images"] == [1, 2]
    assert second["pixel_values"].flatten().tolist() == [3, 4, 5] and second["num_images"] == [0, 3]


def test_replay_draws_every_part():
    buffer = ReplayBuffer(2, seed=5, device="cpu")
    for batch in range(2):
        buffer.add([{"completion_ids": torch.tensor([10 * batch + place])} for place in range(6)])
    for step in range(60):  # three parts of two micro-batches each
        (_, first), (_, second) = (buffer.draw(step, index, size=2) for index in (0, 1))
        assert int(second["completion_ids"]) == int(first["completion_ids"]) + 1
    drawn = {int(buffer.draw(step, 0, size=2)[1]["completion_ids"]) for step in range(60)}
    assert drawn == {0, 2, 4, 10, 12, 14}


def config(**settings):
    return OPDConfig(output_dir="unused", use_cpu=True, report_to="none", **settings)


def test_a_search_scores_a_share_of_what_a_step_trains_on():
    args = config(per_device_train_batch_size=256, updates_per_rollouts=8, num_mini_batches=8)
    assert (rollouts_per_step(args), rollouts_per_update(args), wanted_rollouts(args, 0.25)) == (256, 32, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_mini_batches": 4}, "num_mini_batches=4 with updates_per_rollouts=1: .*for example 4"),
        ({"num_mini_batches": 4, "updates_per_rollouts": 6}, "updates_per_rollouts to a multiple of 4, for example 8"),
        (
            {"num_mini_batches": 3, "updates_per_rollouts": 3, "per_device_train_batch_size": 8},
            "--per_device_train_batch_size to a multiple of 3, for example 9",
        ),
        (
            {"num_mini_batches": 2, "updates_per_rollouts": 2, "rollout_horizon": "topd", "horizon_whole_share": 0.5},
            "num_mini_batches=2 with horizon_whole_share=0.5",
        ),
        (
            {"num_mini_batches": 2, "updates_per_rollouts": 2, "rollout_horizon": "prune"},
            "num_mini_batches=2 with rollout_horizon='prune'",
        ),
        ({"num_mini_batches": 0}, "num_mini_batches"),
        ({"num_mini_batches": 2, "updates_per_rollouts": 2, "loss_type": "sampled"}, "updates_per_rollouts=2: loss"),
    ],
)  # fmt: skip
def test_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)
