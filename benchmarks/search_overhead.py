"""Cost of searches: overhead beyond sampling and scoring, and where the seconds of a search go.

    .venv/bin/python benchmarks/search_overhead.py [--steps 33] [--repeats 3]
    .venv/bin/python benchmarks/search_overhead.py --parts 16 32 64 256 [--steps 12]

Without `--parts`: trains on the testbed twice per repeat, without EffOPD, and with an EffOPD that
rejects the first candidate of every search. That is two scorings per search, and the weights are
restored. Reports, within one process:

- overhead: (search seconds − seconds inside the scorer) / net seconds of the run. Target: below
    2 %;
- unexplained: (difference of the two runs' net seconds − seconds inside the scorer) / net seconds;
    a noisy cross-check.

Asserts that both runs end with the same weights.

With `--parts`: trains with `newton_search` twice for each number of prompts per step. In the first
run nothing is shared: every search asks the teacher itself, and every candidate computes the
teacher's logits again. In the second, the loss reads what the search asked, and the logits are
kept. Reports CPU seconds, so that other processes matter little:

- the share of searches in net seconds, and the teacher's tokens over those of the loss;
- seconds per search and per step without search, and the parts of a search in percent;
- whether both runs accepted the same scales, and the largest relative difference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import PrinterCallback
from trl import ModelConfig

from effopd.commands.quickstart import quiet
from effopd.common import isolation
from effopd.common.files import read_rows
from effopd.distill import divergence, scoring, search_kl
from effopd.distill.callback import EffOPDCallback
from effopd.distill.config import OPDConfig
from effopd.distill.trainer import OPDTrainer
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.live_weights import LiveWeights
from effopd.extrapolate.scorers import base
from effopd.extrapolate.scorers.accuracy import AccuracyScorer
from effopd.extrapolate.search import Score
from effopd.launch.opd import RunSettings, build_trainer
from effopd.models.token_batch import TokenBatch
from effopd.runs.records import SEARCHES
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


def run(folder: Path, steps: int, seed: int, look: EffOPDConfig, **more: Any):
    settings = testbed.reference_settings() | {
        "output_dir": str(folder), "max_steps": steps, "seed": seed, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "teacher_model_name_or_path": str(testbed.teacher_path()),
    }  # fmt: skip
    trainer = build_trainer(
        RunSettings(
            ModelConfig(model_name_or_path=str(testbed.student_path())),
            TaskConfig(task=f"testbed:{next(iter(testbed.FAMILIES))}", train_size=2048, eval_size=64),
            OPDConfig(**settings | more),
            look,
        )
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


# -- overhead --------------------------------------------------------------------------------------


def overhead(steps: int, repeats: int) -> None:
    scoring.AccuracyScorer = Rejecting  # type: ignore[attr-defined]
    overheads, unexplained = [], []
    for seed in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            Rejecting.calls, Rejecting.seconds = 0, 0.0
            plain = run(Path(folder) / "plain", steps, seed, EffOPDConfig("none", seed=seed))
            ahead = run(Path(folder) / "ahead", steps, seed, EffOPDConfig("effopd", seed=seed))
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
                "steps": steps,
                "overhead_median": statistics.median(overheads),
                "overhead_max": max(overheads),
                "unexplained_median": statistics.median(unexplained),
            }
        )
    )


# -- parts -----------------------------------------------------------------------------------------


class Stopwatch:
    """Exclusive CPU seconds of the parts of a search; a part inside another pauses it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def _charge(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def timed(self, name: str, call: Callable[..., Any], always: bool = False) -> Callable[..., Any]:
        """`call`, charged to `name` during a search."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not (self._open or always):
                return call(*args, **kwargs)
            with self.part(name):
                return call(*args, **kwargs)

        return timed


@contextmanager
def watched(watch: Stopwatch) -> Iterator[None]:
    """In this block, the searches of any run are timed by part."""
    hidden = TokenBatch.hidden

    def by_model(batch: TokenBatch, model: Any) -> Any:
        student = any(p.requires_grad for p in model.parameters())
        return watch.timed("student's forwards" if student else "teacher's forward", hidden)(batch, model)

    parts = {
        "moving weights": [(LiveWeights, name) for name in ("begin", "move_to", "restore", "commit")],
        "‖Δ‖": [(LiveWeights, "displacement_norm")],
        "head products and KL": [
            (divergence, "divergence_kernel"),
            (divergence, "reverse_kl"),
            (scoring.TrainedDivergence, "_teacher_logits"),
        ],
        "slope": [(scoring.TrainedDivergence, "slope"), (scoring, "line_head")],
        "random state": [(base, "isolated_rng")],
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(TokenBatch, "hidden", by_model))
        for name, places in parts.items():
            for owner, attribute in places:
                real = getattr(owner, attribute)
                replaced = (
                    _timed_block(watch, name, real) if real is isolation.isolated_rng else watch.timed(name, real)
                )
                stack.enter_context(mock.patch.object(owner, attribute, replaced))
        search = watch.timed("everything else", EffOPDCallback._search, always=True)
        stack.enter_context(mock.patch.object(EffOPDCallback, "_search", lambda *args: search(*args)))
        yield


def _timed_block(watch: Stopwatch, name: str, block: Callable[..., Any]) -> Callable[..., Any]:
    """A context manager whose entry and exit, but not its body, are charged to `name`."""

    @contextmanager
    def timed(*args: Any) -> Iterator[None]:
        inner = block(*args)
        watch.timed(name, inner.__enter__)()
        try:
            yield
        finally:
            watch.timed(name, inner.__exit__)(None, None, None)

    return timed


@contextmanager
def nothing_shared() -> Iterator[None]:
    """In this block, searches share nothing with the loss, nor candidates with each other."""
    asks = mock.patch.object(OPDTrainer, "predicts_ahead", property(lambda trainer: False))
    with asks, mock.patch.object(search_kl, "MOST_BYTES", -1):
        yield


def measured(folder: Path, prompts: int, steps: int, shared: bool) -> dict[str, Any]:
    watch = Stopwatch()
    with watched(watch), nullcontext() if shared else nothing_shared():
        trainer = run(
            folder, steps, 0, EffOPDConfig("newton_search", seed=0), cost_clock="cpu",
            per_device_train_batch_size=prompts, gradient_accumulation_steps=1, use_cpu=True,
        )  # fmt: skip
    costs, rows = trainer.ledger.snapshot(), list(read_rows(folder / SEARCHES))
    net, search = costs["cost/net_seconds"], costs["cost/search_seconds"]
    total = sum(watch.seconds.values())
    return {
        "prompts": prompts, "steps": steps, "shared": shared,
        "share of search": search / net,
        "teacher tokens / those of the loss": trainer.costs.teacher_tokens / costs["cost/update_forward_tokens"],
        "searches": len(rows), "scores": sum("score" in trial for row in rows for trial in row["trials"]),
        "seconds per search": search / len(rows), "seconds per step without search": (net - search) / steps,
        "parts in %": {name: 100 * value / total for name, value in sorted(watch.seconds.items())},
        "scales": [row["accepted_scale"] for row in rows],
    }  # fmt: skip


def parts(sizes: list[int], steps: int) -> None:
    for prompts in sizes:
        with tempfile.TemporaryDirectory() as folder:
            both = [measured(Path(folder) / str(shared), prompts, steps, shared) for shared in (False, True)]
        scales = [result.pop("scales") for result in both]
        same = len(scales[0]) == len(scales[1])
        gap = max((abs(a - b) / max(abs(a), abs(b), 1e-9) for a, b in zip(*scales, strict=False)), default=0.0)
        for result in both:
            print(json.dumps(result, default=str, ensure_ascii=False), flush=True)
        print(f"{prompts} prompts: scales {'agree' if same else 'DIFFER in number'}, largest difference {gap:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="default: 33, with --parts 12")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", type=int, nargs="+", metavar="PROMPTS", help="prompts per step")
    arguments = parser.parse_args()
    quiet()
    if arguments.parts:
        parts(arguments.parts, arguments.steps or 12)
    else:
        overhead(arguments.steps or 33, arguments.repeats)


if __name__ == "__main__":
    main()
