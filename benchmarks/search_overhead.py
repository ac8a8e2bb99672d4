"""Overhead of a search beyond sampling and scoring its answers.

    .venv/bin/python benchmarks/search_overhead.py [--steps 33] [--repeats 3]

Trains on the testbed twice per repeat: without EffOPD, and with an EffOPD that rejects the first
candidate of every search. That is two scorings per search, and the weights are restored. Reports,
within one process:

- overhead: (search seconds − seconds inside the scorer) / net seconds of the run. Target: below
    2 %;
- unexplained: (difference of the two runs' net seconds − seconds inside the scorer) / net seconds;
    a noisy cross-check.

Asserts that both runs end with the same weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import PrinterCallback
from trl import ModelConfig

from effopd.commands.quickstart import quiet
from effopd.distill import scoring
from effopd.distill.config import OPDConfig
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.scorers.accuracy import AccuracyScorer
from effopd.extrapolate.search import Score
from effopd.launch.opd import RunSettings, build_trainer
from effopd.tasks import TaskConfig
from effopd.tasks import builtin_models as testbed


class Rejecting(AccuracyScorer):
    """Scorer that samples and grades, but returns a lower score at every call."""

    calls = 0
    seconds = 0.0

    def __call__(self, model):
        score = super().__call__(model)
        Rejecting.calls += 1
        Rejecting.seconds += score.seconds
        return Score(-float(Rejecting.calls), score.per_example, score.seconds, score.generated_tokens)


def run(folder: Path, steps: int, seed: int, ahead: bool):
    opd = OPDConfig(
        **testbed.reference_settings(), output_dir=str(folder), max_steps=steps, seed=seed, save_strategy="no",
        report_to="none", disable_tqdm=True, teacher_model_name_or_path=str(testbed.teacher_path()),
    )  # fmt: skip
    settings = RunSettings(
        ModelConfig(model_name_or_path=str(testbed.student_path())),
        TaskConfig(task=f"testbed:{next(iter(testbed.FAMILIES))}", train_size=2048, eval_size=64),
        opd,
        EffOPDConfig("effopd" if ahead else "none", seed=seed),
    )
    trainer = build_trainer(settings)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=33)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    quiet()
    scoring.AccuracyScorer = Rejecting  # type: ignore[attr-defined]
    overheads, unexplained = [], []
    for seed in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            Rejecting.calls, Rejecting.seconds = 0, 0.0
            plain = run(Path(folder) / "plain", arguments.steps, seed, ahead=False)
            ahead = run(Path(folder) / "ahead", arguments.steps, seed, ahead=True)
        assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), ahead.model.parameters(), strict=True))
        costs = [trainer.ledger.snapshot() for trainer in (plain, ahead)]
        net = costs[1]["cost/net_seconds"]
        overheads.append((costs[1]["cost/search_seconds"] - Rejecting.seconds) / net)
        unexplained.append((net - costs[0]["cost/net_seconds"] - Rejecting.seconds) / net)
        print(
            f"seed {seed}: {Rejecting.calls} scorings, {Rejecting.seconds:.2f} s in the scorer, "
            f"{costs[1]['cost/search_seconds']:.2f} s in search, {net:.2f} s net (plain: "
            f"{costs[0]['cost/net_seconds']:.2f} s); overhead {overheads[-1]:.3%}, unexplained {unexplained[-1]:+.2%}"
        )
    print(
        json.dumps(
            {
                "steps": arguments.steps,
                "overhead_median": statistics.median(overheads),
                "overhead_max": max(overheads),
                "unexplained_median": statistics.median(unexplained),
            }
        )
    )


if __name__ == "__main__":
    main()
