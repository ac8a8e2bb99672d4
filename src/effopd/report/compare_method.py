"""How a comparison was measured: the last section of its page."""

from __future__ import annotations

from collections import Counter

from effopd.report.compare_lookup import Lookup


def method(look: Lookup) -> str:
    """Runs, smoothing, intervals, seconds, machines and software, as a list."""
    settings = look.results["settings"]
    seeds = sorted({run["seed"] for run in look.results["runs"]})
    clocks = {
        "cpu": "CPU seconds of the run's own process, to which other processes on the machine add some per cent (identical work differs by 4 to 5 % here)",
        "wall": "seconds on the clock",
    }
    lines = [
        f"{len(look.results['runs'])} finished runs"
        + (f" of {settings['planned_runs']} planned" if "planned_runs" in settings else "")
        + f", seeds {', '.join(map(str, seeds))}; reference learning rate {look.reference:.3g}.",
        f"Smoothing: trailing median of {settings['smoothing_window']} evaluations. A run's cost is that of its first "
        "evaluation at the target, the baseline's too.",
        "Brackets: 95 % interval, percentile bootstrap of the median over seeds; with five seeds it is their range, which covers "
        "the true median in 93.75 % of cases. Parentheses: the range of fewer seeds (87.5 % with four, 75 % with three, 50 % with "
        "two), no interval. “never”: does not arrive; “> any”: the baseline does not; “–”: nothing to compare.",
        "Search share: search seconds / net seconds, of the whole run and until the target was reached. Off it again: of the "
        "evaluations after the first at the target, how many were not at it. Extra memory: what the look-ahead holds beside the model.",
        "KL area: mean of smoothed KL / KL at step 0 over the baseline's whole budget of the same seed; lower is better.",
    ]
    if "clock" in settings:
        lines.append(
            f"Seconds: {clocks[settings['clock']]}; {settings['workers']} run(s) at a time"
            + (f", {settings['threads']} thread(s) each." if settings.get("threads") else ".")
        )
    lines += _machines(look)
    codes = Counter(run.get("code") or "not recorded" for run in look.results["runs"])
    if len(codes) > 1:
        said = ", ".join(f"{name}: {count} runs" for name, count in codes.items())
        lines.append(f"States of the code that made the runs (hash of the package's source): {said}.")
    for failure in settings.get("failed", []):
        lines.append(f"Failed and left out: {failure}")
    lines.append(
        "Software of this report: " + ", ".join(f"{k} {v}" for k, v in look.results["versions"].items()) + "."
    )
    return "\n".join(f"- {line}" for line in lines)


def _machines(look: Lookup) -> list[str]:
    """How many runs were made on other machines, and the merges that their seconds went through."""
    chains = [run.get("merges", []) for run in look.results["runs"]]
    notes = [note for note in look.results["settings"].get("elsewhere", []) if note["runs"]]
    if not notes:
        return []
    said = "; ".join(
        f"{note['factor']:.3f}" + (f" ({note['low']:.2f}–{note['high']:.2f}, n = {note['n']})" if note["n"] > 1 else "")
        + f" for {note['runs']} runs"
        for note in notes
    )  # fmt: skip
    several = sum(len(chain) > 1 for chain in chains)
    return [
        f"{sum(map(bool, chains))} of the {len(chains)} runs were made on other machines. Their seconds are multiplied by the "
        "ratio of seconds per forward token of runs made on both: the ratio of the run's own task and seed where there is one, "
        f"else the median. Merges, oldest first, with the median and range of the ratios: {said}."
        + (f" {several} runs went through more than one merge." if several else "")
    ]
