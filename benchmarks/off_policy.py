"""Scoring candidates on rollouts of W: bias, alternatives, and number of rollouts per decision.

    .venv/bin/python benchmarks/off_policy.py [--family chain_sum] [--seed 0] [--max_steps 24]
    [--out docs/off_policy.json]

At every search of a `line_search` run, every scale of a grid is scored in the four ways below. The
truth is the exact reverse KL on the candidate's own answers to 256 held-out prompts.

- `plain`: on the rollouts of W, as `teacher_kl` does;
- `weighted`: `plain` with self-normalized importance weights of the prefixes, truncated at 10;
- `trusted`: `plain`, among the candidates with KL(candidate ‖ W) <= --radius nats per token on the
    same tokens;
- `confirmed`: the two best of `plain`, scored on their own answers to 32 training prompts. Its cost
    includes generation.

Prints the true KL of the picks relative to the best of the grid and to s = 0 (geometric means), and
the scoring time relative to `plain`. Training continues with its own search. Also simulates the
gate's errors from the 256 rollouts' real gains (`gate_errors`), and the savings of a sequential
test (`racing`).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import PrinterCallback

from effopd.commands.quickstart import quiet
from effopd.commands.train import parse_train
from effopd.common.isolation import evaluating, isolated_rng
from effopd.distill import scoring
from effopd.distill.callback import EffOPDCallback
from effopd.distill.evaluate_student import evaluate_task
from effopd.extrapolate.scorers.teacher_kl import RolloutScorer
from effopd.extrapolate.search import Score, line_search
from effopd.launch.opd import build_trainer
from effopd.models.logit_path import completion_hidden_states
from effopd.tasks.testbed_families import family_task

GRID = (-0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
CUT = 10.0


class Watching(RolloutScorer):
    """`teacher_kl` scorer that scores the whole grid in all ways before every search."""

    rows: list[dict]

    def __init__(self, divergence, rollouts: int):
        super().__init__(divergence, rollouts)
        self._trainer, self.fresh = divergence.trainer, False

    def __call__(self, model, scale=None):
        if self.fresh:
            self.fresh = False
            self.rows.append(self.measure(model))
        return super().__call__(model, scale)

    def take(self, batches, *, most=False):
        self.all_batches, self.fresh = list(batches), True
        super().take(self.all_batches, most=most)

    def measure(self, model) -> dict:
        trainer = self._trainer
        callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EffOPDCallback))
        move_to = callback.look_ahead.weights.move_to
        many = RolloutScorer(self._divergence, 10**9)
        many.take(self.all_batches)
        row = {"step": trainer.state.global_step + 1, "scale": list(GRID), "truth": [], "truth_se": [], "plain": {}}
        row |= {
            "weighted": {},
            "moved": [],
            "confirmed": [],
            "seconds": {"plain": 0.0, "weighted": 0.0, "confirmed": 0.0},
        }
        few_start = self.tokens(model, self._batches)
        many_start = self.tokens(model, many._batches)
        for scale in GRID:
            move_to(scale)
            start = time.process_time()
            row["plain"].setdefault("32", []).append(list(super().__call__(model).per_example))
            row["seconds"]["plain"] += time.process_time() - start
            row["plain"].setdefault("all", []).append(list(many(model).per_example))
            start = time.process_time()
            row["weighted"].setdefault("32", []).append(self.weighted(model, self._batches, few_start)[0])
            row["seconds"]["weighted"] += time.process_time() - start
            value, moved = self.weighted(model, many._batches, many_start)
            row["weighted"].setdefault("all", []).append(value)
            row["moved"].append(moved)
            truth = self.truth(model, self.held_out)
            row["truth"].append(truth["kl"])
            row["truth_se"].append(truth["kl_se"])
            start = time.process_time()
            row["confirmed"].append(self.truth(model, self.few)["kl"])
            row["seconds"]["confirmed"] += time.process_time() - start
        move_to(0.0)
        return row

    def truth(self, model, task) -> dict:
        trainer = self._trainer
        with isolated_rng(0):
            return evaluate_task(
                model,
                trainer.teacher_model,
                trainer.processing_class,
                task,
                trainer.args,
                vocab_size=trainer.vocab_size,
                autocast=trainer.accelerator.autocast,
            )[0]

    @torch.no_grad()
    def tokens(self, model, batches):
        """Log-probabilities [B, T, V] of the student at the scored positions, a batch at a time."""
        with evaluating(model):
            return [self.log_probs(model, batch) for batch in batches]

    def log_probs(self, model, batch):
        hidden = completion_hidden_states(model, batch.ids_BL, batch.mask_BL, batch.scored_BT.shape[1])
        return model.get_output_embeddings()(hidden)[..., : self._trainer.vocab_size].float().log_softmax(-1)

    @torch.no_grad()
    def weighted(self, model, batches, before) -> tuple[float, float]:
        """(−KL to the teacher with weighted prefixes, KL(candidate ‖ W) on the same tokens)."""
        total = weights = moved = count = 0.0
        for batch, old in zip(batches, before, strict=True):
            new, teacher = self.log_probs(model, batch), self.log_probs(self._trainer.teacher_model, batch)
            valid, answer = batch.scored_BT, batch.ids_BL[:, -batch.scored_BT.shape[1] :]
            ratio = ((new - old).gather(-1, answer[..., None])[..., 0] * valid).cumsum(1)
            prefix = torch.cat([torch.zeros_like(ratio[:, :1]), ratio[:, :-1]], dim=1).exp().clamp(max=CUT)
            kl = (new.exp() * (new - teacher)).sum(-1)
            total += float((prefix * kl)[valid].double().sum())
            weights += float(prefix[valid].double().sum())
            moved += float((new.exp() * (new - old)).sum(-1)[valid].double().sum())
            count += int(valid.sum())
        return -total / weights, moved / count


def summary(rows: list[dict], radius: float) -> dict:
    """True KL of the picks of each way of scoring, relative to the best scale and to s = 0.

    Means are geometric. `worse_by_5_percent` counts picks whose KL exceeds that of s = 0 by 5 %.
    """
    stay = GRID.index(0.0)
    excess: dict[str, list[float]] = {}
    gained: dict[str, list[float]] = {}
    worse: dict[str, int] = {}
    for row in rows:
        truth = np.array(row["truth"])
        scores = {f"plain {n}": np.array(row["plain"][n]).mean(1) for n in ("32", "all")}
        scores |= {f"weighted {n}": np.array(row["weighted"][n]) for n in ("32", "all")}
        scores["trusted 32"] = np.where(np.array(row["moved"]) <= radius, scores["plain 32"], -np.inf)
        best = np.argsort(-scores["plain 32"])[:2]
        scores["confirmed 32"] = np.full(len(GRID), -np.inf)
        scores["confirmed 32"][best] = -np.array(row["confirmed"])[best]
        examples = np.array(row["plain"]["32"])
        gains = examples - examples[stay]
        z = gains.mean(1) / np.maximum(gains.std(1, ddof=1) / gains.shape[1] ** 0.5, 1e-300)
        scores["significant 32"] = np.where((z >= 2) | (np.array(GRID) <= 0), scores["plain 32"], -np.inf)
        scores["stay"] = (np.arange(len(GRID)) == stay) - 1.0
        for name, score in scores.items():
            pick = int(np.argmax(score))
            excess.setdefault(name, []).append(truth[pick] / truth.min())
            gained.setdefault(name, []).append(truth[pick] / truth[stay])
            worse[name] = worse.get(name, 0) + int(truth[pick] > truth[stay] * 1.05)
    seconds = {name: sum(row["seconds"][name] for row in rows) for name in rows[0]["seconds"]}
    return {
        "searches": len(rows),
        "over_best": {name: float(np.exp(np.mean(np.log(values)))) for name, values in excess.items()},
        "over_staying": {name: float(np.exp(np.mean(np.log(values)))) for name, values in gained.items()},
        "worst_over_staying": {name: float(np.max(values)) for name, values in gained.items()},
        "worse_by_5_percent": worse,
        "seconds_over_plain": {name: value / seconds["plain"] for name, value in seconds.items()},
    }


def gate_errors(rows: list[dict], rollouts: int, repeats: int = 400) -> dict[str, dict[str, float]]:
    """Rates of jumps by gate, from line searches on random subsets of `rollouts` rollouts.

    Searches use the scales of the grid, without refinement.

    - `false`: forward jumps if the true gain is 0 (each rollout's gains times a random sign)
    - `jumps`: forward jumps on the real gains
    - `harmful`: forward jumps on the real gains to a truly worse point
    - `false_back`, `back`, `harmful_back`: the same for backward jumps, which every gate accepts at
      any gain
    """
    rng, stay = np.random.default_rng(0), GRID.index(0.0)
    gates = {"better": ("better", 2.0)} | {f"significant {z:g}": ("significant", z) for z in (1.0, 1.5, 2.0, 3.0)}
    counts = {
        name: dict.fromkeys(("false", "jumps", "harmful", "false_back", "back", "harmful_back"), 0) for name in gates
    }
    for row in rows:
        examples, truth = np.array(row["plain"]["all"]), dict(zip(GRID, row["truth"], strict=True))
        gains = examples - examples[stay]
        for _ in range(repeats):
            drawn = gains[:, rng.choice(gains.shape[1], rollouts, replace=False)]
            flipped = drawn * rng.choice((-1.0, 1.0), rollouts)
            for name, (gate, z) in gates.items():
                real, null = (
                    line_search(
                        {
                            s: Score(float(g.mean()), per_example=tuple(g)) for s, g in zip(GRID, d, strict=True)
                        }.__getitem__,
                        gate,
                        z,
                        longest=max(GRID),
                        refinements=0,
                    ).accepted_scale
                    for d in (drawn, flipped)
                )
                worse = truth[real] > truth[0.0]
                counts[name]["false"] += null > 0
                counts[name]["jumps"] += real > 0
                counts[name]["harmful"] += real > 0 and worse
                counts[name]["false_back"] += null < 0
                counts[name]["back"] += real < 0
                counts[name]["harmful_back"] += real < 0 and worse
    total = len(rows) * repeats
    return {name: {key: value / total for key, value in of_gate.items()} for name, of_gate in counts.items()}


def racing(rows: list[dict], rollouts: int = 32, block: int = 8, repeats: int = 200) -> dict[str, float]:
    """Savings of a sequential test: share of scored rollouts saved, and share of changed results.

    Candidates are scored block by block and dropped once they are worse than the start by two
    standard errors.
    """
    rng, stay = np.random.default_rng(0), GRID.index(0.0)
    scored = saved = changed = searches = 0
    for row in rows:
        examples = np.array(row["plain"]["all"])
        for _ in range(repeats):
            drawn = examples[:, rng.choice(examples.shape[1], rollouts, replace=False)]
            full = {s: Score(float(g.mean()), per_example=tuple(g)) for s, g in zip(GRID, drawn, strict=True)}
            raced, cost = dict(full), dict.fromkeys(GRID, rollouts)
            for scale, gains in zip(GRID, drawn - drawn[stay], strict=True):
                for seen in range(block, rollouts, block):
                    error = gains[:seen].std(ddof=1) / seen**0.5
                    if gains[:seen].mean() < -2 * error:
                        raced[scale], cost[scale] = Score(-1e9, per_example=(-1e9,) * rollouts), seen
                        break
            whole, short = (
                line_search(scores.__getitem__, "significant", 2.0, longest=max(GRID), refinements=0)
                for scores in (full, raced)
            )
            scored += rollouts * len(whole.trials)
            saved += rollouts * len(whole.trials) - sum(cost[trial.scale] for trial in short.trials)
            changed += whole.accepted_scale != short.accepted_scale
            searches += 1
    return {"saved": saved / scored, "changed": changed / searches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="chain_sum")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=24)
    parser.add_argument("--learning_rate", type=float, default=3e-5)
    parser.add_argument("--radius", type=float, default=0.02)
    parser.add_argument("--runs", type=Path, default=Path("runs/off_policy"))
    parser.add_argument("--out", type=Path, help="Add the summary to this JSON file.")
    arguments = parser.parse_args()
    quiet()
    name = f"{arguments.family}-{arguments.seed}"
    rows_file = arguments.runs / f"{name}.json"
    if not rows_file.exists():
        scoring.RolloutScorer = Watching  # type: ignore[attr-defined]
        settings = parse_train(
            f"""--model_name_or_path testbed:student --teacher_model_name_or_path testbed:teacher
            --task testbed:{arguments.family} --train_size 4096 --eval_size 256 --max_steps {arguments.max_steps}
            --per_device_train_batch_size 256 --per_device_eval_batch_size 256 --max_completion_length 24
            --activation_checkpointing false --eval_strategy no --save_strategy no
            --report_to none --disable_tqdm true --learning_rate {arguments.learning_rate} --seed {arguments.seed}
            --output_dir {arguments.runs / name} --effopd.strategy line_search""".split()
        )
        trainer = build_trainer(settings)
        trainer.remove_callback(PrinterCallback)
        scorer = next(c.scorer for c in trainer.callback_handler.callbacks if isinstance(c, EffOPDCallback))
        assert isinstance(scorer, Watching)
        scorer.rows = []
        scorer.few, scorer.held_out = (
            family_task(arguments.family, split, size, seed=arguments.seed + 99)
            for split, size in (("train", 32), ("test", 256))
        )
        trainer.train()
        rows_file.write_text(json.dumps(scorer.rows))
    rows = json.loads(rows_file.read_text())
    result = summary(rows, arguments.radius)
    result["gate_errors"] = {str(n): gate_errors(rows, n) for n in (8, 16, 32, 64)}
    result["racing"] = racing(rows)
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        saved = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        arguments.out.write_text(json.dumps(saved | {name: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
