"""Every setting of the look-ahead is read or refused, has a concrete value, and is the same on a
resume.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.processes import run_script
from helpers.tiny_models import make_model, make_task, make_tokenizer
from torch import nn

import effopd
from effopd import EffOPD, EffOPDConfig, Score
from effopd.errors import CheckpointError, ConfigError
from effopd.extrapolate.saved_state import STATE_FILE, check_same, fingerprint
from effopd.extrapolate.scorers.accuracy import AccuracyScorer
from effopd.extrapolate.scorers.base import OF_SCORERS, SCORERS
from effopd.extrapolate.strategy import PAPER, STRATEGIES
from effopd.tasks.sampling import Sampling

FIELDS = [field.name for field in dataclasses.fields(EffOPDConfig) if field.name not in ("strategy", "args")]
#: Every argument of every strategy and scorer → a value that is no default.
OTHER_ARGS = {
    "k": 3.0,
    "scales": [1.0],
    "every": 1,
    "until": 12,
    "factor": 3.0,
    "target": 0.5,
    "temperature": 0.5,
    "batch_size": 3,
    "max_completion_length": 3,
}
#: A value that differs from every strategy's.
OTHER = {
    "schedule": "every_step",
    "parameters": "vector",
    "validation_size": 20,
    "score_rollouts": 3,
    "min_z": 50.0,
    "seed": 7,
    "anchor_device": "cpu",
    "gate": {"not_worse": "significant", "better": "significant", "significant": "not_worse", None: "better"},
    "reset_moments": {True: False, False: True, None: True},
    "adapt_learning_rate": {True: False, False: True, None: True},
}
SETTINGS = [*FIELDS, *(f"args.{name}" for name in OTHER_ARGS)]
#: Read by the built-in scorers; `test_attach.py` shows how each reaches its scorer.
OF_BUILT_IN = {*OF_SCORERS, *(f"args.{name}" for name in OF_SCORERS)}
#: (strategy, settings that choose the scorer): every strategy with every scorer that it takes.
KINDS = [(strategy, {}) for strategy in STRATEGIES] + [
    (strategy, {"score_rollouts": 0.25}) for strategy in ("effopd", "effopd-released", "noop", "random_direction")
] + [("line_search", {"validation_size": 12})]  # fmt: skip


def base(strategy: str, more: dict) -> EffOPDConfig:
    return EffOPDConfig(strategy, args={"every": 2, "until": 8} if STRATEGIES[strategy].fit else {}, **more)


def changed(config: EffOPDConfig, setting: str) -> EffOPDConfig:
    """The config with another value of one setting."""
    if setting.startswith("args."):
        name = setting.removeprefix("args.")
        return dataclasses.replace(config, args={**config.args, name: OTHER_ARGS[name]})
    value = OTHER[setting]
    if isinstance(value, dict):
        value = value[getattr(config, setting)]
    min_z = {"min_z": None} if setting == "gate" else {}
    return dataclasses.replace(config, **{setting: value} | min_z)


class Drift(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.matrix, self.mlp.vector = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(5))


class Recorded:
    """The reference against which a setting must show: every number that searches and the steps
    between them leave behind.
    """

    def __init__(self, config: EffOPDConfig):
        self.seen: list = []
        # one where all examples gain from going further, one with an optimum on which they do not
        # agree
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

        scorer.reads = OF_SCORERS
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
        searches = [
            (row.step, row.delta_norm, row.accepted_scale, [(t.scale, t.verdict) for t in row.trials])
            for row in look.history
        ]
        self.seen += [scores, after, searches, config.anchor_device]

    def __eq__(self, different):
        return vars(self) == vars(different)


def test_there_are_at_most_twelve_settings_and_every_one_explains_itself():
    assert len(dataclasses.fields(EffOPDConfig)) <= 12
    assert all(len(field.metadata["help"]) > 40 for field in dataclasses.fields(EffOPDConfig))


@pytest.mark.parametrize(("strategy", "more"), KINDS)
def test_every_setting_is_read_or_refused(strategy, more):
    start = base(strategy, more)
    reference = Recorded(start)
    assert reference == Recorded(start)
    for name in SETTINGS:
        try:
            other = changed(start, name)
        except ConfigError as error:
            assert "EffOPDConfig." in str(error) and re.search(rf"\b{name.rpartition('.')[2]}\b", str(error)), name
            continue
        if name in OF_BUILT_IN:
            assert other.scorer in SCORERS
        elif name == "seed" and start.scorer is None:  # nothing is drawn; a resume may not change it all the same
            assert fingerprint(start, None) != fingerprint(other, None)
        else:
            assert reference != Recorded(other), f"{name} is accepted and changes nothing"


@pytest.mark.parametrize("strategy", [name for name, rules in STRATEGIES.items() if "min_z" in rules.settings])
def test_the_standard_errors_are_read_where_they_are_accepted(strategy):
    start = EffOPDConfig(strategy, gate="significant", min_z=0.0)  # an exact tie, noop's, is z = 0
    assert Recorded(start) != Recorded(dataclasses.replace(start, min_z=50.0))
    with pytest.raises(ConfigError, match=r"EffOPDConfig\.min_z is read by gate 'significant' only"):
        EffOPDConfig(strategy, gate="better", min_z=3.0)


def test_every_setting_that_is_read_has_a_value_after_construction():
    assert EffOPDConfig("line_search").gate == "significant" and EffOPDConfig("effopd").gate == "not_worse"
    for strategy, rules in STRATEGIES.items():
        config = EffOPDConfig(strategy)
        unread = {name for name in PAPER if name not in rules.settings}
        assert all(getattr(config, name) is None for name in unread)
        for name in set(rules.settings) - {"validation_size", "score_rollouts", "min_z"}:
            assert getattr(config, name) == rules.settings[name]
        assert config.changed == set()
        assert [config.validation_size, config.score_rollouts].count(None) == (1 if config.scorer else 2)


def test_the_page_of_searches_shows_these_values():
    page = (Path(__file__).parents[2] / "docs" / "search.md").read_text()
    strategies, *rows = re.findall(r"^\|(.*)\|$", page.partition("## Settings")[2].partition("##")[0], re.M)
    columns = [re.findall(r"`([\w-]+)`", cell) for cell in strategies.split("|")[1:]]
    shown = {re.findall(r"`(\w+)`", row)[0]: [cell.strip() for cell in row.split("|")[1:]] for row in rows[1:]}
    assert set(shown) == set(PAPER)
    for setting, cells in shown.items():
        for names, cell in zip(columns, cells, strict=True):
            values = [getattr(EffOPDConfig(name), setting) for name in names]
            texts = {"–" if v is None else f"{v:g}" if type(v) is float else str(v).lower() for v in values}
            assert texts == {cell}, setting


def test_false_asks_for_nothing_where_a_strategy_never_does_it():
    for strategy in STRATEGIES:
        assert not EffOPDConfig(strategy, reset_moments=False, adapt_learning_rate=False).adapt_learning_rate
    with pytest.raises(ConfigError, match=r"EffOPDConfig\.adapt_learning_rate is read by"):
        EffOPDConfig("relex", adapt_learning_rate=True)


def test_two_ways_of_scoring_exclude_each_other():
    assert EffOPDConfig("effopd", score_rollouts=16).scorer == "teacher_kl"
    assert EffOPDConfig("effopd", score_rollouts=16).validation_size is None
    assert EffOPDConfig("line_search", validation_size=16).scorer == "accuracy"
    assert EffOPDConfig("effopd", validation_size=50).scorer == "accuracy"
    with pytest.raises(ConfigError, match=r"score_rollouts and validation_size are two ways of scoring"):
        EffOPDConfig("effopd", validation_size=20, score_rollouts=8)


def test_without_a_strategy_nothing_is_accepted():
    for name in FIELDS:
        value = {"gate": "better", "reset_moments": True, "adapt_learning_rate": True}.get(name, OTHER[name])
        if name in ("seed", "anchor_device"):  # a grid gives every run its seed
            EffOPDConfig("none", **{name: value})
            continue
        with pytest.raises(ConfigError, match=f"EffOPDConfig.{name}.*plain training"):
            EffOPDConfig("none", **{name: value})
    with pytest.raises(ConfigError, match=r"EffOPDConfig\.args"):
        EffOPDConfig("none", args={"k": 1})


@pytest.mark.parametrize(("strategy", "more"), KINDS)
def test_values_of_the_strategy_may_be_spelled_out(strategy, more):
    short = EffOPDConfig(strategy, **more)
    assert EffOPDConfig(**dataclasses.asdict(short)) == short
    for name in FIELDS:
        assert EffOPDConfig(strategy, **more | {name: getattr(short, name)}) == short
        if not more:
            assert (
                EffOPDConfig(strategy, **{name: STRATEGIES[strategy].settings.get(name, getattr(short, name))})
                == short
            )
    for name, value in short.args.items():
        assert EffOPDConfig(strategy, args={name: value}, **more) == short
    assert EffOPDConfig(strategy, args=json.dumps(short.args), **more) == short


@pytest.mark.parametrize(
    "more",
    [
        {"validation_size": 20},
        {"score_rollouts": 3},
        {"args": {"temperature": 0.5}},
        {"args": {"max_completion_length": 3}},
    ],
)
def test_settings_of_built_in_scorers_are_refused_with_another_one(more):
    config = EffOPDConfig("effopd", parameters="all", **more)
    with pytest.raises(ConfigError, match="scorer of your own"):
        EffOPD(Drift(), lambda model: 0.0, config)


@pytest.mark.parametrize(
    "bad",
    [
        {"seed": -1},
        {"seed": 0.5},
        {"gate": "significant", "min_z": -1.0},
        {"gate": "significant", "min_z": float("nan")},
        {"validation_size": 0},
        {"validation_size": "12"},
        {"validation_size": 2.5},
        {"validation_size": True},
        {"gate": "significant", "validation_size": 1},
        {"anchor_device": "disk"},
        {"anchor_device": "meta"},
        {"anchor_device": "cuda:x"},
        {"anchor_device": 3},
        {"adapt_learning_rate": "yes"},
        {"reset_moments": 1},
        {"parameters": "("},
        {"gate": "gte"},
        {"schedule": "never"},
        {"score_rollouts": 0},
        {"score_rollouts": 2.5},
        {"score_rollouts": float("nan")},
        {"score_rollouts": float("inf")},
        {"strategy": "effodp"},
        {"strategy": None},
    ],
)
def test_bad_values_are_refused_when_the_config_is_built(bad):
    with pytest.raises(ConfigError, match=rf"EffOPDConfig\.{[*bad][-1]}"):
        EffOPDConfig(**bad)


def test_a_device_that_is_not_there_is_refused_before_training():
    with pytest.raises(ConfigError, match="anchor_device='cuda:99' cannot hold the anchor"):
        EffOPD(Drift(), lambda model: 0.0, EffOPDConfig(parameters="all", anchor_device="cuda:99"))


WITHOUT = """
import torch
import effopd
from effopd import EffOPD, EffOPDConfig
from effopd.extrapolate.strategy import STRATEGIES
assert effopd.__path__ == [{copy!r}], effopd.__path__
assert not {names} & set(STRATEGIES), STRATEGIES
for name in STRATEGIES:
    args = dict(every=1, until=4) if STRATEGIES[name].fit else {{}}
    config = EffOPDConfig(name, args=args, parameters="all")
    model = torch.nn.Linear(3, 2)
    look = EffOPD(model, lambda m: float(m.weight.sum()), config, target=lambda: 1.0,
                  optimizer=torch.optim.SGD(model.parameters(), 0.1))
    for step in range(1, 5):
        with torch.no_grad():
            model.weight.add_(0.1)
        look.step(step)
    look.close()
help = " ".join(f.metadata["help"] for f in __import__("dataclasses").fields(EffOPDConfig))
assert not [name for name in {names} if name in help.replace("effopd-released", "")], help
"""


@pytest.mark.slow
def test_a_strategy_leaves_with_its_file_and_its_line(tmp_path):
    copy, leaving = tmp_path / "effopd", {"relex", "alpha_opd", "random_direction", "noop"}
    shutil.copytree(Path(effopd.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    strategies = copy / "extrapolate" / "strategies"
    for module in leaving:
        (strategies / f"{module}.py").unlink()
    lines = (strategies / "__init__.py").read_text().splitlines(keepends=True)
    (strategies / "__init__.py").write_text("".join(line for line in lines if not set(line.split()) & leaving))
    script = tmp_path / "without.py"
    script.write_text(WITHOUT.format(names=leaving, copy=str(copy)))
    status, said = run_script(script, package=tmp_path)
    assert status == 0, said
    for path in (copy / "extrapolate").rglob("*.py"):
        assert not re.search(rf"\b({'|'.join(leaving)})\b", path.read_text()), path


# -- resuming --------------------------------------------------------------------------------------

HOST = {"max_completion_length": 6, "score_rollouts": 8}


class Reads:
    reads = OF_SCORERS
    validation_ids = None


def saved(config: EffOPDConfig) -> dict:
    return json.loads(json.dumps(fingerprint(config, Reads(), HOST)))


@pytest.mark.parametrize(("strategy", "more"), KINDS)
def test_a_resume_may_spell_out_every_default(strategy, more):
    start = EffOPDConfig(strategy, **more)
    spelled = [EffOPDConfig(strategy, **more | {name: getattr(start, name)}) for name in FIELDS]
    spelled += [EffOPDConfig(strategy, args={name: value}, **more) for name, value in start.args.items()]
    if start.score_rollouts:
        spelled.append(dataclasses.replace(start, score_rollouts=HOST["score_rollouts"]))
    if start.validation_size:
        limit = HOST["max_completion_length"]
        spelled.append(dataclasses.replace(start, args={**start.args, "max_completion_length": limit}))
    for config in spelled:
        check_same(saved(start), config, Reads(), HOST)
        check_same(saved(config), start, Reads(), HOST)


@pytest.mark.parametrize(("strategy", "more"), KINDS)
def test_a_resume_with_another_setting_is_refused_and_named(strategy, more):
    start = base(strategy, more)
    for name in SETTINGS:
        try:
            other = changed(start, name)
        except ConfigError:
            continue
        if name == "anchor_device":
            check_same(saved(start), other, Reads(), HOST)
            continue
        for one, two in ((start, other), (other, start)):
            with pytest.raises(CheckpointError, match=rf"{re.escape(name)}\b.* differ"):
                check_same(saved(one), two, Reads(), HOST)


@pytest.mark.parametrize("name", [name for name in PAPER if name != "validation_size"])
def test_a_value_of_the_strategy_that_has_changed_is_noticed(name, monkeypatch):
    before, rules = saved(EffOPDConfig("line_search")), STRATEGIES["line_search"]
    value = {"gate": "better", "reset_moments": False, "adapt_learning_rate": False, "parameters": "mlp"}.get(
        name, OTHER[name]
    )
    monkeypatch.setitem(
        STRATEGIES, "line_search", dataclasses.replace(rules, settings={**rules.settings, name: value})
    )
    with pytest.raises(CheckpointError, match=name):
        check_same(before, EffOPDConfig("line_search"), Reads(), HOST)


@pytest.mark.parametrize(
    ("name", "strategy"), [("score_rollouts", "line_search"), ("max_completion_length", "effopd")]
)
def test_a_default_of_the_host_that_has_changed_is_noticed(name, strategy):
    with pytest.raises(CheckpointError, match=name):
        check_same(saved(EffOPDConfig(strategy)), EffOPDConfig(strategy), Reads(), HOST | {name: 99})


def test_a_state_on_disk_holds_every_value(tmp_path):
    scorer = AccuracyScorer(make_task(12), make_tokenizer(), Sampling(max_new_tokens=4))
    EffOPD(make_model(0), scorer, EffOPDConfig(validation_size=12), host={"max_completion_length": 4}).save(tmp_path)
    settings = json.loads((tmp_path / STATE_FILE).read_text())["fingerprint"]["config"]
    assert settings == {
        "strategy": "effopd",
        "schedule": "powers_of_two",
        "parameters": "attention+mlp",
        "validation_size": 12,
        "gate": "not_worse",
        "min_z": None,
        "reset_moments": False,
        "adapt_learning_rate": False,
        "seed": 0,
        "args.scales": [2.0, 4.0, 6.0, 8.0, 10.0],
        "args.temperature": 1.0,
        "args.batch_size": 64,
        "args.max_completion_length": 4,
    }
