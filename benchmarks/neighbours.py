"""Table, verdicts and figure of docs/neighbours.md, and the stored answers that its plan needs.

    python benchmarks/neighbours.py collect          # rollouts and traces, once per task and seed
    effopd compare recipes/compare-neighbours.yaml
    python benchmarks/neighbours.py rewards          # dGRPO, which `effopd rl` trains
    python benchmarks/neighbours.py page --runs runs/compare-neighbours --figure

`--plan recipes/compare-neighbours-wide.yaml` does the same with a teacher of another size.
`page --runs` writes the plan's finished runs to its file in docs/neighbours (`PARTS`). `page` makes
the tables and figures of all files that exist. Only the blocks between markers are generated
(`pages.py`).

A method is judged at its best learning rate, against plain OPD at its best learning rate, by the
cost to reach the `TARGETS`. Best are the rates with the most seeds, and among these the one that
reaches the target on the most seeds, then first. The rule is the same for plain OPD.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neighbour_runs import DGRPO, Wanted, collect, results_of, reward
from pages import DOCS, rewrite

from effopd.common.files import write_atomically
from effopd.compare.axes import axis_name, cost_on
from effopd.compare.cross_targets import runs_of
from effopd.compare.envelope import Envelope
from effopd.compare.grid import load_grid
from effopd.compare.grid_run import Arm, GridRun
from effopd.compare.paired import SeedMedian, median_with_interval, ratio
from effopd.report.compare_lookup import table, times
from effopd.report.style import MUTED, group_colors, quiet_style, save

PLACE = DOCS / "neighbours"
RECIPES = Path(__file__).parents[1] / "recipes"
#: Shares of the KL at step 0 that a method has to reach; verdicts and figure are for the first.
TARGETS = (0.1, 0.05)
#: Figure: ticks, and the place of a method that never reaches the target.
TICKS, NEVER = (0.25, 0.5, 1, 2, 4), 0.125
#: Figure: colors without and with the look-ahead.
COLORS = group_colors(("plain", "newton_search"))
#: Suffix of an arm with the look-ahead; plain OPD with it has a name of its own.
NEWTON = "+newton"
AXES = ("seconds", "generated_tokens", "teacher_tokens", "student_backward_tokens")


class Part(NamedTuple):
    """A part of the page: its plan, the file of its runs, its figure, and its generated blocks."""

    plan: str
    file: str
    figure: str
    blocks: tuple[str, ...]
    prefix: str = ""

    def page(self) -> Page | None:
        """The part's tables and figure; `None` as long as the file of its runs does not exist."""
        path = PLACE / self.file
        return Page(json.loads(path.read_text())) if path.is_file() else None

    def texts(self) -> dict[str, str]:
        """Name of each block → its text; empty without a file."""
        if (page := self.page()) is None:
            return {}
        blocks = page.blocks()
        return {self.prefix + name: blocks[name] for name in self.blocks}


PARTS = (
    Part(
        "compare-neighbours", "results.json", "costs.png",
        ("coverage", "methods", "costs", "final", "rates", "verdicts"),
    ),
    Part(
        "compare-neighbours-wide", "other_teacher.json", "costs-other-teacher.png",
        ("verdicts", "coverage", "costs", "final", "rates"), "other teacher, ",
    ),
)  # fmt: skip


class Method(NamedTuple):
    """A method of the page: its arm, its name, its arXiv id, and when it is worth it."""

    arm: str
    name: str
    paper: str
    when: str


METHODS = (
    Method("plain", "full reverse KL", "2605.11739", "the teacher's logits are at hand"),
    Method("forward_kl", "forward KL (β = 0)", "2604.00626", "the student must cover all of the teacher's answers"),
    Method("jsd", "Jensen–Shannon (β = 0.5)", "2604.00626", "between the two KLs; nothing else speaks for it"),
    Method("teacher_top_k", "Revisiting OPD", "2603.25562", "the teacher sends its top K only, or V is large"),
    Method("sampled", "sampled token", "2605.11739", "the teacher sends one number per token"),
    Method("vopd", "vOPD", "2605.07865", "a backward pass over the vocabulary is too expensive"),
    Method("optimal_baseline", "optimal baseline", "", "as vOPD; smallest variance of the logit gradient"),
    Method("samples_8", "8 samples per prefix", "2606.24143", "the teacher scores chosen tokens cheaply"),
    Method("negative_advantage", "fixed negative advantage", "2608.31046", "a control: no teacher"),
    Method("opsa", "OPSA", "2608.31046", "a control: no teacher; the advantage grows with the entropy"),
    Method(DGRPO, "dGRPO", "2605.12227", "answers are verified and reward matters as well as the teacher"),
    Method("esr", "ESR", "2605.27028", "sampling dominates the cost, and the KL is in the first tokens"),
    Method("esr_whole", "ESR, a quarter whole", "1905.07006", "as ESR, and part of the KL comes later"),
    Method("prune", "Prune-OPD", "2605.07804", "long answers leave the teacher's support"),
    Method("clpd", "CLPD", "2605.11260", "teachers of several strengths exist"),
    Method("easy_first", "CLPD, order of prompts alone", "2605.11260", "difficulty varies much within the prompts"),
    Method("lmbda_0.5", "GKD mixing, λ = 0.5", "2306.13649", "traces exist already and sampling is expensive"),
    Method("mixed_0.2", "MiniLLM's sampling, α = 0.2", "2306.08543", "a weak student's own answers teach little"),
    Method("lightning", "Lightning OPD", "2604.13010", "the teacher does not fit beside the student"),
    Method("lightning_2", "Lightning OPD 2.0", "2607.28449", "another model wrote the supervised data of the student"),
    Method("discord", "DisCorD", "2605.14071", "a warm-up from a teacher that only sends text with log-probabilities"),
)


class Page:
    """Blocks of the page.

    Args:
        results: content of a part's file.
    """

    def __init__(self, results: Mapping[str, Any]):
        self.runs = runs_of(results)
        self.tasks = list(dict.fromkeys(run.task for run in self.runs))
        self.planned = results["settings"].get("planned_runs")
        self.teacher = results["settings"].get("base", {}).get("teacher_model_name_or_path")
        names = {run.strategy for run in self.runs}
        self.methods = [method for method in METHODS if names.intersection(_pair(method.arm))]
        self._envelopes: dict[tuple[str, str], Envelope] = {}

    def of(self, task: str, strategy: str) -> list[GridRun]:
        """Runs of a strategy on a task."""
        return [run for run in self.runs if (run.task, run.strategy) == (task, strategy)]

    def best(self, task: str, strategy: str, share: float | None = None) -> Arm | None:
        """The strategy's best learning rate, among those with the most seeds; `None`: no runs.

        Args:
            share: by the number of seeds that reach this share of the starting KL, then by their
                median net seconds to it, then by the median final KL; default: by the last alone.
        """
        arms: dict[Arm, list[GridRun]] = {}
        for run in self.of(task, strategy):
            arms.setdefault(run.arm, []).append(run)
        most = max(map(len, arms.values()), default=0)
        envelope = self.envelope(task, "seconds")

        def rank(arm: Arm) -> tuple[int, float, float]:
            final = statistics.median(map(_end, arms[arm]))
            costs = [envelope.cost(arm, run.seed, share) for run in arms[arm]] if share else [0.0]
            return sum(map(math.isinf, costs)), statistics.median(costs), final

        return min((arm for arm in arms if len(arms[arm]) == most), key=rank, default=None)

    def envelope(self, task: str, axis: str) -> Envelope:
        """Plain OPD at its best rates on a task, by an axis."""
        key = task, axis
        if key not in self._envelopes:
            self._envelopes[key] = Envelope([run for run in self.runs if run.task == task], ("plain",), axis)
        return self._envelopes[key]

    def speedup(self, task: str, strategy: str, axis: str, share: float) -> SeedMedian | None:
        """Cost of plain OPD to a target / cost of the method; paired by seed, best rate of each."""
        arm, plain = self.best(task, strategy, share), self.best(task, "plain", share)
        envelope = self.envelope(task, axis)
        if arm is None or plain is None:
            return None
        pairs = ((envelope.cost(plain, seed, share), envelope.cost(arm, seed, share)) for seed in envelope.seeds)
        known = [pair for pair in pairs if not any(map(math.isnan, pair))]
        ratios = [ratio(*(None if math.isinf(cost) else cost for cost in pair)) for pair in known]
        return median_with_interval(ratios)

    # -- blocks ------------------------------------------------------------------------------------

    def final_table(self) -> str:
        """Per method, without and with newton_search: final KL, accuracy and costs of a run."""
        rows = []
        for task in self.tasks:
            for method in METHODS:
                for strategy in _pair(method.arm):
                    arm = self.best(task, strategy)
                    if arm is not None:
                        runs = [run for run in self.of(task, strategy) if run.arm == arm]
                        rows.append(self._final_row(task, method, strategy, runs))
        head = ["task", "method", "look-ahead", "rate", "seeds", "KL at the end", "accuracy"]
        return table([*head, *(axis_name(axis) for axis in AXES)], rows)

    def _final_row(self, task: str, method: Method, strategy: str, runs: Sequence[GridRun]) -> list[str]:
        ends = [run.evaluations[-1] for run in runs]
        costs = [[cost_on(end, axis) for end in ends] for axis in AXES]
        return [
            task.split(":")[1], method.name, "" if strategy == method.arm else "newton_search",
            f"{runs[0].learning_rate:.1e}", str(len(runs)), f"{statistics.median(map(_end, runs)):.4f}",
            f"{statistics.median(end.accuracy or 0.0 for end in ends):.2f}",
            *(f"{statistics.median(each):,.0f}" if None not in each else "–" for each in costs),
        ]  # fmt: skip

    def cost_table(self) -> str:
        """Speed-up to the targets over tuned plain OPD, by axis, and the verdict."""
        rows = []
        for task in self.tasks:
            for method in METHODS:
                for strategy in _pair(method.arm):
                    if strategy != "plain" and self.of(task, strategy):
                        ahead = "" if strategy == method.arm else "newton_search"
                        rows += [
                            [
                                task.split(":")[1],
                                method.name,
                                ahead,
                                f"{share:.0%}",
                                *self._cost_cells(task, strategy, share),
                            ]
                            for share in TARGETS
                        ]
        head = ["task", "method", "look-ahead", "KL", *(axis_name(axis) for axis in AXES), "verdict"]
        return table(head, rows)

    def _cost_cells(self, task: str, strategy: str, share: float) -> list[str]:
        found = [self.speedup(task, strategy, axis, share) for axis in AXES]
        speeds = [each for each in found if each is not None]
        return [*(times(each.to_row()) for each in speeds), verdict(speeds)]

    def method_table(self) -> str:
        """Every method: its paper, when it is worth it, and the number of its runs."""
        rows = []
        for method in METHODS:
            plain, ahead = (sum(run.strategy == name for run in self.runs) for name in _pair(method.arm))
            link = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else "ours"
            runs = f"{plain} + {ahead}" if plain + ahead else "none yet"
            rows.append([method.name, link, method.when, runs])
        return table(["method", "paper", "worth trying if", "runs without + with look-ahead"], rows)

    def coverage(self) -> str:
        """Which of the planned runs exist."""
        planned = f" of {self.planned} planned" if self.planned else ""
        arms = Counter((run.task, *run.arm) for run in self.runs)
        seeds = Counter(arms.values())
        parts = ", ".join(f"{count} with {n} seed{'s' * (n > 1)}" for n, count in sorted(seeds.items(), reverse=True))
        return (
            f"{len(self.runs)}{planned} runs exist: {len(arms)} combinations of task, method and learning rate, "
            f"{parts}. A verdict from fewer than three seeds is a single observation."
        )

    def rates_table(self) -> str:
        """Final KL of seed 0 at every learning rate that was run."""
        rates = sorted({run.learning_rate for run in self.runs})
        rows = []
        for task in self.tasks:
            for method in METHODS:
                for strategy in _pair(method.arm):
                    finals = {run.learning_rate: _end(run) for run in self.of(task, strategy) if run.seed == 0}
                    if finals:
                        ahead = "" if strategy == method.arm else "newton_search"
                        cells = [f"{finals[rate]:.4f}" if rate in finals else "" for rate in rates]
                        rows.append([task.split(":")[1], method.name, ahead, *cells])
        return table(["task", "method", "look-ahead", *(f"{rate:.1e}" for rate in rates)], rows)

    def verdict_table(self) -> str:
        """One line per method: speed-up in seconds, final KL over plain OPD's, and the verdict."""
        rows = []
        for method in METHODS:
            for strategy in _pair(method.arm):
                cells, texts = [], {}
                for task in self.tasks:
                    found = [self.speedup(task, strategy, axis, TARGETS[0]) for axis in AXES]
                    speeds = [each for each in found if each is not None]
                    if not speeds:
                        cells += ["", ""]
                        continue
                    cells += [times(speeds[0].to_row()), self._final_ratio(task, strategy)]
                    texts[task.split(":")[1]] = verdict(speeds)
                if strategy == "plain" or not texts:
                    continue
                one = len(set(texts.values())) == 1
                text = next(iter(texts.values())) if one else "; ".join(f"{k}: {v}" for k, v in texts.items())
                name = method.name if strategy == method.arm else f"{method.name} + newton_search"
                rows.append([name, *cells, text, method.when])
        heads = [head for task in self.tasks for head in (task.split(":")[1], "KL over plain's")]
        return table(["method", *heads, "verdict", "worth trying if"], rows)

    def _final_ratio(self, task: str, strategy: str) -> str:
        """Final KL over plain OPD's, each at the rate with the smallest one; paired by seed."""
        arm, plain = self.best(task, strategy), self.best(task, "plain")
        base = {run.seed: _end(run) for run in self.of(task, "plain") if run.arm == plain}
        pairs = [_end(run) / base[run.seed] for run in self.of(task, strategy) if run.arm == arm and run.seed in base]
        if not pairs:
            return ""
        spread = f" ({min(pairs):.2f} to {max(pairs):.2f})" if len(pairs) > 1 else ""
        return f"{statistics.median(pairs):.2f}{spread}"

    def blocks(self) -> dict[str, str]:
        """All blocks by name."""
        return {
            "coverage": self.coverage(), "methods": self.method_table(), "costs": self.cost_table(),
            "final": self.final_table(), "rates": self.rates_table(), "verdicts": self.verdict_table(),
        }  # fmt: skip

    # -- figure ------------------------------------------------------------------------------------

    def draw(self, path: Path) -> None:
        """Speed-up to the target by method: net seconds and teacher tokens, one row per task."""
        import matplotlib.pyplot as plt

        axes = ("seconds", "teacher_tokens")
        height = 1.5 + (0.5 + 0.15 * len(self.methods)) * len(self.tasks)
        with quiet_style():
            figure, panels = plt.subplots(
                len(self.tasks), len(axes), figsize=(11, height), squeeze=False, sharey=True,
                constrained_layout=True,
            )  # fmt: skip
            for row, task in zip(panels, self.tasks, strict=True):
                for panel, axis in zip(row, axes, strict=True):
                    self._bars(panel, task, axis)
            panels[0][0].legend(loc="lower right")
            title = f"Cost to {TARGETS[0]:.0%} of the starting KL: tuned plain OPD / method, teacher {self.teacher}"
            note = "Best of the learning rates that were run; median over seeds. A cross: the method never reaches it."
            save(figure, path, title, note)

    def _bars(self, panel: Any, task: str, axis: str) -> None:
        names = [method.name for method in self.methods]
        labels = ("without look-ahead", COLORS["plain"]), ("newton_search", COLORS["newton_search"])
        for offset, (label, color) in enumerate(labels):
            for place, method in enumerate(self.methods):
                found = self.speedup(task, _pair(method.arm)[offset], axis, TARGETS[0])
                if found is None or not found.n:
                    continue
                y, reached = place + 0.3 * (offset - 0.5), 0 < found.median < math.inf
                marker = "o" if reached else "x"
                panel.plot(
                    found.median if reached else NEVER, y, marker, color=color, markersize=7, label=label,
                    linestyle="none",
                )  # fmt: skip
                label = "_"
        panel.axvline(1, color=MUTED, linewidth=1)
        panel.set(xscale="log", xlabel=f"speed-up in {axis_name(axis)}", yticks=range(len(names)), yticklabels=names)
        panel.set(ylim=(len(names) - 0.5, -0.5), xlim=(NEVER / 1.2, TICKS[-1] * 1.2))
        panel.set_xticks((NEVER, *TICKS), ["never", *(f"{tick:g}×" for tick in TICKS)])
        panel.minorticks_off()
        panel.set_title(task, loc="left")


def verdict(speeds: Sequence[SeedMedian]) -> str:
    """Verdict from the speed-ups on `AXES`: by net seconds first, then by tokens.

    With three seeds or more, the range over seeds must be on one side of 1; with fewer, the verdict
    says so.
    """
    seconds, *tokens = speeds
    sure = seconds.n >= 3
    gains = [axis_name(axis) for axis, each in zip(AXES[1:], tokens, strict=True) if _gains(each)]
    if not seconds.n:
        text = "neither reaches the target"
    elif seconds.median == 0:
        text = "no: does not reach the target"
    elif (seconds.low if sure else seconds.median) > 1:
        text = "yes"
    elif gains:
        text = "for tokens only" if len(gains) == len(tokens) else f"for {' and '.join(gains)} only"
    else:
        text = "no difference shown" if sure and seconds.low <= 1 <= seconds.high else "no"
    return text if sure else f"{text} (few seeds)"


def _gains(speed: SeedMedian) -> bool:
    """Whether the speed-up is at least 1.25, for all seeds if there are three."""
    return bool(speed.n) and (speed.low if speed.n >= 3 else speed.median) >= 1.25


def _pair(arm: str) -> tuple[str, str]:
    """Strategy without and with the look-ahead."""
    return arm, "newton_search" if arm == "plain" else arm + NEWTON


def _end(run: GridRun) -> float:
    """Held-out KL at the end: median of the last three evaluations."""
    return statistics.median(e.kl for e in run.evaluations[-3:] if e.kl is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["collect", "rewards", "page"])
    parts = {part.plan: part for part in PARTS}
    parser.add_argument(
        "--plan", type=Path, default=RECIPES / f"{PARTS[0].plan}.yaml",
        help=f"recipes/NAME.yaml, where NAME is {' or '.join(parts)}; default: the first",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=Path, help="page: folder of the plan's grid, to write its runs to docs/neighbours"
    )
    parser.add_argument("--figure", action="store_true", help="page: redraw the figures in docs/neighbours")
    parser.add_argument("--seeds", type=int, nargs="+", help="collect, rewards: only these seeds")
    parser.add_argument("--tasks", nargs="+", help="collect, rewards: only these tasks")
    parser.add_argument("--rates", type=float, nargs="+", help="rewards: only these learning rates")
    arguments = parser.parse_args()
    if arguments.plan.stem not in parts:
        parser.error(
            f"--plan {arguments.plan}: expected one of {', '.join(f'recipes/{name}.yaml' for name in parts)}."
        )
    if arguments.what != "page":
        make = collect if arguments.what == "collect" else reward
        make(load_grid(arguments.plan), Wanted(arguments.seeds, arguments.tasks, arguments.rates))
        return
    if arguments.runs is not None:
        results = results_of(load_grid(arguments.plan, output_dir=str(arguments.runs)))
        file = PLACE / parts[arguments.plan.stem].file
        write_atomically(file, lambda path: path.write_text(json.dumps(results) + "\n"))
    for part in PARTS:
        rewrite(DOCS / "neighbours.md", part.texts())
        if arguments.figure and (page := part.page()):
            page.draw(PLACE / part.figure)


if __name__ == "__main__":
    main()
