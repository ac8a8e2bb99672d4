"""A complete tiny run, also as a script: `python tiny_run.py OUTPUT_DIR [--kill WHERE]` (for the
kill tests).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from functools import cache
from pathlib import Path

from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from effopd import EffOPDCallback, EffOPDConfig, OPDConfig, OPDTrainer
from effopd.extrapolate import anchor_files
from effopd.extrapolate.scorers.accuracy import AccuracyScorer
from effopd.runs.run_dir import RunDir
from helpers.tiny_models import make_model, make_task, make_tokenizer

STEPS = 10


@cache
def _letters() -> Dataset:
    return make_task(64).to_dataset()


def make_trainer(
    output_dir,
    *,
    effopd: EffOPDConfig | None = None,
    student=None,
    teacher=None,
    task=None,
    reference_model=None,
    **overrides,
) -> OPDTrainer:
    """80 prompts, 8 a step: ten steps are one epoch and a bit if `overrides` say so."""
    rows = _letters() if task is None else task.to_dataset()
    task = task if task is not None else make_task(64)
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16,
        "max_completion_length": 6, "learning_rate": 2e-3, "report_to": "none", "activation_checkpointing": False,
        "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3, "eval_strategy": "steps", "eval_steps": 3,
        "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    trainer = OPDTrainer(
        student if student is not None else make_model(0),
        teacher if teacher is not None else make_model(1),
        OPDConfig(output_dir=str(output_dir), **(settings | overrides)),
        train_dataset=rows,
        processing_class=make_tokenizer(),
        eval_task=task.sample(12, 1),
        reference_model=reference_model,
    )
    if effopd is not None:
        trainer.add_callback(EffOPDCallback(trainer, effopd, task=task))
    return trainer


EFFOPD = EffOPDConfig(validation_size=12)


def _die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(where: str) -> None:
    """Arrange a SIGKILL in the middle of something."""
    if where == "search":  # third candidate of the search at step 8, the model far from where it should be
        calls, real = [], AccuracyScorer.__call__

        def scored(self, model):
            calls.append(1)
            if len(_searches()) == 3 and len(calls) > 2 and _at_candidate(calls):
                _die()
            return real(self, model)

        AccuracyScorer.__call__ = scored
    elif where == "anchor":  # half-way through the anchor of step 6
        real_write, written = anchor_files.write_atomically, []

        def write(path, fill):
            written.append(path.name)
            if written.count(anchor_files.ANCHOR_FILE) == 3:
                path.write_bytes(b"torn")
                _die()
            return real_write(path, fill)

        anchor_files.write_atomically = write
    elif where in ("save", "publish"):  # everything of step 6 is written but not published / half-way through it
        real_publish = RunDir.publish

        def publish(staged, final):
            if final.name == "step-000006":
                if where == "save":
                    next(iter(staged.glob("optimizer.pt"))).write_bytes(b"torn")
                _die()
            return real_publish(staged, final)

        RunDir.publish = staticmethod(publish)


def _searches() -> list[str]:
    path = Path(sys.argv[1]) / "searches.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def _at_candidate(calls: list[int]) -> bool:
    """Whether this call is the second of its search (calls of earlier searches are counted from the
    rows).
    """
    import json

    earlier = sum(len(json.loads(line)["trials"]) for line in _searches())
    return len(calls) == earlier + 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--kill", default="")
    arguments = parser.parse_args()
    _arm(arguments.kill)
    make_trainer(arguments.output_dir, effopd=EFFOPD, eval_on_start=True).train()
