"""Every setting of the look-ahead is used or refused, and a resume knows defaults that are spelled out."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from effopd.extrapolate.settings_in_use import DECIDE_NOTHING, OF_BUILT_IN_SCORERS, OF_THE_STRATEGY, WELCOME_ANYWHERE
from helpers.tiny_models import make_model, make_task, make_tokenizer
from torch import nn

from effopd import EffOPD, EffOPDConfig, Score
from effopd.errors import CheckpointError, ConfigError
from effopd.extrapolate.config import ONLY_FOR
from effopd.extrapolate.saved_state import STATE_FILE, check_same, fingerprint
from effopd.extrapolate.scorers import AccuracyScorer
from effopd.extrapolate.strategies import STRATEGIES

#: A value that differs from every strategy's default.
OTHER = {
    "schedule": "every_step", "optimizer": {"keep": "reset", "reset": "keep"}, "steer": {True: False, False: True},
    "scales": [1.0], "gate": {"ge": "margin", "gt": "margin", "margin": "ge"}, "gate_z": 50.0, "parameters": "vector",
    "fixed_k": 3.0, "fit_every": 1, "fit_until": 12, "relex_factor": 3.0, "alpha_target": 0.5, "score_rollouts": 3,
    "validation_size": 20, "validation_batch_size": 3, "temperature": 0.5, "max_completion_length": 3, "score_timeout": 30.0,
    "seed": 7, "anchor_device": "cpu", "scorer": {"accuracy": "teacher_kl", "teacher_kl": "accuracy"},
}  # fmt: skip
FIELDS = [field.name for field in dataclasses.fields(EffOPDConfig) if field.name != "strategy"]
#: (strategy, scorer): every strategy with every scorer that it takes.
KINDS = [
    (strategy, scorer)
    for strategy, entry in STRATEGIES.items()
    for scorer in (("accuracy", "teacher_kl") if entry.scorer and not entry.fit else (entry.scorer,))
]


def base(strategy: str, scorer: str | None, **more) -> EffOPDConfig:
    short = {"fit_every": 2, "fit_until": 8} if STRATEGIES[strategy].fit else {}
    return EffOPDConfig(strategy, scorer=scorer, **(short | more))


def other(config: EffOPDConfig, name: str):
    value, now = OTHER[name], getattr(config, name) or config.default(name)
    return value.get(now, "accuracy") if isinstance(value, dict) else value


class Drift(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.matrix, self.mlp.vector = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(5))


class Recorded:
    """The reference against which a setting must show: every number that searches and the steps between them leave behind."""

    def __init__(self, config: EffOPDConfig):
        self.seen: list = []
        # one where all examples gain from going further, one with an optimum on which they do not agree
        for value, share in ((lambda x: min(x, 0.2), 0.9), (lambda x: -((x - 0.05) ** 2), 0.1)):
            self._run(config, value, share)

    def _run(self, config: EffOPDConfig, value, share: float) -> None:
        torch.manual_seed(0)
        model, scores = Drift(), []
        weights = list(model.parameters())
        optimizer = torch.optim.Adam(weights, lr=0.01)

        def scorer(model) -> Score:
            noise = 0.1 * float(torch.rand(()))
            values = tuple(value(float(p.detach().mean())) * (1, share)[i] + noise for i, p in enumerate(weights))
            scores.append(values)
            return Score(sum(values) / 2, values)

        scorer.reads = ("scorer", *AccuracyScorer.reads, "score_rollouts")
        target = {"target": lambda: 3.0} if config.strategy == "alpha_opd" else {}
        look = EffOPD(model, scorer, config, optimizer=optimizer, **target)
        after = []
        for step in range(1, 13 if STRATEGIES[config.strategy].fit else 6):
            for p in weights:
                p.grad = -torch.ones_like(p) / step
            optimizer.step()
            look.step(step)
            after.append((look.learning_rate_factor, len(optimizer.state), [p.detach().tolist() for p in weights]))
        look.close()
        rows = [
            (
                row["step"],
                row["delta_norm"],
                row["accepted_scale"],
                [(t["scale"], t["verdict"]) for t in row["trials"]],
            )
            for row in look.history
        ]
        self.seen += [scores, after, rows, str(look.weights._anchor_device), config.score_timeout]

    def __eq__(self, different):
        return vars(self) == vars(different)


@pytest.mark.parametrize(("strategy", "scorer"), KINDS)
def test_a_setting_that_is_accepted_changes_something(strategy, scorer):
    start = base(strategy, scorer)
    reference = Recorded(start)
    assert reference == Recorded(start)
    for name in FIELDS:
        try:
            changed = dataclasses.replace(start, **{name: other(start, name)})
        except ConfigError as error:
            assert f"EffOPDConfig.{name}" in str(error), name
            assert name not in start.in_use(), name
            continue
        if name in WELCOME_ANYWHERE and name not in start.in_use():
            continue
        assert name in start.in_use(), name
        if name == "gate_z" or name in OF_BUILT_IN_SCORERS:
            continue  # with the gate that reads it, below; with the scorers that are built from them, in test_attach.py
        assert reference != Recorded(changed), f"{name} is accepted and changes nothing"


@pytest.mark.parametrize("strategy", ONLY_FOR["gate_z"])
def test_the_margin_is_read_where_it_is_accepted(strategy):
    start = base(strategy, None, gate="margin")
    assert "gate_z" in start.in_use()
    start = dataclasses.replace(start, gate_z=0.0)  # an exact tie, noop's, is z = 0
    assert Recorded(start) != Recorded(dataclasses.replace(start, gate_z=50.0))
    with pytest.raises(ConfigError, match="gate 'margin' only"):
        EffOPDConfig(strategy, gate="gt", gate_z=3.0)


def test_without_a_strategy_nothing_is_accepted():
    for name in FIELDS:
        if name in WELCOME_ANYWHERE:
            continue
        value = OTHER[name]
        with pytest.raises(ConfigError, match=f"EffOPDConfig.{name}.*plain training"):
            EffOPDConfig("none", **{name: next(iter(value.values())) if isinstance(value, dict) else value})


@pytest.mark.parametrize(("strategy", "scorer"), KINDS)
def test_defaults_may_be_spelled_out(strategy, scorer):
    short = EffOPDConfig(strategy)
    spelled = {name: short.default(name) for name in FIELDS}
    assert EffOPDConfig(strategy, **spelled).in_use() == short.in_use()
    for name, value in spelled.items():
        assert EffOPDConfig(strategy, **{name: value}).in_use() == short.in_use()
    if scorer is not None:
        assert EffOPDConfig(strategy, scorer=scorer).resolved_scorer == scorer


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("validation_size", 20),
        ("temperature", 0.5),
        ("max_completion_length", 3),
        ("score_rollouts", 3),
        ("scorer", "teacher_kl"),
    ],
)
def test_settings_of_built_in_scorers_are_refused_with_another_one(name, value):
    more = {"scorer": "teacher_kl"} if name == "score_rollouts" else {}
    config = EffOPDConfig("effopd", parameters="all", **{name: value} | more)
    with pytest.raises(ConfigError, match="scorer of your own"):
        EffOPD(Drift(), lambda model: 0.0, config)


@pytest.mark.parametrize(
    "bad",
    [
        {"scales": []}, {"scales": [2.0, -1.0]}, {"scales": "2"}, {"scales": [float("nan")]}, {"seed": -1}, {"seed": 0.5},
        {"gate": "margin", "gate_z": -1.0}, {"gate": "margin", "gate_z": float("nan")}, {"validation_size": 0},
        {"validation_size": "12"}, {"validation_size": 2.5}, {"validation_size": True}, {"gate": "margin", "validation_size": 1},
        {"temperature": -0.1}, {"temperature": float("nan")}, {"max_completion_length": 0}, {"score_timeout": 0.0},
        {"anchor_device": "disk"}, {"anchor_device": "meta"}, {"anchor_device": "cuda:x"}, {"anchor_device": 3}, {"steer": "yes"},
        {"parameters": "("}, {"gate": "gte"}, {"schedule": "never"}, {"scorer": "loss"}, {"optimizer": "Adam"},
        {"strategy": "line_search", "score_rollouts": 0}, {"strategy": "effodp"}, {"strategy": None},
    ],
)  # fmt: skip
def test_bad_values_are_refused_when_the_config_is_built(bad):
    with pytest.raises(ConfigError, match=f"{[*bad][-1]}"):
        EffOPDConfig(**bad)


def test_a_device_that_is_not_there_is_refused_before_training():
    with pytest.raises(ConfigError, match="anchor_device='cuda:99' cannot hold the anchor"):
        EffOPD(Drift(), lambda model: 0.0, EffOPDConfig(parameters="all", anchor_device="cuda:99"))


# -- resuming ---------------------------------------------------------------------------------------------------------

HOST = {"max_completion_length": 6, "score_rollouts": 8}


class Reads:
    reads = (*AccuracyScorer.reads, "score_rollouts")
    validation_ids = None


def saved(config: EffOPDConfig) -> dict:
    return json.loads(json.dumps(fingerprint(config, Reads(), HOST)))


def as_before_defaults_were_resolved(config: EffOPDConfig) -> dict:
    """The fingerprint that states had which only resolved gate and parameters."""
    settings = dataclasses.asdict(config)
    for name in DECIDE_NOTHING:
        settings.pop(name)
    settings |= {"gate": config.resolved_gate, "parameters": config.resolved_parameters}
    return {"config": settings, "validation_ids": None}


@pytest.mark.parametrize("state", [saved, as_before_defaults_were_resolved])
@pytest.mark.parametrize(("strategy", "scorer"), KINDS)
def test_a_resume_may_spell_out_every_default(strategy, scorer, state):
    start = EffOPDConfig(strategy, scorer=scorer)
    for name in FIELDS:
        value = HOST.get(name, start.default(name))
        if name in HOST and name not in start.in_use():
            continue
        spelled = dataclasses.replace(start, **{name: value if name != "scorer" else scorer})
        check_same(state(start), spelled, Reads(), HOST)
        check_same(state(spelled), start, Reads(), HOST)


@pytest.mark.parametrize("state", [saved, as_before_defaults_were_resolved])
@pytest.mark.parametrize(("strategy", "scorer"), KINDS)
def test_a_resume_with_another_setting_is_refused_and_named(strategy, scorer, state):
    start = base(strategy, scorer)
    for name in FIELDS:
        try:
            changed = dataclasses.replace(start, **{name: other(start, name)})
        except ConfigError:
            continue
        if name in DECIDE_NOTHING or name not in start.in_use():
            check_same(state(start), changed, Reads(), HOST)
            continue
        for one, two in ((start, changed), (changed, start)):
            with pytest.raises(CheckpointError, match=name):
                check_same(state(one), two, Reads(), HOST)


@pytest.mark.parametrize("name", [*OF_THE_STRATEGY, *HOST])
def test_a_default_of_the_package_that_has_changed_is_noticed(name, monkeypatch):
    config = EffOPDConfig("effopd" if name == "max_completion_length" else "line_search")
    before, host = saved(config), HOST
    if name in HOST:
        host = HOST | {name: 99}
    else:
        value = other(config, name)
        if name == "parameters":
            value = "attention+mlp"
        changed = dataclasses.replace(STRATEGIES["line_search"], **{name: value})
        monkeypatch.setitem(STRATEGIES, "line_search", changed)
    with pytest.raises(CheckpointError, match=name):
        check_same(before, config, Reads(), host)


def test_a_state_on_disk_has_its_defaults_resolved(tmp_path):
    scorer = AccuracyScorer(make_task(12), make_tokenizer(), max_new_tokens=4)
    EffOPD(make_model(0), scorer, EffOPDConfig(validation_size=12), host={"max_completion_length": 4}).save(tmp_path)
    settings = json.loads((tmp_path / STATE_FILE).read_text())["fingerprint"]["config"]
    assert settings == {
        "strategy": "effopd", "schedule": "powers_of_two", "scorer": "accuracy", "optimizer": "keep", "steer": False, "gate": "ge",
        "scales": [2.0, 4.0, 6.0, 8.0, 10.0], "parameters": "attention+mlp", "validation_size": 12, "validation_batch_size": 64,
        "temperature": 1.0, "max_completion_length": 4, "seed": 0,
    }  # fmt: skip
