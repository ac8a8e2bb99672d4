"""Charts of a run's page: held-out KL and accuracy, searches along their rays, logged values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter

from effopd.extrapolate.search import Score, paired_gain
from effopd.report.charts import Axis, Chart, Panel, Rule, Series
from effopd.report.run_data import RunRecords
from effopd.report.run_figures import QUALITY, after_jumps, interval, jump_steps
from effopd.report.style import Look, looks
from effopd.runs.records import EvaluationRecord, SearchRecord, TrialRecord

#: Attribute of a `StepRecord` → title of its panel.
LOGGED = {
    "loss": "loss",
    "reward": "reward",
    "learning_rate": "learning rate",
    "health.reverse_kl": "reverse KL on fresh rollouts, nats per token",
    "health.overlap_ratio": "top-k overlap with the teacher",
    "entropy": "student's entropy, nats",
    "mean_length": "tokens per answer",
    "clipped_share": "answers cut at the limit, share",
    "grad_norm": "gradient norm",
}
_LOGARITHMIC = ("health.reverse_kl", "grad_norm", "learning_rate")
_AXES = {"kl": Axis("reverse KL, nats per token", "log"), "accuracy": Axis("accuracy")}


def run_looks(runs: Sequence[RunRecords]) -> dict[str, Look]:
    """Look of every run: the strategy's color; a second run of a strategy has another dash."""
    return looks({run.label: run.strategy for run in runs})


def quality_chart(runs: Sequence[RunRecords], styles: Mapping[str, Look], seconds: str) -> Chart:
    """Held-out KL and accuracy (rows) against optimizer steps and net seconds (columns).

    Args:
        styles: look by label.
        seconds: name of the runs' clock.
    """
    panels = []
    costs = {"optimizer steps": "step", f"{seconds} (search charged, evaluation not)": "costs.net_seconds"}
    for key in QUALITY:
        for label, x in costs.items():
            lines = [_curve(run, key, x, styles[run.label]) for run in runs]
            title = (
                ""
                if label != "optimizer steps"
                else {"kl": "Held-out KL to the teacher"}.get(key, "Held-out accuracy")
            )
            panels.append(Panel(title or " ", Axis(label), _AXES[key], lines))
    note = (
        "Exact KL in nats per token on held-out prompts. Every point is one evaluation, without smoothing. Bands: "
        "95 % intervals over prompts. Triangles: the first evaluation after a forward jump."
    )
    alt = "Held-out KL and accuracy of " + ", ".join(run.label for run in runs) + ", by steps and by net seconds"
    return Chart("quality", alt, panels, note)


def _curve(run: RunRecords, key: str, x: str, look: Look) -> Series:
    measured: list[EvaluationRecord] = [r for r in run.evaluations if getattr(r, key) is not None]
    low, high = interval(measured, key) or (None, None)
    return Series(
        run.label,
        [attrgetter(x)(record) for record in measured],
        [getattr(record, key) for record in measured],
        look,
        low,
        high,
        marks=after_jumps(measured, jump_steps(run.searches)),
        tips=[f"step {record.step}" for record in measured],
    )


def jumps_chart(runs: Sequence[RunRecords], styles: Mapping[str, Look]) -> Chart:
    """Accepted scale of every search against its step, and the total learning-rate factor."""
    scales, factors = [], []
    for run in runs:
        steps = [search.step for search in run.searches]
        tips = [_candidates(search) for search in run.searches]
        accepted = [search.accepted_scale for search in run.searches]
        scales.append(Series(run.label, steps, accepted, styles[run.label], line=False, tips=tips))
        total = [search.learning_rate_factor_total for search in run.searches]
        factors.append(Series(run.label, steps, total, styles[run.label]))
    step = Axis("optimizer steps")
    panels = [
        Panel("Accepted scale", step, Axis("scale s", "symlog"), scales, [Rule(0.0)]),
        Panel("Learning rate × this factor", step, Axis("factor", "log"), factors),
    ]
    alt = "Accepted scale and learning-rate factor of every search of " + ", ".join(run.label for run in runs)
    return Chart("jumps", alt, panels, "Scale 0: the weights were restored. Negative: a backward jump.")


def _candidates(search: SearchRecord) -> str:
    return f"step {search.step}, {max(0, len(search.trials) - 1)} candidates"


def search_chart(name: str, label: str, searches: Sequence[SearchRecord], look: Look, most: int = 24) -> Chart | None:
    """One panel per search: paired gain of every scale over s = 0, ± 2 standard errors.

    A gain without two examples to pair has no error. The accepted scale is a vertical line. Shows
    the first `most` searches with a scored candidate; `None` if there is none.
    """
    drawn = [search for search in searches if search.start_score is not None and len(_scored(search)) > 1][:most]
    if not drawn:
        return None
    panels = []
    for search in drawn:
        start = _score(search.trials[0])
        points = sorted(_scored(search), key=attrgetter("scale"))
        gains = [_gain(_score(trial), start) for trial in points]
        line = Series(
            label,
            [trial.scale for trial in points],
            [mean for mean, _ in gains],
            look,
            [None if error is None else mean - 2 * error for mean, error in gains],
            [None if error is None else mean + 2 * error for mean, error in gains],
            bars=True,
            tips=[trial.verdict for trial in points],
        )
        outcome = f"{search.accepted_scale:.3g}Δ" if search.accepted_scale else "stays"
        rules = [Rule(0.0), Rule(search.accepted_scale, "", True, look)]
        panels.append(Panel(f"step {search.step}: {outcome}", Axis("scale s", "symlog"), Axis("gain"), [line], rules))
    note = (
        "Gain over s = 0, paired by example, against the scale s of the candidate W + sΔ (linear up to 1, logarithmic "
        "beyond). Bars: ± 2 standard errors. Vertical line: accepted scale."
    )
    if len(searches) > len(drawn):
        note += f" The first {len(drawn)} searches with scores; the table has all {len(searches)}."
    return Chart(
        name, f"Gain by scale in every search of {label}", panels, note, columns=4, legend=False, compact=True
    )


def _scored(search: SearchRecord) -> list[TrialRecord]:
    return [trial for trial in search.trials if trial.score is not None]


def _score(trial: TrialRecord) -> Score:
    assert trial.score is not None
    return Score(trial.score, trial.per_example or ())


def _gain(candidate: Score, start: Score) -> tuple[float, float | None]:
    """Gain and its standard error; `None` if there are no two examples to pair."""
    counts = {len(candidate.per_example), len(start.per_example)}
    if counts == {1} or len(counts) > 1:
        return candidate.mean - start.mean, None
    return paired_gain(candidate, start)


def training_chart(runs: Sequence[RunRecords], styles: Mapping[str, Look]) -> Chart:
    """Logged values over steps, one panel per value."""
    panels = []
    for key, title in LOGGED.items():
        lines = []
        for run in runs:
            values = [attrgetter(key)(step) for step in run.steps]
            lines.append(Series(run.label, [step.step for step in run.steps], values, styles[run.label], points=False))
        panels.append(
            Panel(title, Axis("optimizer steps"), Axis("", "log" if key in _LOGARITHMIC else "linear"), lines)
        )
    alt = "Logged values of " + ", ".join(run.label for run in runs) + " over training steps"
    return Chart("training", alt, panels, columns=3)
