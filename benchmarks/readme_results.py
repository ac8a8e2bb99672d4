"""The README's results, from `docs/results.json`, `docs/final_quality.json` and `docs/ablation/results.json`.

    effopd compare --report runs/compare --out docs
    effopd compare --report runs/compare-ablation --out docs/ablation
    .venv/bin/python benchmarks/readme_results.py

Rewrites the section "How much faster" of README.md; a test asks that it is what this command writes.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from effopd.report.compare_lookup import Lookup, number, table, times

ROOT = Path(__file__).parents[1]
START, END = "## How much faster", "## Install"
CHAIN, SPELL = "testbed:chain_sum", "testbed:spell_backward"


def factor(look: Lookup, rate: float) -> str:
    """A learning rate as a multiple of the reference."""
    return f"×{rate / look.reference:.2g}"


def section(results: dict, final: list[dict], ablation: dict) -> str:
    """The section, with its heading."""
    look = Lookup(results)
    reference = look.reference

    def fast(task: str, strategy: str, rate: float = reference, to: str | None = None, axis: str = "seconds") -> str:
        return times(look.speedup(task, (strategy, rate), axis, rate=to))

    def best(task: str, target: str = "reference_kl") -> float:
        rate = look.best(task, target)
        assert rate is not None
        return rate

    rates = sorted({rate for strategy, rate in look.arms if strategy == "lookahead"})

    def anywhere(task: str, target: str = "reference_kl") -> str:
        rows = [look.speedup(task, ("lookahead", rate), "seconds", target, rate="best") for rate in rates]
        medians = [row["median"] for row in rows if row]
        return f"{min(medians):.2f}–{max(medians):.2f}×"

    def ends(task: str, strategy: str) -> dict[float, float]:
        """Median final KL of a strategy by learning rate, on the many answers of `final_quality.py`."""
        own = [row for row in final if (row["task"], row["strategy"]) == (task, strategy)]
        return {
            rate: statistics.median(row["kl"] for row in own if row["learning_rate"] == rate)
            for rate in sorted({row["learning_rate"] for row in own})
        }

    def final_kls(task: str) -> str:
        ours, plain = ends(task, "lookahead"), ends(task, "vanilla")
        lowest = min(plain, key=lambda rate: plain[rate])
        return (
            f"`{task.split(':')[1]}`: {min(ours.values()):.4f}–{max(ours.values()):.4f} from every start, plain OPD {plain[lowest]:.4f} "
            f"at {factor(look, lowest)} and {min(v for r, v in plain.items() if r != lowest):.4f}–{max(plain.values()):.4f} at its other rates"
        )

    rows = [
        [
            label,
            f"`{task.split(':')[1]}`",
            str(len(look.runs(task, (strategy, reference)))),
            *(fast(task, strategy, axis=axis) for axis in ("steps", "seconds", "forward_tokens")),
            fast(task, strategy, to="best"),
        ]
        for strategy, label in (("effopd", "`effopd`, the paper's search"), ("lookahead", "**`lookahead`, ours**"))
        for task in (CHAIN, SPELL)
    ]
    noise = [row["first_accepted"] for row in results["gate_noise"]]
    seeds = {len({r["seed"] for r in final if (r["task"], r["learning_rate"], r["strategy"]) == arm})
             for arm in {(r["task"], r["learning_rate"], r["strategy"]) for r in final}}  # fmt: skip
    ninety = {task: factor(look, best(task, "gap_90")) for task in (CHAIN, SPELL)}
    way_there = (
        f"{ninety[CHAIN]} on both tasks" if ninety[CHAIN] == ninety[SPELL] else f"{ninety[CHAIN]} and {ninety[SPELL]}"
    )
    done, planned = len(results["runs"]), results["settings"]["planned_runs"]
    few = "" if done == planned else f" ({done} of {planned} planned runs so far, with n beside every figure)"
    steps = results["settings"]["base"]["max_steps"]
    tuned = {
        task: f"{fast(task, 'vanilla', best(task))} (`{task.split(':')[1]}`, {factor(look, best(task))})"
        for task in (CHAIN, SPELL)
    }
    return f"""{START}

How much sooner a run gets to the held-out exact reverse KL at which plain OPD ends after {steps} steps at the same learning rate. Medians over seeds, paired by seed, with 95 % bootstrap intervals (of five seeds: their range); “never” counts as slower than any. Search is charged, evaluation is not. `chain_sum` and `spell_backward` are toy tasks
of reasoning-gym; the reference learning rate is {reference:.0e}, ×3 means {3 * reference:.0e}; forward tokens are all that go through a model besides sampling.

{table(["strategy", "task", "seeds", "steps", "net seconds", "forward tokens", "net seconds, against plain OPD at its best rate"], rows)}

![learning rates](docs/results/learning_rates.png)

- **The learning rate matters more than the paper's search.** At the best of its rates plain OPD itself is {tuned[CHAIN]} and {tuned[SPELL]} faster than at the reference rate. EffOPD from the reference rate falls off the target again later, in {look.again(CHAIN, ("effopd", reference)).split(" ")[0]} and {look.again(SPELL, ("effopd", reference)).split(" ")[0]} of the evaluations.
- **`lookahead` makes the sweep unnecessary.** Started anywhere in a {rates[-1] / rates[0]:.0f}× range of learning rates ({factor(look, rates[0])} to {factor(look, rates[-1])}) its median is {anywhere(CHAIN)} (`chain_sum`) and {anywhere(SPELL)} (`spell_backward`) the speed of plain OPD at the best rate found by sweeping. To 90 % of the way, where plain OPD's best rate
  is {way_there}, it is {anywhere(CHAIN, "gap_90")} and {anywhere(SPELL, "gap_90")}: no sweep, and no more than that.
- **It ends where a well-tuned run ends.** Final KL on {final[0]["size"]} answers (`benchmarks/final_quality.py`, medians of {min(seeds)}–{max(seeds)} seeds), {final_kls(CHAIN)}; {final_kls(SPELL)}.
- **EffOPD's gate cannot tell a gain from noise.** Where nothing changes, it accepts {min(noise):.0%}–{max(noise):.0%} of searches (`benchmarks/gate_noise.py`). Jumping 2Δ at every trigger without asking (`fixed-k1`) is {fast(CHAIN, "fixed-k1")} on `chain_sum`, where the search is {fast(CHAIN, "effopd")}, and {fast(SPELL, "fixed-k1")} on `spell_backward`, where it is
  {fast(SPELL, "effopd")}.
{parts(ablation)}
The rules of `lookahead` were chosen on these two tasks. [docs/results.md](docs/results.md) has every strategy, learning rate, target and interval{few}; `effopd compare recipes/compare-testbed.yaml` and `recipes/compare-ablation.yaml` run it all, `benchmarks/readme_results.py` writes this section.

"""


def parts(ablation: dict) -> str:
    """What each part of lookahead is worth, in the setting of `recipes/compare-ablation.yaml`."""
    look = Lookup(ablation)
    names = {
        "keep-moments": "Adam's moments kept after a jump",
        "no-steering": "the learning rate not steered",
        "32-rollouts": "scored on all 32 rollouts instead of a quarter",
    }

    def worth(variant: str, rate: float) -> str:
        arm = (f"lookahead-{variant}", rate)
        return " and ".join(
            times(look.speedup(task, arm, "seconds", against="lookahead", rate="same")) for task in look.tasks
        )

    def fast(rate: float, to: str | None = None) -> str:
        return " and ".join(times(look.speedup(task, ("lookahead", rate), "seconds", rate=to)) for task in look.tasks)

    others = sorted(rate for strategy, rate in look.arms if strategy == "lookahead" and rate != look.reference)
    elsewhere = "; ".join(f"from {factor(look, rate)} {fast(rate, 'best')}" for rate in others)

    said = "; ".join(
        f"{text} {worth(name, look.reference)}"
        for name, text in names.items()
        if (f"lookahead-{name}", look.reference) in look.arms
    )
    base = ablation["settings"]["base"]
    shares = " and ".join(
        number(look.quality(task, ("lookahead", look.reference), "search_share_to_target"), ".0%")
        for task in look.tasks
    )
    return (
        f"- **With an eighth of the prompts a step** ({base['per_device_train_batch_size']}; {base['max_steps']} steps) steps are noisier and cheaper: searches take {shares} (`chain_sum` and `spell_backward`, "
        f"in this order all through) of the time to the target. `lookahead` is {fast(look.reference)} as fast as plain OPD at the same rate in net seconds there; as fast as plain OPD at its best of "
        f"{len(ablation['swept'][look.tasks[0]])} rates: from ×1 {fast(look.reference, 'best')}; {elsewhere}. Its speed when one part is changed, relative to itself: {said} "
        f"(all parts: [docs/ablation/results.md](docs/ablation/results.md)).\n"
    )


def rewritten(readme: str, docs: Path = ROOT / "docs") -> str:
    """The README with the section of the results in `docs`."""
    names = ("results.json", "final_quality.json", "ablation/results.json")
    results, final, ablation = (json.loads((docs / name).read_text()) for name in names)
    before, after = readme[: readme.index(START)], readme[readme.index(END) :]
    return before + section(results, final, ablation) + after


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rewritten(readme.read_text()))
