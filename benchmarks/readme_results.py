"""The README's results, from `docs/results.json` and `docs/final_quality.json`.

    effopd compare --report runs/compare --out docs && .venv/bin/python benchmarks/readme_results.py

Rewrites the section "How much faster" of README.md; a test asks that it is what this command writes.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from effopd.report.compare_page import Lookup, table, times

ROOT = Path(__file__).parents[1]
START, END = "## How much faster", "## What the demo prints"
CHAIN, SPELL = "testbed:chain_sum", "testbed:spell_backward"


def section(results: dict, final: list[dict]) -> str:
    """The section, with its heading."""
    look = Lookup(results)
    reference = look.reference

    def fast(task: str, strategy: str, rate: float = reference, to: str | None = None, axis: str = "seconds") -> str:
        return times(look.speedup(task, (strategy, rate), axis, rate=to))

    def best(task: str, target: str = "reference_kl") -> float:
        rate = look.best(task, target)
        assert rate is not None
        return rate

    def factor(rate: float) -> str:
        return f"×{rate / reference:.2g}"

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
            f"at {factor(lowest)} and {min(v for r, v in plain.items() if r != lowest):.4f}–{max(plain.values()):.4f} at its other rates"
        )

    rows = [
        [label, f"`{task.split(':')[1]}`", str(len(look.runs(task, (strategy, reference)))),
         *(fast(task, strategy, axis=axis) for axis in ("steps", "seconds", "generated_tokens"))]
        for strategy, label in (("effopd", "EffOPD, the paper's search"), ("lookahead", "**lookahead, ours**"))
        for task in (CHAIN, SPELL)
    ]  # fmt: skip
    noise = [row["first_accepted"] for row in results["gate_noise"]]
    seeds = {len({r["seed"] for r in final if (r["task"], r["learning_rate"], r["strategy"]) == arm})
             for arm in {(r["task"], r["learning_rate"], r["strategy"]) for r in final}}  # fmt: skip
    ninety = {task: factor(best(task, "gap_90")) for task in (CHAIN, SPELL)}
    way_there = (
        f"{ninety[CHAIN]} on both tasks" if ninety[CHAIN] == ninety[SPELL] else f"{ninety[CHAIN]} and {ninety[SPELL]}"
    )
    done, planned = len(results["runs"]), results["settings"]["planned_runs"]
    few = "" if done == planned else f" ({done} of {planned} planned runs so far, with n beside every figure)"
    tuned = {
        task: f"{fast(task, 'vanilla', best(task))} (`{task.split(':')[1]}`, {factor(best(task))})"
        for task in (CHAIN, SPELL)
    }
    return f"""{START}

Net speed-up to the held-out exact reverse KL at which plain OPD ends after {results["settings"]["base"]["max_steps"]} steps, at the same learning rate: median over seeds, paired by seed, with 95 % bootstrap intervals (of five seeds: their range). Search is charged, evaluation is not.

{table(["strategy", "task", "seeds", "steps", "net seconds", "sampled tokens"], rows)}

![learning rates](docs/results/learning_rates.png)

[docs/results.md](docs/results.md) has every strategy, learning rate, target and interval{few}. `effopd compare recipes/compare-testbed.yaml` runs it, `effopd compare --report runs/compare --out docs` writes the page, `benchmarks/readme_results.py` this section.

- **The learning rate matters more than the paper's search.** At the best of its rates plain OPD itself is {tuned[CHAIN]} and {tuned[SPELL]} faster than at the reference rate; EffOPD from the reference rate
  has {fast(CHAIN, "effopd", to="best")} and {fast(SPELL, "effopd", to="best")} of that speed, and is off the target again later: {look.again(CHAIN, ("effopd", reference)).split(" ")[0]} and {look.again(SPELL, ("effopd", reference)).split(" ")[0]} of the evaluations.
- **`lookahead` makes the sweep unnecessary.** Started anywhere in a {rates[-1] / rates[0]:.0f}× range of learning rates ({factor(rates[0])} to {factor(rates[-1])}) its median is {anywhere(CHAIN)} (`chain_sum`) and {anywhere(SPELL)} (`spell_backward`) the speed of plain OPD at the best rate found by sweeping. To 90 % of the way, where plain OPD's best rate
  is {way_there}, it is {anywhere(CHAIN, "gap_90")} and {anywhere(SPELL, "gap_90")}: no sweep, and no more than that.
- **It ends as low as a well-tuned run, not lower.** Final KL on {final[0]["size"]} answers (`benchmarks/final_quality.py`, medians of {"–".join(map(str, sorted(seeds)))} seeds), {final_kls(CHAIN)}; {final_kls(SPELL)}. The look-ahead's rules were chosen on these two tasks.
- **EffOPD's gate hears mostly noise.** Where nothing changes, it accepts {min(noise):.0%}–{max(noise):.0%} of searches (`benchmarks/gate_noise.py`). Jumping 2Δ at every trigger without asking (`fixed-k1`) is {fast(CHAIN, "fixed-k1")} on `chain_sum` and {fast(SPELL, "fixed-k1")} on `spell_backward`;
  `lookahead` asks the KL itself instead, paired rollout by rollout.

"""


def rewritten(readme: str, docs: Path = ROOT / "docs") -> str:
    """The README with the section of the results in `docs`."""
    results, final = (json.loads((docs / name).read_text()) for name in ("results.json", "final_quality.json"))
    before, after = readme[: readme.index(START)], readme[readme.index(END) :]
    return before + section(results, final) + after


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rewritten(readme.read_text()))
