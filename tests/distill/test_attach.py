"""The callback on its trainer: nothing before training, nothing after it, whatever happens in
between.
"""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from datasets import Dataset, IterableDataset
from distill.test_callback import plain_trl
from helpers.tiny_models import contains, make_model, make_task, make_tokenizer
from helpers.tiny_run import make_trainer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from effopd import EffOPD, EffOPDCallback, EffOPDConfig
from effopd.common.files import read_rows
from effopd.distill.trl_host.events import HostEvents
from effopd.distill.trl_host.state import drop_rollouts
from effopd.errors import CheckpointError, ConfigError, ScorerError, TaskError
from effopd.runs.records import SEARCHES

FAST = {
    "max_steps": 4,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}
PATCHED = ("_prepare_inputs", "_get_learning_rate", "_load_from_checkpoint", "_run_epoch")
LOOK = EffOPDConfig("line_search", parameters="all", gate="not_worse", schedule="every_step")


def left_behind(trainer) -> list[str]:
    """What of a look-ahead is still on a trainer or its optimizer."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    hooks = optimizer._optimizer_step_pre_hooks | optimizer._optimizer_step_post_hooks if optimizer is not None else {}
    ours = [hook for hook in hooks.values() if "learning_rate" in getattr(hook, "__module__", "")]
    return [*(name for name in PATCHED if name in vars(trainer)), *map(str, ours)]


class Slope(nn.Module):
    """Loss Σw: every gradient is 1, so with SGD a step moves each weight by the learning rate."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        return {"loss": self.w.sum()}


class Probe(TrainerCallback):
    """The rate of every step, read off the weights, and something to do after a step."""

    def __init__(self, after=None):
        self.used, self._after = [], after or {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._before = model.w.detach().clone()

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.used.append(float(self._before[0] - model.w.detach()[0]))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self._after:
            self._after[state.global_step]()


class Scorer:
    """Of the five points of every line search (0, 1, 2, 4 and the vertex) it likes s = 2 best: so
    the rate is adapted upwards.
    """

    def __init__(self, raises_at: int | None = None):
        self.calls, self.raises_at = 0, raises_at

    def __call__(self, model) -> float:
        self.calls += 1
        if self.calls == self.raises_at:
            raise RuntimeError("planted")
        return (0.0, 1.0, 2.0, 1.0, 0.5)[(self.calls - 1) % 5]


def slope(tmp_path, probe=None, **more):
    args = TrainingArguments(
        output_dir=str(tmp_path),
        optim="sgd",
        learning_rate=0.01,
        lr_scheduler_type="linear",
        per_device_train_batch_size=1,
        max_grad_norm=0.0,
        **FAST | {"max_steps": 6} | more,
    )
    trainer = Trainer(Slope(), args, train_dataset=Dataset.from_dict({"x": [0.0] * 8}))
    trainer.add_callback(probe or Probe())
    return trainer


def add(trainer, config=LOOK, scorer=None, **more) -> EffOPDCallback:
    callback = EffOPDCallback(trainer, config, scorer=scorer or Scorer(), **more)
    trainer.add_callback(callback)
    return callback


def logged(trainer) -> list[float]:
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


def probe_of(trainer) -> Probe:
    return next(each for each in trainer.callback_handler.callbacks if isinstance(each, Probe))


def check_rates(trainer, adapted: bool) -> None:
    probe, schedule = probe_of(trainer), [0.01 * (1 - step / 6) for step in range(6)]
    count = len(logged(trainer))
    assert logged(trainer) == pytest.approx(probe.used[-count:], rel=1e-9)
    assert (logged(trainer) == pytest.approx(schedule[:count], rel=1e-9)) != adapted


def grpo(tmp_path):
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        learning_rate=1e-3,
        bf16=False,
        activation_checkpointing=False,
        **FAST,
    )
    return GRPOTrainer(
        make_model(0), lambda completions, **_: [float(len(c[0]["content"])) for c in completions], args,
        train_dataset=make_task(32).to_dataset(), processing_class=make_tokenizer(),
    )  # fmt: skip


HOSTS = {
    "OPDTrainer": (
        lambda out: make_trainer(out, **FAST | {"eval_strategy": "no"}),
        EffOPDConfig("line_search", score_rollouts=4),
    ),
    "DistillationTrainer": (lambda out: plain_trl(out, max_steps=4), EffOPDConfig("line_search", score_rollouts=4)),
    "GRPOTrainer": (grpo, EffOPDConfig("effopd", validation_size=4, adapt_learning_rate=True, args={"scales": [2.0]})),
}


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_nothing_is_on_the_host_before_and_after_training(host, tmp_path):
    build, config = HOSTS[host]
    trainer = build(tmp_path)
    callback = EffOPDCallback(trainer, config, task=make_task(32))
    trainer.add_callback(callback)
    assert left_behind(trainer) == []
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(left_behind(trainer))

    trainer.add_callback(Look())
    trainer.train()
    wanted = {"_run_epoch", "_get_learning_rate"} | (
        {"_prepare_inputs"} if config.strategy == "line_search" else set()
    )
    assert all(wanted <= set(names) and len(names) > len(wanted) for names in seen)  # … and the optimizer's hooks
    assert left_behind(trainer) == []
    assert len(list(read_rows(tmp_path / SEARCHES))) >= 2


def test_the_logged_rate_is_the_one_used(tmp_path):
    trainer = slope(tmp_path)
    add(trainer)
    trainer.train()
    check_rates(trainer, adapted=True)
    assert left_behind(trainer) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["remove_callback", "pop_callback"])
def test_a_removed_callback_does_nothing_in_the_next_training(how, tmp_path):
    trainer, scorer = slope(tmp_path), Scorer()
    callback = add(trainer, scorer=scorer)
    trainer.train()
    calls, rows, history = scorer.calls, len(list(read_rows(tmp_path / SEARCHES))), len(callback.look_ahead.history)
    getattr(trainer, how)(callback)
    start = trainer.model.w.detach().clone()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    check_rates(trainer, adapted=False)
    torch.testing.assert_close(start - trainer.model.w, torch.full_like(start, sum(probe_of(trainer).used[-6:])))
    assert (scorer.calls, len(list(read_rows(tmp_path / SEARCHES))), len(callback.look_ahead.history)) == (
        calls,
        rows,
        history,
    )


@pytest.mark.slow
def test_a_replaced_callback_leaves_the_rate_to_the_new_one(tmp_path):
    trainer, scorers = slope(tmp_path), (Scorer(), Scorer())
    old = add(trainer, scorer=scorers[0])
    trainer.train()
    calls = scorers[0].calls
    trainer.remove_callback(old)
    trainer.optimizer = trainer.lr_scheduler = None
    add(trainer, scorer=scorers[1])
    trainer.train()
    check_rates(trainer, adapted=True)
    assert scorers[0].calls == calls and scorers[1].calls == calls  # a fresh start, like the first
    assert left_behind(trainer) == []


@pytest.mark.slow
def test_the_same_callback_trains_twice(tmp_path):
    trainer = slope(tmp_path)
    callback = add(trainer)
    trainer.train()
    first = [search.accepted_scale for search in callback.look_ahead.history]
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert [search.accepted_scale for search in callback.look_ahead.history] == pytest.approx(first)
    check_rates(trainer, adapted=True)
    assert left_behind(trainer) == []


class Planted(RuntimeError):
    pass


def fail():
    raise Planted


@pytest.mark.slow
@pytest.mark.parametrize("where", ["callback", "scorer"])
@pytest.mark.parametrize("then", ["again", "without", "another"])
def test_after_an_exception_nothing_is_left_and_training_starts_anew(where, then, tmp_path):
    trainer = slope(tmp_path, Probe({3: fail} if where == "callback" else {}))
    scorer = Scorer(raises_at=20 if where == "scorer" else None)
    callback = add(trainer, scorer=scorer)
    with pytest.raises(Planted if where == "callback" else ScorerError):
        trainer.train()
    assert left_behind(trainer) == []
    calls = scorer.calls
    probe_of(trainer)._after = {}
    if then != "again":
        trainer.remove_callback(callback)
    if then == "another":
        add(trainer)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    check_rates(trainer, adapted=then != "without")
    assert (scorer.calls > calls) == (then == "again")
    assert left_behind(trainer) == []


def test_a_callback_removed_in_the_middle_stops_at_once(tmp_path):
    trainer, scorer = slope(tmp_path), Scorer()
    callback, calls = add(trainer, scorer=scorer), []

    def remove():
        trainer.remove_callback(callback)
        calls.append(scorer.calls)

    probe_of(trainer)._after = {3: remove}
    trainer.train()
    assert scorer.calls == calls[0]
    probe = probe_of(trainer)
    assert logged(trainer) == pytest.approx(probe.used, rel=1e-9)
    assert probe.used[3:] == pytest.approx([0.01 * (1 - step / 6) for step in range(3, 6)], rel=1e-9)
    assert left_behind(trainer) == []


class RemovesAfterAStep(TrainerCallback):
    def __init__(self, trainer, callback):
        self._trainer, self._callback = trainer, callback

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self._trainer.remove_callback(self._callback)


@pytest.mark.slow
def test_a_callback_that_waits_for_rollouts_is_gone_when_removed(tmp_path):
    """It searches between steps, where the host has no event: so only a patch could still move
    weights.
    """
    runs = {}
    for when in ("never", "before", "after one step"):
        trainer = make_trainer(tmp_path / when, **FAST | {"eval_strategy": "no"})
        if when != "never":
            callback = EffOPDCallback(trainer, EffOPDConfig("line_search", score_rollouts=4))
            trainer.add_callback(callback)
        if when == "before":
            trainer.remove_callback(callback)
        if when == "after one step":
            trainer.add_callback(RemovesAfterAStep(trainer, callback))
        trainer.train()
        runs[when] = [p.detach().clone() for p in trainer.model.parameters()]
        assert left_behind(trainer) == []
        assert not (tmp_path / when / SEARCHES).exists()
        assert trainer.costs.search_forward_tokens == 0
    for when in ("before", "after one step"):
        assert all(torch.equal(a, b) for a, b in zip(runs["never"], runs[when], strict=True))


@pytest.mark.slow
def test_a_removed_callback_moves_nothing_in_a_second_training_on_rollouts(tmp_path):
    """It has a look-ahead of the first training, whose patch used to hand it the rollouts of the
    second.
    """
    trainer = plain_trl(tmp_path, max_steps=3)
    callback = EffOPDCallback(trainer, EffOPDConfig("line_search", score_rollouts=4))
    trainer.add_callback(callback)
    trainer.train()
    searches = len(list(read_rows(tmp_path / SEARCHES)))
    trainer.remove_callback(callback)
    trainer.args.max_steps = 6
    trainer.optimizer = trainer.lr_scheduler = None
    callback.look_ahead.step = lambda step: fail()
    steps = []
    trainer.add_callback(Steps(steps))
    trainer.train()
    assert steps == [1, 2, 3, 4, 5, 6] and searches > 0
    assert len(list(read_rows(tmp_path / SEARCHES))) == searches
    assert left_behind(trainer) == []


class Steps(TrainerCallback):
    def __init__(self, steps: list[int]):
        self._steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        self._steps.append(state.global_step)


@pytest.mark.slow
def test_rollouts_dropped_by_who_waits_for_them_are_sampled_again(tmp_path):
    """`HostEvents` on its own: one event per step, with all its micro-batches; nothing once it is
    detached.
    """
    trainer = make_trainer(
        tmp_path, **FAST | {"max_steps": 3, "eval_strategy": "no", "per_device_train_batch_size": 4},
        gradient_accumulation_steps=2,
    )  # fmt: skip
    events, ready = HostEvents(trainer), []

    def drop(rollouts):
        ready.append((trainer.state.global_step, len(rollouts)))
        if trainer.state.global_step == 1:
            drop_rollouts(trainer)

    events.attach(active=lambda: trainer.state.global_step < 2, stopped=lambda: events.detach(), rollouts_ready=drop)
    sampled, sample = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: (
        sampled.append(trainer.state.global_step) or sample(inputs)
    )
    trainer.train()
    assert ready == [(0, 2), (1, 2)]
    assert sampled == [0, 1, 1, 2]
    assert left_behind(trainer) == []


@pytest.mark.slow
def test_a_trainer_has_one_callback(tmp_path):
    trainer = slope(tmp_path)
    first, second = add(trainer), add(trainer)
    with pytest.raises(ConfigError, match="2 EffOPDCallbacks"):
        trainer.train()
    assert left_behind(trainer) == []
    trainer.remove_callback(second)
    trainer.add_callback(first)
    with pytest.raises(ConfigError, match="2 EffOPDCallbacks"):  # the same one, twice
        trainer.train()
    trainer.remove_callback(first)
    trainer.train()
    check_rates(trainer, adapted=True)


def test_a_callback_belongs_to_the_trainer_it_was_built_with(tmp_path):
    one, two = slope(tmp_path / "one"), slope(tmp_path / "two")
    two.add_callback(EffOPDCallback(one, LOOK, scorer=Scorer()))
    with pytest.raises(ConfigError, match="another trainer"):
        two.train()
    assert left_behind(one) == left_behind(two) == []


@pytest.mark.parametrize("scorer", [None, "next_batch_loss"])  # after a step, before the next one
def test_a_callback_added_while_training_runs_is_refused(tmp_path, scorer):
    trainer = slope(tmp_path)
    probe_of(trainer)._after = {2: lambda: add(trainer, scorer=scorer)}
    with pytest.raises(ConfigError, match=r"before trainer\.train"):
        trainer.train()


def test_a_patch_of_somebody_else_survives(tmp_path):
    trainer = slope(tmp_path)
    scheduled, calls = trainer._get_learning_rate, []

    def counted():
        calls.append(1)
        return scheduled()

    trainer._get_learning_rate = counted
    add(trainer)
    trainer.train()
    assert trainer._get_learning_rate is counted and calls
    check_rates(trainer, adapted=True)


@pytest.mark.slow
def test_a_callback_is_collected_once_it_is_removed(tmp_path):
    import weakref

    trainer = slope(tmp_path)
    callback = add(trainer)
    trainer.train()
    trainer.remove_callback(callback)
    gone = weakref.ref(callback)
    del callback
    gc.collect()
    assert gone() is None


# -- a plain loop ----------------------------------------------------------------------------------


def test_a_closed_look_ahead_leaves_the_optimizer_alone():
    model = Slope()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    config = EffOPDConfig("line_search", parameters="all", gate="not_worse")
    with EffOPD(model, Scorer(), config, optimizer=optimizer) as look:
        look._optimizer.rate.factor = 0.5
        with pytest.raises(ConfigError, match="adapts the learning rate of this optimizer"):
            EffOPD(model, Scorer(), config, optimizer=optimizer)
    look.close()  # twice is once
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    model.w.grad = torch.ones_like(model.w)
    optimizer.step()
    assert model.w.tolist() == [-1.0] * 3
    for call in (look.step, look.search):
        with pytest.raises(ConfigError, match="closed"):
            call(1)
    EffOPD(model, Scorer(), config, optimizer=optimizer)  # not kept: its hooks go with it
    gc.collect()
    assert not optimizer._optimizer_step_pre_hooks
    EffOPD(model, Scorer(), config, optimizer=optimizer).close()


# -- what the callback is built from ---------------------------------------------------------------


@pytest.fixture(scope="module")
def distilling(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("run"), **FAST)


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("batch_size", 3, "batch_size"),
        ("temperature", 0.5, "temperature"),
        ("max_completion_length", 3, "max_new_tokens"),
    ],
)
def test_settings_reach_the_accuracy_scorer(distilling, name, value, setting):
    default, other = (
        EffOPDCallback(distilling, EffOPDConfig(validation_size=12, args=args), task=make_task(32)).scorer
        for args in ({}, {name: value})
    )
    assert dataclasses.replace(default.sampling, **{setting: value}) == other.sampling != default.sampling
    assert len(other.validation_ids) == 12


def test_score_rollouts_reach_the_divergence_scorer(distilling):
    sizes = [
        EffOPDCallback(distilling, EffOPDConfig("line_search", score_rollouts=n)).scorer._rollouts for n in (0.25, 3)
    ]
    assert sizes == [4, 3]
    scorers = [
        EffOPDCallback(distilling, EffOPDConfig(**setting), task=make_task(32)).scorer
        for setting in ({"validation_size": 8}, {"score_rollouts": 8})
    ]
    assert [type(scorer).__name__ for scorer in scorers] == ["AccuracyScorer", "RolloutScorer"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EffOPDConfig("none"), "plain training"),
        (EffOPDConfig(parameters="nothing_is_called_so"), "matches no trained parameter"),
        (EffOPDConfig("line_search", anchor_device="cuda:99"), "anchor_device='cuda:99'"),
    ],
)
def test_what_cannot_work_is_refused_when_the_callback_is_built(distilling, config, message):
    with pytest.raises(ConfigError, match=message):
        EffOPDCallback(distilling, config, task=make_task(64))


def test_a_scorer_of_ones_own_and_settings_of_another_are_refused(distilling):
    with pytest.raises(ConfigError, match=r"validation_size .*scorer of your own"):
        EffOPDCallback(distilling, EffOPDConfig(validation_size=12), scorer=Scorer())


ROWS = make_task(64).to_dataset()


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "this trainer has none"),
        (IterableDataset.from_generator(lambda: iter(ROWS)), r"a stream \(IterableDataset\)"),
        (ROWS.to_iterable_dataset(), r"a stream \(IterableDataset\)"),
        (ROWS.remove_columns("answer"), "needs its columns 'prompt' and 'answer'; got .*prompt"),
        ([{"prompt": "1 + 1", "gold": "2"}], r"got \['prompt', 'gold'\]"),
        (torch.utils.data.TensorDataset(torch.zeros(64)), "got TensorDataset"),
        (Dataset.from_dict({"prompt": [], "answer": []}), "there are 0"),
    ],
)
def test_why_no_validation_prompts_can_be_drawn(distilling, monkeypatch, dataset, message):
    monkeypatch.setattr(distilling, "train_dataset", dataset)
    with pytest.raises(TaskError, match=message):
        EffOPDCallback(distilling, EffOPDConfig(), verify=contains)
    EffOPDCallback(distilling, EffOPDConfig("line_search"))  # which needs no answers


def test_rows_without_a_dataset_class_will_do(distilling, monkeypatch):
    monkeypatch.setattr(distilling, "train_dataset", [{"prompt": f"{i}", "answer": "a"} for i in range(20)])
    scorer = EffOPDCallback(distilling, EffOPDConfig(validation_size=12), verify=contains).scorer
    assert len(scorer.validation_ids) == 12


@pytest.mark.slow
def test_a_resume_that_spells_out_the_defaults_ends_where_the_run_does(tmp_path):
    settings = FAST | {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, effopd=EffOPDConfig("line_search"), **settings)
    whole.train()
    spelled = EffOPDConfig(
        "line_search",
        schedule="adaptive",
        score_rollouts=4,
        reset_moments=True,
        adapt_learning_rate=True,
        gate="significant",
        min_z=2.0,
        parameters="all",
    )
    checkpoint = str(tmp_path / "checkpoints" / "step-000002")
    again = make_trainer(tmp_path, effopd=spelled, **settings)
    again.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    assert left_behind(again) == []
    other = make_trainer(tmp_path, effopd=EffOPDConfig("line_search", score_rollouts=3), **settings)
    with pytest.raises(CheckpointError, match=r"score_rollouts differ \(saved → now: score_rollouts 4 → 3\)"):
        other.train(resume_from_checkpoint=checkpoint)


def test_a_second_run_in_a_folder_keeps_the_searches_of_the_first(tmp_path, caplog):
    for _ in range(3):
        trainer = slope(tmp_path, max_steps=1)
        add(trainer)
        trainer.train()
    kept = [tmp_path / name for name in (SEARCHES, "searches-1.jsonl", "searches-2.jsonl")]
    assert [[row["step"] for row in read_rows(path)] for path in kept] == [[1], [1], [1]]
    assert "held the searches of an earlier run; they are now in searches-2.jsonl" in caplog.text
