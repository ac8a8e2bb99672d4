"""The search is pure: its accept/reject logic on plain functions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from effopd import EffOPDConfig
from effopd.errors import NonFiniteWeightsError, ScorerError
from effopd.extrapolate.schedule import powers_of_two
from effopd.extrapolate.search import GATES, Score, first_failure_search, line_search, paired_z

PAPER = (2.0, 4.0, 6.0, 8.0, 10.0)


def run(values, gate="not_worse", scales=PAPER):
    seen = []

    def score(scale):
        seen.append(scale)
        value = values[scale]
        if isinstance(value, Exception):
            raise value
        return Score(value, seconds=1.0, generated_tokens=7)

    return first_failure_search(score, scales, gate), seen


@pytest.mark.parametrize(
    ("values", "gate", "accepted", "calls"),
    [
        (
            {0: 0.5, 2: 0.5, 4: 0.5, 6: 0.5, 8: 0.5, 10: 0.5},
            "not_worse",
            10.0,
            6,
        ),  # ties are accepted by the paper's gate …
        ({0: 0.5, 2: 0.5}, "better", 0.0, 2),  # … and end the released code's
        ({0: 0.5, 2: 0.4}, "not_worse", 0.0, 2),  # k = 1 fails: plain OPD
        ({0: 0.5, 2: 0.6, 4: 0.55}, "not_worse", 2.0, 3),  # the bar is raised by what was accepted
        ({0: 0.5, 2: 0.6, 4: 0.7, 6: 0.1}, "better", 4.0, 4),  # first failure stops, later scales are never scored
        ({0: 0.5, 2: math.nan}, "not_worse", 0.0, 2),
        ({0: 0.5, 2: 0.6, 4: NonFiniteWeightsError("x")}, "not_worse", 2.0, 3),
        ({0: math.nan}, "not_worse", 0.0, 1),
    ],
)
def test_first_failure(values, gate, accepted, calls):
    result, seen = run(values, gate)
    assert result.accepted_scale == accepted
    assert len(seen) == calls == len(result.trials)
    assert result.generated_tokens == 7 * sum(trial.score is not None for trial in result.trials)


def test_accepted_scores_never_fall():
    import random

    for seed in range(200):
        rng = random.Random(seed)
        values = {scale: rng.randint(0, 5) / 5 for scale in (0.0, *PAPER)}
        result, _ = run(values)
        accepted = [t.score.mean for t in result.trials if t.verdict in ("start", "accepted")]
        assert accepted == sorted(accepted)
        assert result.accepted_scale == max([0.0, *(t.scale for t in result.trials if t.verdict == "accepted")])


def of(values):
    return Score(sum(values) / len(values), per_example=tuple(map(float, values)))


def test_paired_z_is_the_paired_t_statistic():
    rng = np.random.default_rng(0)
    for n in (2, 5, 32):
        candidate, reference = rng.normal(size=(2, n))
        expected = scipy.stats.ttest_rel(candidate, reference).statistic
        assert paired_z(of(candidate), of(reference)) == pytest.approx(expected)
    same = of([1.0, 2.0])
    assert paired_z(same, same) == 0.0 and paired_z(of([2.0, 3.0]), same) == math.inf


def test_one_lucky_example_never_passes_the_margin():
    for size in (1e-3, 1.0, 1e6):
        lucky, start = of([size] + [0.0] * 31), of([0.0] * 32)
        assert GATES["better"](lucky, start, 2.0) and not GATES["significant"](lucky, start, 2.0)


@pytest.mark.parametrize("search", [first_failure_search, line_search])
def test_the_margin_says_no_to_noise_and_yes_to_a_gain(search):
    """400 searches along rays whose examples differ, but whose true gain is nothing: at most a few
    per cent jump ahead.
    """
    arguments = {"scales": PAPER} if search is first_failure_search else {}
    rng = np.random.default_rng(0)

    def jumps(gate, gain):
        moved = 0
        for _ in range(400):
            slopes = rng.normal(gain, 1.0, 32)  # curved a little, so that the line search has something to refine
            score = lambda s, slopes=slopes: of(s * slopes - 0.01 * s * s)  # noqa: E731
            moved += search(score, gate=gate, **arguments).accepted_scale > 0
        return moved / 400

    assert jumps("significant", 0.0) < 0.08 and jumps("better", 0.0) > 0.3
    assert jumps("significant", 1.0) > 0.95


def test_the_margin_needs_examples_to_pair_or_exact_scores():
    exact = lambda s: Score(-((s - 3.0) ** 2))  # noqa: E731
    assert line_search(exact, gate="significant") == line_search(exact, gate="better")
    with pytest.raises(ScorerError, match="per_example"):
        line_search(lambda s: of([s]), gate="significant")
    with pytest.raises(ScorerError, match="32 and 31"):
        paired_z(of([0.0] * 32), of([0.0] * 31))


def test_rows_are_json_ready():
    import json

    result, _ = run({0: 0.5, 2: math.nan})
    assert (
        json.loads(json.dumps([t.to_record().to_row() for t in result.trials], allow_nan=False))[1]["verdict"]
        == "non-finite"
    )


def test_powers_of_two():
    assert [t for t in range(-2, 70) if powers_of_two(t)] == [1, 2, 4, 8, 16, 32, 64]


def test_defaults_are_the_papers():
    config = EffOPDConfig()
    assert (config.schedule, tuple(config.args["scales"]), config.validation_size) == ("powers_of_two", PAPER, 50)
    assert (config.gate, config.parameters, config.args["temperature"]) == ("not_worse", "attention+mlp", 1.0)
    code = EffOPDConfig("effopd-released")
    assert (code.gate, code.parameters) == ("better", "released-code")
    assert EffOPDConfig("effopd-released", gate="not_worse").gate == "not_worse"
