"""Held-out reverse KL and accuracy of the final models of a comparison, on many answers.

    .venv/bin/python benchmarks/final_quality.py recipes/compare-testbed.yaml [--size 3000] [--out
    docs/final_quality.json]

During a run, the KL is measured on 256 answers. Near the end most of it comes from a few answers
(`tail`: the share of the largest 1 %), so a single answer can decide a comparison. Here every final
model answers the same `size` questions of the unseen test split, with the same sampling noise.

Prints medians over seeds [interval] of the KL in nats per token, its paired difference from plain
OPD at the same learning rate, the difference in accuracy, the tail's share, and the KL per token of
the median answer. Models measured before are read from `--out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from effopd.common.files import write_atomically
from effopd.common.statistics import ratio_with_error
from effopd.compare.grid import Grid, PlannedRun, load_grid
from effopd.compare.paired import median_with_interval
from effopd.compare.runner import is_done
from effopd.distill.divergence import reverse_kl_of_completions
from effopd.tasks.builtin_models import family_task, resolve_model
from effopd.tasks.evaluate import evaluate
from effopd.tasks.sampling import Sampling

BATCH = 256


def measure(run: PlannedRun, size: int) -> dict[str, float | str | int]:
    """One row: the final model of `run` on `size` questions of the test split."""
    family = run.task.removeprefix("testbed:")
    questions = family_task(family, "test", size)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (run.path, resolve_model(run.settings["teacher_model_name_or_path"]))
    )
    tokenizer = AutoTokenizer.from_pretrained(run.path)
    length = run.settings["max_completion_length"]
    sampling = Sampling(max_new_tokens=length, batch_size=BATCH, seed=0)
    answers = evaluate(student, tokenizer, questions, sampling)
    completions = [answer for (answer,) in answers.completions]
    sums, tokens = reverse_kl_of_completions(
        student,
        teacher,
        [answer.prompt_ids for answer in completions],
        [answer.completion_ids for answer in completions],
        vocab_size=student.config.vocab_size,
        pad_token_id=tokenizer.pad_token_id,
        batch_size=BATCH,
    )
    kl, n = np.array(sums), np.array(tokens)
    mean, error = ratio_with_error(sums, tokens)
    return {
        "task": run.task,
        "strategy": run.strategy,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "size": size,
        "kl": mean,
        "kl_se": error,
        "tail": float(np.sort(kl)[-max(1, size // 100) :].sum() / kl.sum()),
        "median_kl": float(np.median(kl / n)),
        "accuracy": answers.accuracy.mean,
    }


def show(rows: list[dict], grid: Grid) -> None:
    """Print the table as Markdown."""
    values = {(row["task"], row["learning_rate"], row["strategy"], row["seed"]): row for row in rows}

    def spread(numbers: list[float], form: str) -> str:
        median = median_with_interval(numbers, zero_is_never=False)
        return f"{median.median:{form}} [{median.low:{form}}, {median.high:{form}}]" if median.n else "–"

    print(
        "| task | learning rate | strategy | n | KL | minus plain OPD's | accuracy minus "
        "plain OPD's | tail | median answer's KL |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for task, rate, strategy in sorted({key[:3] for key in values}):
        of_arm = [values[task, rate, strategy, seed] for seed in grid.seeds if (task, rate, strategy, seed) in values]
        pairs = [(row, values[key]) for row in of_arm if (key := (task, rate, grid.baseline, row["seed"])) in values]
        print(
            f"| {task} | {rate:.3g} | `{strategy}` | {len(of_arm)} | {spread([row['kl'] for row in of_arm], '.5f')} "
            f"| {spread([a['kl'] - b['kl'] for a, b in pairs], '+.5f')} "
            f"| {spread([a['accuracy'] - b['accuracy'] for a, b in pairs], '+.3f')} "
            f"| {spread([row['tail'] for row in of_arm], '.0%')} "
            f"| {spread([row['median_kl'] for row in of_arm], '.1e')} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="plan of the comparison (YAML)")
    parser.add_argument("--strategies", nargs="+", default=["plain", "line_search"])
    parser.add_argument("--size", type=int, default=3000, help="questions per model")
    parser.add_argument("--out", type=Path, default=Path("docs/final_quality.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    grid = load_grid(arguments.plan)
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    known = {(row["task"], row["strategy"], row["learning_rate"], row["seed"], row["size"]) for row in rows}
    todo = [
        run
        for run in grid.runs()
        if run.strategy in arguments.strategies
        and (run.task, run.strategy, run.learning_rate, run.seed, arguments.size) not in known
        and is_done(run)
    ]
    for run in tqdm(todo, desc="final models"):
        rows.append(measure(run, arguments.size))
        write_atomically(arguments.out, lambda file: file.write_text(json.dumps(rows, indent=0) + "\n"))
    show([row for row in rows if row["size"] == arguments.size], grid)


if __name__ == "__main__":
    main()
