"""Tables and figures of docs/real_model.md, from the JSON files in docs/real_model/.

    effopd compare --report runs/compare-smollm2 --out docs/real_model
    effopd compare --report runs/compare-smollm2-tuned --out docs/real_model/tuned \\
        --prices recipes/prices/1.7b-8b-1xh100.yaml
    cp runs/smollm2/chain_sum/sft/card.json docs/real_model/chain_sum-sft.json     # products, too
    .venv/bin/effopd eval --model runs/smollm2/chain_sum/teacher --eval_size 200 --batch_size 50 \\
        --output runs/smollm2/chain_sum/eval.jsonl
    cp runs/smollm2/chain_sum/eval.summary.json docs/real_model/chain_sum-teacher.json
    .venv/bin/python benchmarks/real_model.py            # rewrite the tables
    .venv/bin/python benchmarks/real_model.py --figure   # redraw docs/real_model/curves.png too

Only the blocks between markers are generated (`pages.py`); the rest is written by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from batch_size import searches_table
from pages import DOCS, rewrite
from rivals import costs, costs_table, hindsight_table, opening, steps_table

from effopd.compare.cross_targets import runs_of
from effopd.compare.envelope import Envelope
from effopd.compare.grid_run import AXES, Arm, GridRun
from effopd.compare.time_to_target import smooth
from effopd.report.compare_lookup import AXIS_NAMES, table, times
from effopd.report.style import group_colors, quiet_style, save

PLACE = DOCS / "real_model"
STEPS = (6, 12, 18, 24)
#: The same for the comparison with tuned rivals.
TUNED_STEPS = (6, 12, 18, 24, 30)
#: Targets of the tables, as shares of the KL at step 0.
SHARES = (0.5, 0.25, 0.1, 0.05)
#: Runs without look-ahead; the best-tuned of their arms is the opponent. A plan can name others.
BASELINES = ("plain", "plain-beta2", "plain-cosine", "topd")
#: Figure: dash of a learning rate by its order.
DASHES = ("-", "--", "-.", ":", (0, (1, 3)))


class Page:
    """Blocks of the page.

    Args:
        results: content of results.json.
        steps: steps of the tables of the KL.
    """

    def __init__(self, results: Mapping[str, Any], steps: Sequence[int] = STEPS):
        self.steps = steps
        self.runs = runs_of(results)
        self.baselines = results["settings"].get("baselines") or BASELINES
        self.tasks = list(dict.fromkeys(run.task for run in self.runs))
        order = {strategy: place for place, strategy in enumerate(results["settings"]["strategies"])}
        self.arms = sorted({run.arm for run in self.runs}, key=lambda arm: (order[arm[0]], arm[1]))

    def of(self, task: str, arm: Arm | None = None) -> list[GridRun]:
        """Runs of a task, of one arm or of all."""
        return [run for run in self.runs if run.task == task and arm in (None, run.arm)]

    def kl_table(self) -> str:
        """Held-out KL during training, accuracy, net seconds and the searches' share."""
        rows = []
        for task in self.tasks:
            for arm in self.arms:
                runs = self.of(task, arm)
                if runs:
                    ends = [run.evaluations[-1] for run in runs]
                    rows.append([
                        task.split(":")[1], *_names(arm), str(len(runs)),
                        *(_spread([_kl(run, step) for run in runs], ".3f") for step in (0, *self.steps)),
                        _spread([end.accuracy for end in ends], ".2f"),
                        _spread([end.costs.net_seconds for end in ends], ".0f"),
                        _spread([100 * run.search_share() for run in runs], ".0f"),
                    ])  # fmt: skip
        head = ["task", "strategy", "learning rate", "seeds", "start", *(f"step {step}" for step in self.steps)]
        return table([*head, "accuracy at the end", "net seconds", "search, %"], rows)

    def speed_table(self, axis: str) -> str:
        """Speed-up over the best-tuned run without look-ahead, by target."""
        rows = []
        for task in self.tasks:
            envelope = Envelope(self.of(task), self.baselines, axis)
            for arm in self.arms:
                if self.of(task, arm):
                    speeds = [times(envelope.speedup(arm, share).to_row()) for share in SHARES]
                    rows.append([task.split(":")[1], *_names(arm), *speeds])
        head = ["task", "strategy", "learning rate", *(f"to {share:.0%} of the starting KL" for share in SHARES)]
        return table(head, rows)

    def opponents(self) -> str:
        """Best-tuned run without look-ahead per target and seed."""
        rows = []
        for task in self.tasks:
            envelope = Envelope(self.of(task), self.baselines)
            for share in SHARES:
                found = [envelope.opponent(seed, share) for seed in envelope.seeds]
                arms = ["–" if arm is None else " ".join(_names(arm)) for arm in found]
                rows.append([task.split(":")[1], f"{share:.0%}", *arms])
        seeds = sorted({run.seed for run in self.runs})
        return table(["task", "target", *(f"seed {seed}" for seed in seeds)], rows)

    def search_table(self) -> str:
        """Accepted scale by step of every run that jumped."""
        rows = []
        for task in self.tasks:
            for arm in self.arms:
                for run in self.of(task, arm):
                    if run.searches.count:
                        jumps = ", ".join(f"{step}: {scale:+.3g}" for step, scale in run.searches.accepted) or "none"
                        rows.append([task.split(":")[1], *_names(arm), str(run.seed), str(run.searches.count), jumps])
        return table(["task", "strategy", "learning rate", "seed", "searches", "step: accepted scale"], rows)

    def blocks(self) -> dict[str, str]:
        """All blocks of the comparison by name."""
        speed = {f"speed-up in {AXIS_NAMES[axis]}": self.speed_table(axis) for axis in AXES}
        return {
            "KL during training": self.kl_table(), **speed, "tuned rates": self.opponents(),
            "searches": self.search_table(),
        }  # fmt: skip

    def draw(self) -> None:
        """Held-out KL, as a share of its start, against steps and net seconds."""
        import matplotlib.pyplot as plt

        with quiet_style():
            figure, axes = plt.subplots(
                len(self.tasks), 2, figsize=(11, 4 * len(self.tasks)), squeeze=False, constrained_layout=True
            )
            for panels, task in zip(axes, self.tasks, strict=True):
                for axis, key in zip(panels, ("optimizer steps", "net seconds"), strict=True):
                    for arm in self.arms:
                        if self.of(task, arm):
                            self._line(axis, task, arm, key)
                    axis.set(yscale="log", xlabel=key)
                    axis.set_title(task, loc="left")
                panels[0].set_ylabel("held-out reverse KL, share of its start")
            axes[0][0].legend(ncols=2)
            title = "SmolLM2-135M, 16 rollouts per step: held-out KL to the teacher"
            note = "Median over each arm's seeds, which differ (see the table); running median of three evaluations."
            save(figure, PLACE / "curves.png", title, note)

    def _line(self, axis: Any, task: str, arm: Arm, key: str) -> None:
        runs = self.of(task, arm)
        x = [[e.step if key == "optimizer steps" else e.costs.net_seconds for e in run.evaluations] for run in runs]
        kl = [smooth([e.kl / run.evaluations[0].kl for e in run.evaluations]) for run in runs]
        length = min(map(len, kl))
        rates = [rate for strategy, rate in self.arms if strategy == arm[0]]
        colors = group_colors(dict.fromkeys(name for name, _ in self.arms))
        axis.plot(
            np.median([row[:length] for row in x], axis=0), np.median([row[:length] for row in kl], axis=0),
            color=colors[arm[0]], linestyle=DASHES[rates.index(arm[1]) % len(DASHES)],
            linewidth=1.5, label=f"{arm[0]} {arm[1]:.0e}",
        )  # fmt: skip


def tuned_blocks(results: Mapping[str, Any]) -> dict[str, str]:
    """Blocks of the comparison with tuned rivals.

    Args:
        results: content of tuned/results.json.
    """
    blocks = {
        "tuned, KL": Page(results, TUNED_STEPS).kl_table(),
        "tuned, steps": steps_table(results, SHARES),
        "tuned, seconds": costs_table(results, costs()["net seconds"], SHARES),
        "tuned, searches": searches_table(results, opening(results), SHARES),
    }
    for rollouts, large in ((16, False), (32, True)):
        runs = [run for run in results["runs"] if run["strategy"].endswith("-32") == large]
        blocks[f"tuned, {rollouts} rollouts"] = hindsight_table({**results, "runs": runs}, SHARES)
    return blocks


def pairs_table(cards: Mapping[str, Mapping[str, Any]], teachers: Mapping[str, Mapping[str, Any]]) -> str:
    """Sampled accuracies of the student, the supervised start and the GRPO teacher.

    Args:
        cards: `card.json` of `effopd testbed sft`, by task.
        teachers: summary of `effopd eval` of the teachers made by GRPO, by task.
    """
    rows = []
    for task, card in cards.items():
        before, after = (_accuracy(card["accuracy"][when]) for when in ("before", "after"))
        teacher = teachers.get(task)
        interval = None if teacher is None else [teacher[key] for key in ("avg@1", "ci95_low", "ci95_high")]
        last = "–" if interval is None else _accuracy(dict(zip(("mean", "low", "high"), interval, strict=True)))
        rows.append([task, before, after, last, str(card["accuracy"]["before"]["n"])])
    return table(["task", "student", "supervised start", "after GRPO", "questions"], rows)


def _accuracy(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _names(arm: Arm) -> tuple[str, str]:
    return f"`{arm[0]}`", f"{arm[1]:.0e}"


def _kl(run: GridRun, step: int) -> float:
    """Held-out KL at a step; NaN if the run was not evaluated there."""
    return next((e.kl for e in run.evaluations if e.step == step), float("nan"))


def _spread(values: Sequence[float], form: str) -> str:
    """Median with the range over seeds: `0.52 (0.50–0.55)`; – if one is missing."""
    if any(map(math.isnan, values)):
        return "–"
    texts = [f"{value:{form}}" for value in (statistics.median(values), min(values), max(values))]
    return texts[0] if texts[1] == texts[2] else f"{texts[0]} ({texts[1]}–{texts[2]})"


def _json(name: str) -> dict[str, Any]:
    return json.loads((PLACE / name).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", action="store_true", help="redraw docs/real_model/curves.png")
    arguments = parser.parse_args()
    page = Page(_json("results.json"))
    tasks = ("chain_sum", "products")
    cards = {task: _json(f"{task}-sft.json") for task in tasks}
    teachers = {task: _json(f"{task}-teacher.json") for task in tasks if (PLACE / f"{task}-teacher.json").exists()}
    rewrite(
        DOCS / "real_model.md",
        {"pairs": pairs_table(cards, teachers), **page.blocks(), **tuned_blocks(_json("tuned/results.json"))},
    )
    if arguments.figure:
        page.draw()


if __name__ == "__main__":
    main()
