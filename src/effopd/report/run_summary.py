"""Summary of runs in words: quality reached, costs, jumps, and time to the first run's final KL."""

from __future__ import annotations

from collections.abc import Sequence

from effopd.compare.time_to_target import final_target, first_evaluation
from effopd.report.run_data import RunRecords
from effopd.runs.records import EvaluationRecord
from effopd.tasks.builtin_models import spoken_name

#: Settings of the models and of the held-out evaluation. Only runs that agree in all of them have
#: comparable KLs.
SAME = (
    "task",
    "task_args",
    "eval_task",
    "eval_task_args",
    "eval_size",
    "task_seed",
    "model_name_or_path",
    "teacher_model_name_or_path",
    "max_completion_length",
    "eval_temperature",
)


def sentences(runs: Sequence[RunRecords]) -> list[str]:
    """One or two sentences per run; for several runs of one task, the speed-ups over the first."""
    found = [text for run in runs for text in (_quality(run), _searches(run)) if text]
    return found + _speedups(runs)


def _quality(run: RunRecords) -> str:
    """Change of the held-out KL and accuracy, with the cost of the run."""
    cost = run.last.costs
    parts = []
    kls = [record for record in run.evaluations if record.kl is not None]
    if len(kls) > 1:
        first, last = kls[0].kl, kls[-1].kl
        assert first is not None and last is not None
        went = "fell" if last < first else "rose"
        parts.append(f"held-out reverse KL {went} from {first:.4g} to {last:.4g} nats per token")
    accuracies = [record for record in run.evaluations if record.accuracy is not None]
    if len(accuracies) > 1:
        first, last = accuracies[0].accuracy, accuracies[-1].accuracy
        assert first is not None and last is not None
        went = "went" if last == first else "rose" if last > first else "fell"
        parts.append(f"accuracy {went} from {first:.3f} to {last:.3f}{_interval(accuracies[-1])}")
    seconds = cost.net_seconds or 0.0
    share = (cost.search_seconds or 0.0) / seconds if seconds else 0.0
    searched = f", {share:.0%} of them in searches" if run.searches else ""
    spent = f"{run.last.step} steps, {seconds:,.1f} net {run.clock}{searched}"
    return f"{run.label}: {'; '.join(parts) or 'no two evaluations yet'} ({spent})."


def _interval(record: EvaluationRecord) -> str:
    if record.accuracy_low is None or record.accuracy_high is None:
        return ""
    return f" [{record.accuracy_low:.3f}, {record.accuracy_high:.3f}]"


def _searches(run: RunRecords) -> str:
    """Number of searches and jumps, and the longest jump."""
    if not run.searches:
        return ""
    jumps = [search for search in run.searches if search.accepted_scale]
    count = f"{len(run.searches)} search{'es' if len(run.searches) != 1 else ''}"
    if not jumps:
        return f"{run.label}: {count}, no jump accepted."
    longest = max(jumps, key=lambda search: search.accepted_scale)
    backward = sum(search.accepted_scale < 0 for search in jumps)
    also = f", {backward} of them backward" if backward else ""
    if longest.accepted_scale <= 0:
        return f"{run.label}: {count}, {len(jumps)} accepted, all backward."
    return (
        f"{run.label}: {count}, {len(jumps)} accepted{also}; the longest jump is "
        f"{longest.accepted_scale:.3g}Δ at step {longest.step}."
    )


def _speedups(runs: Sequence[RunRecords]) -> list[str]:
    """Cost of every other run to the first run's final KL, if they share models and evaluation."""
    measured = {run.label: [record for record in run.evaluations if record.kl is not None] for run in runs}
    if len(runs) < 2 or not all(measured.values()):
        return []
    different = [name for name in SAME if len({_setting(run, name) for run in runs}) > 1]
    if different:
        return [f"Times to a common KL are left out: the runs differ in {', '.join(different)}."]
    first = runs[0]
    target = final_target(measured[first.label])
    reference = first_evaluation(measured[first.label], target)
    if reference is None:
        return [f"Times to a common KL are left out: {first.label} has no finite KL after step 0."]
    found = []
    for run in runs[1:]:
        reached = first_evaluation(measured[run.label], target)
        goal = f"{first.label}'s final KL ({target:.4g}, median of the last three)"
        if reached is None:
            found.append(f"{run.label} did not reach {goal} in {run.last.step} steps.")
            continue
        text = f"{run.label} reached {goal} after {reached.step} steps instead of {reference.step}"
        ours, theirs = reached.costs.net_seconds, reference.costs.net_seconds
        if ours and theirs and first.clock == run.clock:
            text += f", {theirs / ours:.2f}× as fast in net {run.clock}"
        found.append(f"{text}.")
    return [*found, "One run each: these ratios have no interval; `effopd compare` measures them over seeds."]


def _setting(run: RunRecords, name: str) -> str:
    """A setting as text; models by the user's name of them."""
    return spoken_name(str(run.config.get(name)))
