"""CLPD: stages and their rows, and runs whose teacher, anchor and prompts change by stage."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny_models import make_model, make_tokenizer
from helpers.tiny_run import make_trainer
from helpers.traces import with_rejecting_search
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from effopd import EffOPDConfig, OPDConfig
from effopd.commands.main import main
from effopd.common.files import read_rows
from effopd.distill.curriculum import cut, row_difficulty, stage_batches, stage_of
from effopd.distill.curriculum_mixin import CURRICULUM_FILE, check_stages
from effopd.distill.horizon import look_aheads
from effopd.errors import CheckpointError, ConfigError, TaskError
from effopd.extrapolate.effopd import EffOPD

RUN = {"max_steps": 6, "save_steps": 2, "eval_steps": 3, "eval_greedy": False}


def flat(rows):
    return [row for part in rows for row in part]


# -- stages ----------------------------------------------------------------------------------------


def test_stages_share_steps_and_rows():
    assert [stage_of(step, 10, 4) for step in range(10)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert [stage_of(step, 8, 2, 3) for step in range(8)] == [0] * 6 + [1] * 2  # a stage starts with new rollouts
    difficulty = [float(7 * row % 11) for row in range(11)]
    easy, hard = (cut(difficulty, 3, order, 0) for order in ("easy_first", "hard_first"))
    assert [len(rows) for rows in easy] == [3, 4, 4] and sorted(flat(easy)) == list(range(11))
    assert max(difficulty[row] for row in easy[0]) < min(difficulty[row] for row in easy[1] + easy[2])
    assert flat(hard) == flat(easy)[::-1]
    shuffled = cut(difficulty, 3, "shuffled", 0)
    assert sorted(flat(shuffled)) == list(range(11)) and shuffled not in (easy, hard)
    assert shuffled == cut(difficulty, 3, "shuffled", 0) != cut(difficulty, 3, "shuffled", 1)


@pytest.mark.parametrize("seed", [None, 5])
def test_one_stage_has_the_rows_of_the_host(seed):
    host = RepeatSampler(list(range(11)), 1, batch_size=3, shuffle=seed is not None, seed=seed)
    wanted = []
    for epoch in range(3):
        if seed is not None:
            host.generator.manual_seed(seed + epoch)
        wanted += list(host)
    assert stage_batches(cut([0.0] * 11, 1, "easy_first", 0), 3, 9, 9, seed) == wanted


def test_a_stage_sees_its_rows_only_and_repeats_them():
    difficulty = list(range(10))
    stages = cut(difficulty, 2, "easy_first", 0)
    rows = stage_batches(stages, 2, 6, 6, 0)
    assert set(rows[:6]) == {0, 1, 2, 3, 4} or set(rows[:4]) < {0, 1, 2, 3, 4}
    assert all(row < 5 for row in rows[:6]) and all(row >= 5 for row in rows[6:])
    assert len(set(rows[:4])) == 4  # a pass is without replacement
    assert stage_batches(stages, 2, 6, 3, None) == [0, 1, 2, 3, 0, 1]  # sorted, and the incomplete batch dropped
    assert stage_batches(stages, 2, 6, 4, 0) == rows[:8]


def test_difficulty_of_a_row():
    row = {"id": "7", "prompt": [{"role": "user", "content": "abc"}], "answer": "42", "metadata": '{"level": "3"}'}
    assert row_difficulty("prompt_length", row) == 3 and row_difficulty("prompt_length", {"prompt": "ab"}) == 2
    assert row_difficulty("answer_length", row) == 2 and row_difficulty("nll", row) == 0
    assert row_difficulty("column:level", row) == 3
    for metadata in ({}, "from the web", "7", ["x"], None):  # a column of that name can hold anything
        assert row_difficulty("column:level", {**row, "level": 5, "metadata": metadata}) == 5
    for measure, bad in (
        ("answer_length", {"answer": None}), ("nll", {"answer": ""}), ("column:hard", {}),
        ("column:level", {"level": True}), ("column:level", {"level": float("nan")}), ("column:level", {"level": "x"}),
    ):  # fmt: skip
        with pytest.raises(TaskError, match="curriculum="):
            row_difficulty(measure, row | bad)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"curriculum": "hard"}, "expected none, prompt_length"),
        ({"curriculum": "column:"}, "column:NAME"),
        ({"curriculum_stages": 2}, "read only with a curriculum"),
        ({"curriculum_teachers": ["a"]}, "read only with a curriculum"),
        ({"curriculum_order": "hard_first"}, "read only with a curriculum"),
        ({"curriculum": "nll", "curriculum_order": "up"}, "curriculum_order='up'"),
        ({"curriculum": "nll", "curriculum_stages": 0}, "curriculum_stages"),
        ({"curriculum": "nll", "curriculum_stages": 3, "curriculum_teachers": ["a", "b"]}, "names 2 teachers"),
        ({"curriculum": "nll", "rollouts": "x"}, "has no effect with --rollouts"),
    ],
)
def test_bad_settings(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        OPDConfig(output_dir=str(tmp_path), use_cpu=True, **flags)


def test_every_stage_has_rows_and_steps(tmp_path):
    args = {"output_dir": str(tmp_path), "use_cpu": True, "curriculum": "prompt_length", "curriculum_stages": 4}
    rows = [{"prompt": "x" * length} for length in range(20)]
    check_stages(OPDConfig(per_device_train_batch_size=5, max_steps=4, **args), rows)
    with pytest.raises(ConfigError, match="stages of 5, but a step takes 6"):
        check_stages(OPDConfig(per_device_train_batch_size=6, max_steps=4, **args), rows)
    with pytest.raises(ConfigError, match=r"has 3 step\(s\)"):
        check_stages(OPDConfig(per_device_train_batch_size=5, max_steps=3, **args), rows)
    shared = {"updates_per_rollouts": 2}
    with pytest.raises(ConfigError, match="2 per batch of rollouts"):
        check_stages(OPDConfig(per_device_train_batch_size=5, max_steps=6, **shared, **args), rows)
    assert OPDConfig(**args | {"curriculum_stages": None}).stages == 3
    assert OPDConfig(**args | {"curriculum_stages": None}, curriculum_teachers=["a", "b"]).stages == 2


def test_a_schedule_restarts_with_its_stage():
    model = make_model(0)
    config = EffOPDConfig(parameters="all", args={"scales": [2.0]}, schedule="powers_of_two")

    def searches(look, steps):
        found = []
        for step in steps:
            with torch.no_grad():
                model.lm_head.weight += 1e-3
            due = look.due(step)
            assert due == (look.step(step) is not None)
            if due:
                found.append(step)
        return found

    scorer = lambda model: 0.0  # noqa: E731
    look = EffOPD(model, scorer, config)
    assert searches(look, range(1, 7)) == [1, 2, 4]
    look.restart(6)
    assert look.anchor_step == 6 and searches(look, range(7, 9)) == [7, 8]
    again = EffOPD(model, scorer, config)
    again.load_state_dict(look.state_dict())
    assert searches(again, range(9, 15)) == [10, 14]


# -- runs ------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Notes teacher, anchor and prompts of every step; interrupts the run after step `stop`."""

    def __init__(self, trainer, stop=0):
        self.trainer, self.stop, self.seen = trainer, stop, {}

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        anchors = [look.anchor_step for look in look_aheads(trainer)]
        parameter = next(trainer.accelerator.unwrap_model(trainer.teacher_model).parameters())
        self.seen[state.global_step] = (parameter.sum().item(), *anchors)
        if state.global_step == self.stop:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    for seed in (1, 2):
        make_model(seed).save_pretrained(root / str(seed))
        make_tokenizer().save_pretrained(root / str(seed))
    return [str(root / "1"), str(root / "2")]


def watched(root, settings, stop=0, search=True):
    trainer = make_trainer(root, **RUN, **settings)
    watch = Watch(trainer, stop)
    if search:
        with_rejecting_search(trainer)
    trainer.add_callback(watch)
    return trainer, watch


@pytest.fixture(scope="module")
def runs(tmp_path_factory, teachers):
    """Two stages with a teacher each, evaluated against the second; the same with rejected
    searches, interrupted in the second stage and resumed.
    """
    root = tmp_path_factory.mktemp("curriculum")
    settings = {"curriculum": "nll", "curriculum_teachers": teachers, "teacher": teachers[1]}
    whole, seen = watched(root / "whole", settings, search=False)
    whole.train()
    part, before = watched(root / "part", settings, stop=5)
    with pytest.raises(KeyboardInterrupt):
        part.train()
    resumed, after = watched(root / "part", settings)
    resumed.train(resume_from_checkpoint=str(root / "part" / "checkpoints" / "step-000004"))
    return root, whole, resumed, (seen.seen, before.seen, after.seen)


@pytest.mark.slow
def test_rejected_jumps_and_an_interruption_leave_no_trace(runs):
    root, whole, resumed, _ = runs
    end = dict(whole.model.named_parameters())
    assert all(torch.equal(p, end[name]) for name, p in resumed.model.named_parameters())
    searches = list(read_rows(root / "part" / "searches.jsonl"))
    assert [(row["step"], row["anchor_step"]) for row in searches] == [(1, 0), (2, 1), (4, 3), (5, 4)]
    assert not any(row["accepted_scale"] for row in searches)
    rows = [list(read_rows(root / name / "metrics.jsonl")) for name in ("whole", "part")]
    for name in ("curriculum/stage", "loss", "entropy"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]


@pytest.mark.slow
def test_teacher_and_evaluations_of_every_stage(runs):
    root, whole, _, seen = runs
    sums = [next(make_model(seed).parameters()).sum().item() for seed in (1, 2)]
    for steps in seen:
        assert all(each[0] == sums[step > 3] for step, each in steps.items())
    assert [row["curriculum/stage"] for row in read_rows(root / "whole" / "metrics.jsonl")] == [1] * 3 + [2] * 3
    assert len(whole.accelerator._models) <= 2  # no teacher of an earlier stage is kept
    one, other = (list(read_rows(root / name / "evals.jsonl")) for name in ("whole", "part"))
    assert [row["eval_kl"] for row in one] == [row["eval_kl"] for row in other] and len(one) == 2


@pytest.mark.slow
def test_every_stage_sees_its_prompts_only(runs):
    _, whole, resumed, _ = runs
    assert whole.difficulty == resumed.difficulty and len(set(whole.difficulty)) > 32
    stages = cut(whole.difficulty, 2, "easy_first", whole.args.seed)
    rows = whole.rows_of_epoch(0, 8, whole.args.seed)
    assert set(rows[:24]) <= set(stages[0]) and set(rows[24:48]) <= set(stages[1])


@pytest.mark.slow
def test_difficulties_in_a_checkpoint(runs, tmp_path):
    root, whole, _, _ = runs
    saved = json.loads((root / "whole" / "checkpoints" / "step-000006" / CURRICULUM_FILE).read_text())
    assert saved["difficulty"] == whole.difficulty
    (callback,) = (each for each in whole.callback_handler.callbacks if type(each).__name__ == "CurriculumCallback")
    with pytest.raises(CheckpointError, match="written without --curriculum nll"):
        callback.check_resume(tmp_path)
    (tmp_path / CURRICULUM_FILE).write_text('{"difficulty": [1, 2]}')
    with pytest.raises(CheckpointError, match="difficulties of 2 rows"):
        callback.check_resume(tmp_path)


@pytest.mark.slow
def test_nll_is_that_of_the_answer(runs):
    _, whole, _, _ = runs
    model, tokenizer, row = make_model(0), make_tokenizer(), whole.train_dataset[5]
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logp = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    wanted = -logp.gather(1, torch.tensor(answer)[:, None]).mean()
    torch.testing.assert_close(torch.tensor(whole.difficulty[5]), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_pass_over_all_rows_is_charged_once(runs):
    _, whole, resumed, _ = runs
    tokens = [trainer.ledger.forward_tokens["other"] for trainer in (whole, resumed)]
    assert tokens[0] == tokens[1] > 8 * len(whole.train_dataset)
    assert whole.ledger.seconds["other"] > 0


@pytest.mark.slow
def test_one_stage_is_plain_opd(tmp_path):
    flags = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no"}
    plain = make_trainer(tmp_path / "plain", **flags)
    plain.train()
    staged = make_trainer(tmp_path / "staged", **flags, curriculum="prompt_length", curriculum_stages=1)
    staged.train()
    end = dict(plain.model.named_parameters())
    assert all(torch.equal(p, end[name]) for name, p in staged.model.named_parameters())


def test_a_dry_run_shows_the_stages_and_refuses_what_a_run_would(tmp_path, capsys):
    command = [
        "train", "--model_name_or_path", "testbed:student", "--teacher_model_name_or_path", "testbed:teacher",
        "--task", "testbed:chain_sum", "--train_size", "64", "--eval_size", "8", "--per_device_train_batch_size", "8",
        "--max_completion_length", "24", "--max_steps", "8", "--use_cpu", "--output_dir", str(tmp_path), "--dry_run",
    ]  # fmt: skip
    staged = [*command, "--curriculum_teachers", "testbed:student", "testbed:teacher", "--curriculum"]
    assert main([*staged, "prompt_length"]) == 0
    assert "2 stages by prompt_length, easy first; teachers: " in " ".join(capsys.readouterr().out.split())
    for flags, message in (
        (["column:level"], "needs a finite number in column 'level'"),
        (["prompt_length", "--per_device_train_batch_size", "48"], "stages of 32, but a step takes 48"),
        (["prompt_length", "--max_steps", "1"], "the run has 1 step(s)"),
        (["prompt_length", "--rollout_horizon", "prune"], "prune_start_length=2048"),
    ):
        assert main([*staged, *flags]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
