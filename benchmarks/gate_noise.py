"""False accepts of the accuracy gate: searches whose candidates are no better than the start.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/gate_noise.py [--out docs/gate_noise.json]

The real search runs on the testbed with candidates that are no better than the start, so every
accepted candidate is noise:

1. Fresh sampling noise. Every candidate is the unchanged model with newly sampled answers. Many
   answers per prompt are sampled and graded once; searches are replayed from them. Each search
   draws its own validation prompts and uses no answer twice, so its scores are distributed like
   those of real sampling. The first failure ends a search: P(any accepted) = P(first accepted).
   Without ties, the k-th candidate is accepted with probability 1 / (k + 1)!, for any model.
2. Shared sampling noise, as in the package. Candidates are the weights plus a random direction
   whose norm is ε times that of each tensor, at the search's scales (up to 10 ε). The real scorer
   scores them with one seed per search. Updates of real searches are about 5e-4 (step 1) to 4e-3
   (step 64) times the weights.

Takes about nine minutes on one core, mostly for the second part, which is therefore limited to the
student.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from effopd.commands.quickstart import quiet
from effopd.common.files import write_atomically
from effopd.common.isolation import evaluating, isolated_rng
from effopd.common.statistics import accuracy_interval
from effopd.common.versions import versions
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.live_weights import LiveWeights
from effopd.extrapolate.scorers.accuracy import AccuracyScorer
from effopd.extrapolate.search import Score, first_failure_search
from effopd.extrapolate.strategies.random_direction import random_like, seed_of
from effopd.tasks import Task, TaskConfig, load_task
from effopd.tasks import builtin_models as testbed
from effopd.tasks.evaluate import evaluate
from effopd.tasks.sampling import Sampling

SCALES = tuple(EffOPDConfig().args["scales"])
#: Gates of the paper and the released code. `benchmarks/off_policy.py` measures line_search's gate.
GATES = ("not_worse", "better")
PATHS = {"student": testbed.student_path, "teacher": testbed.teacher_path}
#: Searches replayed per chunk.
_CHUNK = 2000


# -- 1: fresh noise --------------------------------------------------------------------------------


def scores_of_searches(correct_PA: np.ndarray, size: int, searches: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of correct answers [searches, 1 + candidates], each search on its own `size` prompts.

    Every scoring draws one of a prompt's A answers without replacement: the next answer is correct
    with probability (correct answers left) / (answers left).
    """
    prompts, answers = correct_PA.shape
    right_P = correct_PA.sum(1)
    chunks = []
    for start in range(0, searches, _CHUNK):
        rows = min(_CHUNK, searches - start)
        drawn = rng.random((rows, prompts), dtype=np.float32).argpartition(size - 1, axis=1)[:, :size]
        left = right_P[drawn]
        scores = np.empty((rows, 1 + len(SCALES)), dtype=np.int64)
        for k in range(scores.shape[1]):
            right = rng.random(left.shape) * (answers - k) < left
            scores[:, k] = right.sum(1)
            left = left - right
        chunks.append(scores)
    return np.concatenate(chunks)


def accepted_candidates(scores_SK: np.ndarray, gate: str) -> np.ndarray:
    """Candidates accepted per search before the first failure (vectorized search)."""
    before, after = scores_SK[:, :-1], scores_SK[:, 1:]  # the previous candidate is the best so far
    passed = after >= before if gate == "not_worse" else after > before
    return np.cumprod(passed, axis=1).sum(1)


def check_against_the_real_search(scores_SK: np.ndarray, gate: str, sample: int = 500) -> None:
    """Check that the replay decides like the package, row by row."""
    for row, accepted in zip(scores_SK[:sample], accepted_candidates(scores_SK[:sample], gate), strict=True):
        means = dict(zip((0.0, *SCALES), row.tolist(), strict=True))
        real = first_failure_search(lambda scale, means=means: Score(float(means[scale])), SCALES, gate)
        expected = (0.0, *SCALES)[accepted]
        if real.accepted_scale != expected:
            raise AssertionError(f"replayed search went to {expected}, the real one to {real.accepted_scale}: {row}")


def describe(accepted_S: np.ndarray) -> dict[str, Any]:
    """Acceptance rates and mean scales from the number of accepted candidates per search.

    Intervals are Wilson's, 95 %.
    """
    scales = np.array((0.0, *SCALES))[accepted_S]
    first, last = (accuracy_interval([[bool(x)] for x in accepted_S >= k]) for k in (1, len(SCALES)))
    return {
        "searches": len(accepted_S),
        "first_accepted": first.mean,
        "first_accepted_ci95": [first.low, first.high],
        "mean_scale": float(scales.mean()),
        "mean_scale_if_accepted": float(scales[scales > 0].mean()) if (scales > 0).any() else None,
        "last_accepted": last.mean,
        "last_accepted_ci95": [last.low, last.high],
    }


def no_ties() -> dict[str, Any]:
    """The same values for scores without ties: k accepted candidates need k + 1 rising scores."""
    reached = 1 / np.cumprod(np.arange(2.0, len(SCALES) + 2))
    mean = float((np.diff((0.0, *SCALES)) * reached).sum())
    return {
        "first_accepted": reached[0],
        "mean_scale": mean,
        "mean_scale_if_accepted": mean / reached[0],
        "last_accepted": reached[-1],
    }


def fresh_noise(correct_PA: np.ndarray, arguments: argparse.Namespace, seed: int) -> Iterator[dict[str, Any]]:
    """One row per number of validation prompts and gate."""
    for size in arguments.sizes:
        scores = scores_of_searches(correct_PA, size, arguments.searches, np.random.default_rng([seed, size]))
        tied = float((scores[:, 0] == scores[:, 1]).mean())
        for gate in GATES:
            check_against_the_real_search(scores, gate)
            yield {"validation_size": size, "gate": gate, "first_tied": tied} | describe(
                accepted_candidates(scores, gate)
            )


# -- 2: shared noise -------------------------------------------------------------------------------


def noise_direction(seed: int, step: int, relative: float):
    """Random direction with `relative` times the norm of each tensor, in place of the update."""

    def direction(name: str, origin: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(origin.device).manual_seed(seed_of(seed, step, name))
        return random_like(relative * origin, generator)

    return direction


@dataclass
class Repeats:
    """Results of repeated searches of one ε: accepted candidates by gate, change of the first."""

    accepted: dict[str, list[int]] = field(default_factory=lambda: {gate: [] for gate in GATES})
    tied: list[bool] = field(default_factory=list)
    changed_grades: list[float] = field(default_factory=list)
    change: list[float] = field(default_factory=list)

    def add(self, score: Callable[[float], Score]) -> None:
        """Search with every gate; 'better' scores a subset of the candidates of 'not_worse'."""
        for gate in GATES:
            result = first_failure_search(score, SCALES, gate)
            self.accepted[gate].append((0.0, *SCALES).index(result.accepted_scale))
        start, first = score(0.0), score(SCALES[0])
        self.tied.append(first.mean == start.mean)
        self.changed_grades.append(float(np.mean(np.array(first.per_example) != np.array(start.per_example))))
        self.change.append(first.mean - start.mean)

    def row(self, gate: str) -> dict[str, Any]:
        """A row of the second table."""
        return {
            "first_tied": float(np.mean(self.tied)),
            "first_changed_grades": float(np.mean(self.changed_grades)),
            "first_mean_change": float(np.mean(self.change)),
        } | describe(np.array(self.accepted[gate]))


def shared_noise(model, tokenizer, task: Task, arguments: argparse.Namespace, bar: tqdm) -> Iterator[dict[str, Any]]:
    """One row per ε and gate.

    Each repeat has its own validation prompts, direction and sampling seed, shared by all ε.
    """
    weights, by_size = LiveWeights(model), {relative: Repeats() for relative in arguments.relative}
    for repeat in range(arguments.repeats):
        validation = task.sample(arguments.validation_size, seed=seed_of(arguments.seed, repeat, "D_v"))
        scorer = AccuracyScorer(validation, tokenizer, Sampling(max_new_tokens=arguments.max_new_tokens))
        sample = partial(score_at, weights, model, scorer, seed_of(arguments.seed, repeat, "answers") % 2**32)
        start = sample(0.0)  # the same for every ε
        for relative, repeats in by_size.items():
            weights.begin(noise_direction(arguments.seed, repeat, relative))
            known = {0.0: start}
            repeats.add(partial(cached, known, sample))
            weights.abort()
            bar.update()
    for relative, repeats in by_size.items():
        for gate in GATES:
            yield {
                "relative_size": relative, "gate": gate, "validation_size": arguments.validation_size
            } | repeats.row(gate)  # fmt: skip


def score_at(weights: LiveWeights, model, scorer: AccuracyScorer, seed: int, scale: float) -> Score:
    """Score at a scale with the search's sampling seed."""
    if scale != 0.0:
        weights.move_to(scale)
    with isolated_rng(seed), evaluating(model):
        return scorer(model)


def cached(known: dict[float, Score], sample: Callable[[float], Score], scale: float) -> Score:
    """Score of a scale, sampled once and cached in `known`."""
    if scale not in known:
        known[scale] = sample(scale)
    return known[scale]


# -- both ------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements as a JSON-ready dictionary."""
    fresh, shared, models = [], [], []
    answers = len(testbed.FAMILIES) * len(PATHS) * arguments.prompts * arguments.answers
    searches = len(testbed.FAMILIES) * len(arguments.perturbed) * arguments.repeats * len(arguments.relative)
    with (
        tqdm(total=answers, desc="answers", unit="answer") as sampled,
        tqdm(total=searches, desc="searches with shared noise", unit="search") as searched,
    ):
        for family in testbed.FAMILIES:
            config = TaskConfig(task=f"testbed:{family}", train_size=arguments.prompts, eval_size=64)
            task = load_task(config, "train")
            for role, path in PATHS.items():
                model, tokenizer = AutoModelForCausalLM.from_pretrained(path()), AutoTokenizer.from_pretrained(path())
                sampling = Sampling(
                    n=arguments.answers,
                    max_new_tokens=arguments.max_new_tokens,
                    batch_size=512,
                    seed=arguments.seed,
                )
                result = evaluate(model, tokenizer, task, sampling, progress=sampled.update)
                where = {"family": family, "model": role}
                accuracy = result.accuracy
                correct_PA = np.array(result.correct)
                models.append(
                    where
                    | {"accuracy": accuracy.mean, "accuracy_ci95": [accuracy.low, accuracy.high]}
                    | {"sd_of_one_score": one_score_sd(correct_PA, arguments.validation_size)}
                )
                fresh += [where | row for row in fresh_noise(correct_PA, arguments, arguments.seed)]
                if role in arguments.perturbed:
                    rows = shared_noise(model, tokenizer, task, arguments, searched)
                    shared += [where | row for row in rows]
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    return {
        "settings": settings | {"scales": SCALES},
        "versions": versions(("torch", "transformers", "numpy")),
        "models": models,
        "no_ties": no_ties(),
        "fresh_noise": fresh,
        "shared_noise": shared,
    }


def one_score_sd(correct_PA: np.ndarray, size: int) -> float:
    """Standard deviation of an accuracy on `size` fixed prompts, from sampling noise alone."""
    answers = correct_PA.shape[1]
    p = correct_PA.mean(1)
    return float(np.sqrt((p * (1 - p)).mean() * answers / (answers - 1) / size))


def markdown(results: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    head = (
        "| family | model | {} | gate | first tied | first accepted | mean scale | … if any accepted | last accepted |"
    )
    lines = ["Fresh sampling noise, unchanged model", "", head.format("prompts"), "|---" * 9 + "|"]
    limit = results["no_ties"]
    lines.append(
        f"| *never a tie* | | | | 0 | {limit['first_accepted']:.3f} | {limit['mean_scale']:.2f} "
        f"| {limit['mean_scale_if_accepted']:.2f} | {limit['last_accepted']:.4f} |"
    )
    lines += [_line(row, str(row["validation_size"]), False) for row in results["fresh_noise"]]
    lines += ["", "Shared sampling noise: candidates along a random direction", "", head.format("ε"), "|---" * 9 + "|"]
    lines += [_line(row, f"{row['relative_size']:g}", True) for row in results["shared_noise"]]
    return "\n".join(lines)


def _line(row: dict[str, Any], setting: str, intervals: bool) -> str:
    def share(name: str) -> str:
        low, high = row[f"{name}_ci95"]
        return f"{row[name]:.2f} [{low:.2f}, {high:.2f}]" if intervals else f"{row[name]:.4f}"

    if_accepted = row["mean_scale_if_accepted"]
    return (
        f"| {row['family']} | {row['model']} | {setting} | {row['gate']} | {row['first_tied']:.2f} "
        f"| {share('first_accepted')} | {row['mean_scale']:.2f} "
        f"| {'–' if if_accepted is None else format(if_accepted, '.2f')} | {share('last_accepted')} |"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=400, help="training prompts to draw validation prompts from")
    parser.add_argument("--answers", type=int, default=32, help="answers per prompt")
    parser.add_argument("--searches", type=int, default=20000, help="replayed searches per row, first table")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[50, 200, 400], help="numbers of validation prompts, first table"
    )
    parser.add_argument("--repeats", type=int, default=100, help="real searches per row, second table")
    parser.add_argument("--validation_size", type=int, default=50, help="number of validation prompts, second table")
    parser.add_argument(
        "--relative",
        type=float,
        nargs="+",
        default=[1e-6, 1e-5, 1e-4, 1e-3],
        help="relative norms ε of the random direction",
    )
    parser.add_argument(
        "--perturbed", nargs="*", choices=list(PATHS), default=["student"], help="second table: models"
    )
    parser.add_argument("--max_new_tokens", type=int, default=24, help="length limit of an answer, in tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if max(*arguments.sizes, arguments.validation_size) > arguments.prompts:
        parser.error(f"--sizes and --validation_size: expected at most --prompts {arguments.prompts}")
    if arguments.answers <= len(SCALES):
        parser.error(f"--answers must be at least {len(SCALES) + 1}: every scoring of a search uses a new answer")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    quiet()
    results = measure(arguments)
    if arguments.out is not None:
        text = json.dumps(results, indent=1) + "\n"
        write_atomically(arguments.out, lambda path: path.write_text(text))
    print(markdown(results))


if __name__ == "__main__":
    main()
