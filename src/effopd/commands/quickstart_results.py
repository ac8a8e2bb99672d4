"""Results of `effopd quickstart` from the records of its runs: summary, table and figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from effopd.commands.quickstart_settings import AHEAD, ARMS, LABEL_WIDTH, QuickstartArguments
from effopd.common.files import write_atomically
from effopd.common.optional import is_available
from effopd.common.versions import versions
from effopd.compare.time_to_target import Cost, final_target, first_reach, speedup_by_gap
from effopd.report.run_figures import quality_figure
from effopd.report.run_page import write_run_page
from effopd.report.style import quiet_style, save
from effopd.runs.records import read_evaluations, read_searches
from effopd.tasks import builtin_models as testbed


def conclude(root: Path, arguments: QuickstartArguments, console: Console) -> None:
    """Write and print summary, table and figure from the records of all runs, without a model."""
    summary = summarize(root, arguments)
    write_atomically(root / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
    console.print(table_of(summary))
    console.print(speedup_text(summary))
    page = write_run_page([root / arm for arm in ARMS], root / "report.html")
    console.print(f"page:    {page}   every search, with interactive figures")
    if is_available("matplotlib"):
        console.print(f"figure:  {draw_figure(root, summary)}")
    else:
        console.print(escape("figure:  skipped, matplotlib is missing (pip install 'effopd[plots]')"))
    console.print(f"summary: {root / 'summary.json'}   rows: {root}/*/evals.jsonl, searches.jsonl, metrics.jsonl")


def summarize(root: Path, arguments: QuickstartArguments) -> dict[str, Any]:
    """Costs, final values and net speed-ups, from the records of all runs.

    Speed-up = cost of plain OPD / cost of the run, each until the smoothed held-out KL first
    reaches plain OPD's final KL. Plain OPD itself has a speed-up of 1.00×. Net costs include
    searches and exclude evaluations. The top-level `speedup` and `speedup_by_gap_closed` are those
    of the paper's EffOPD.
    """
    runs = {arm: read_evaluations(root / arm) for arm in ARMS}
    target = final_target(runs["plain"])
    summary: dict[str, Any] = {
        "family": arguments.family,
        "seed": arguments.seed,
        "max_steps": arguments.max_steps,
        "prompts_per_step": arguments.prompts_per_step,
        "cost_clock": arguments.cost_clock,
        "versions": versions(),
        "target_kl": target,
    }
    for arm, evaluations in runs.items():
        last, cost = evaluations[-1], Cost.of(evaluations[-1])
        summary[arm] = {
            "steps": cost.steps,
            "seconds": cost.seconds,
            "generated_tokens": cost.generated_tokens,
            "start_kl": evaluations[0].kl,
            "final_kl": final_target(evaluations),
            "final_accuracy": last.accuracy,
            "final_accuracy_ci95": [last.accuracy_low, last.accuracy_high],
        }
    baseline = first_reach(runs["plain"], target)
    for arm in AHEAD:
        searches, reached = read_searches(root / arm), first_reach(runs[arm], target)
        speedup: dict[str, Any] = (
            baseline.ratio(reached)
            if baseline and reached
            else dict.fromkeys(("steps", "seconds", "generated_tokens", "forward_tokens"), None)
        )
        if reached is None:
            speedup["reason"] = (
                f"{ARMS[arm]}'s smoothed held-out KL did not reach plain OPD's final {target:.5f} within "
                f"{arguments.max_steps} steps; its last was {summary[arm]['final_kl']:.5f}."
            )
        summary[arm] |= {
            "accepted_scales": {str(search.step): search.accepted_scale for search in searches},
            "search_seconds": sum(search.seconds for search in searches),
            "search_generated_tokens": sum(search.generated_tokens for search in searches),
            "cost_to_target": vars(reached) if reached else None,
            "speedup": speedup,
            "speedup_by_gap_closed": speedup_by_gap(runs["plain"], runs[arm]),
        }
    return summary | {name: summary["effopd"][name] for name in ("speedup", "speedup_by_gap_closed")}


def table_of(summary: dict[str, Any]) -> Table:
    """One row per run, and one with its cost to the target."""
    title = f"testbed:{summary['family']}, seed {summary['seed']}: {summary['max_steps']} steps each"
    caption = "held-out KL: at the start → median of the last three evaluations"
    table = Table(title=title, caption=caption, box=box.SIMPLE, pad_edge=False)
    for name in ("", "steps", "net s", "tokens", "held-out KL", "accuracy [95 %]"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for arm, label in ARMS.items():
        values = summary[arm]
        low, high = values["final_accuracy_ci95"]
        table.add_row(
            label,
            str(values["steps"]),
            f"{values['seconds']:.1f}",
            f"{values['generated_tokens']:,}",
            f"{values['start_kl']:.3f} → {values['final_kl']:.4f}",
            f"{values['final_accuracy']:.3f} [{low:.3f}, {high:.3f}]",
        )
        if reached := values.get("cost_to_target"):
            table.add_row(
                "… to target",
                str(reached["steps"]),
                f"{reached['seconds']:.1f}",
                f"{reached['generated_tokens']:,}",
                f"≤ {summary['target_kl']:.4f}",
                "",
            )
    return table


def speedup_text(summary: dict[str, Any]) -> str:
    """Lines with the net speed-ups and jumps of each run with a search."""
    clock = "CPU seconds" if summary["cost_clock"] == "cpu" else "wall seconds"
    lines = [f"net speed-up to plain OPD's final KL (one seed, {clock}; includes searches, excludes evaluations):"]
    for arm in AHEAD:
        values = summary[arm]
        speedup, label = values["speedup"], f"{ARMS[arm]:<{LABEL_WIDTH}}"
        if speedup["steps"] is None:
            lines.append(f"{label} none. {speedup['reason']}")
        else:
            lines.append(
                f"{label} [bold]{speedup['steps']:.2f}× in steps, {speedup['seconds']:.2f}× in seconds, "
                f"{speedup['generated_tokens']:.2f}× in sampled tokens[/bold]"
            )
        jumps = [f"{scale:.3g}Δ at {step}" for step, scale in values["accepted_scales"].items() if scale]
        more = f", … {len(jumps) - 8} more" if len(jumps) > 8 else ""
        lines.append(f"{'':<{LABEL_WIDTH}} jumps: {', '.join(jumps[:8]) or 'none'}{more}")
        on_the_way = [
            f"{row['gap_closed']:.0%}: {row['speedup']['steps']:.1f}× / {row['speedup']['seconds']:.1f}×"
            for row in values["speedup_by_gap_closed"]
            if row["speedup"]
        ]
        lines.append(
            f"{'':<{LABEL_WIDTH}} at shares of the gap (steps / seconds): {', '.join(on_the_way) or 'not reached'}"
        )
    return "\n".join(lines)


def draw_figure(root: Path, summary: dict[str, Any]) -> Path:
    """Draw KL and accuracy of all runs to `figure.png`."""
    with quiet_style():
        figure = quality_figure(
            {label: read_evaluations(root / arm) for arm, label in ARMS.items()},
            {ARMS[arm]: read_searches(root / arm) for arm in AHEAD},
            target=summary["target_kl"],
            teacher_accuracy=testbed.card()["teacher_accuracy"][summary["family"]],
        )
        return save(
            figure,
            root / "figure.png",
            f"testbed:{summary['family']}, seed {summary['seed']}",
            "Points: evaluations with 95 % intervals. Dotted: plain OPD's final KL (median of its "
            "last three) and the teacher's accuracy.",
        )
