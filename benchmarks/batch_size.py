"""Is a small batch the better baseline? Both published grids on the targets of the first: docs/batch_size.md.

    .venv/bin/python benchmarks/batch_size.py [--docs docs]

docs/results.json trains on 256 prompts per step, docs/ablation/results.json on 32, with the same models, tasks, seeds and
held-out prompts. Target: the final KL of plain OPD with the large batch at the reference learning rate. Compared with:
`line_search` with the large batch from the reference rate. Nothing is run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from effopd.common.files import write_atomically
from effopd.compare.cross_targets import across, runs_of
from effopd.report.compare_lookup import AXIS_NAMES, factor, table, times

PAGE = "batch_size.md"
STRATEGIES = ("plain", "line_search")


def compared(large: dict[str, Any], small: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of `cross_targets.across` for plain OPD and `line_search` with the small batch, at all their learning rates."""
    reference = large["settings"]["reference_learning_rate"]
    home, other = runs_of(large), runs_of(small)
    arms = sorted(
        {run.arm for run in other if run.strategy in STRATEGIES}, key=lambda arm: (arm[0] != "plain", arm[1])
    )
    rows = across(home, (large["settings"]["baseline"], reference), ("line_search", reference), other, arms)
    return sorted(rows, key=lambda row: arms.index((row["strategy"], row["learning_rate"])))


def page(large: dict[str, Any], small: dict[str, Any]) -> str:
    """docs/batch_size.md."""
    rows, reference = compared(large, small), large["settings"]["reference_learning_rate"]
    sizes = [grid["settings"]["base"]["per_device_train_batch_size"] for grid in (large, small)]
    evals = [grid["settings"]["base"]["eval_steps"] for grid in (large, small)]
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for arm in dict.fromkeys((row["strategy"], row["learning_rate"]) for row in rows):
            own = {
                row["axis"]: row
                for row in rows
                if (row["task"], row["strategy"], row["learning_rate"]) == (task, *arm)
            }
            if own:
                row = own["steps"]
                lines.append([task, f"`{arm[0]}`", factor(arm[1], reference), f"{row['reached']} of {row['n']}"]
                             + [times(own[axis]) for axis in AXIS_NAMES if axis != "steps"])  # fmt: skip
    last = min(row["last_steps"] for row in rows)
    header = ["task", f"strategy, {sizes[1]} prompts", "learning rate", "reached", *list(AXIS_NAMES.values())[1:]]
    return f"""# With {sizes[1]} prompts per step instead of {sizes[0]}

Made by `benchmarks/batch_size.py` from `results.json` and `ablation/results.json`.

How much sooner than `line_search` with {sizes[0]} prompts from ×1 a run with {sizes[1]} prompts gets to the headline target, the held-out KL at which plain OPD
with {sizes[0]} prompts ends at ×1 ({reference:.0e}). Above 1×, the small batch is the cheaper way there.

{table(header, lines)}

- Parentheses: the range of three seeds, no interval.
- The runs with {sizes[1]} prompts end after {last} steps, so "never" says nothing about longer ones.
- The trailing median of three evaluations costs a run one evaluation: {evals[0]} steps of {sizes[0]} prompts, {evals[1]} of {sizes[1]}.
- The seconds of the two grids are not brought to one machine; tokens are exact.
- Forward tokens count a forward of the search like a forward and backward of training, which overcharges the search.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs")
    docs = parser.parse_args().docs
    text = page(*(json.loads((docs / name).read_text()) for name in ("results.json", "ablation/results.json")))
    write_atomically(docs / PAGE, lambda path: path.write_text(text))
    print(text)


if __name__ == "__main__":
    main()
