"""Measurements of the recipe: accuracies of the pair, and a reference run of plain distillation."""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM, TrainerCallback

from effopd.distill.divergence import reverse_kl_of_completions
from effopd.errors import ConfigError
from effopd.tasks.base import Example
from effopd.tasks.evaluate import evaluate
from effopd.tasks.generate import generate
from effopd.tasks.sampling import Sampling
from effopd.tasks.testbed_families import FAMILIES, family_task, mixed_examples
from effopd.testbed.rl import run_quietly, trainer_defaults


@dataclass(frozen=True)
class MeasureSettings:
    """Sizes of the measurements.

    Attributes:
        questions: test questions per family for the accuracies.
        opd_steps: steps of the reference distillation run; 0: no reference run.
        opd_train_questions: training questions per family in the reference run.
        opd_held_out: validation prompts, both families together, for the held-out KL.
        opd_every: steps between measurements of the held-out KL.
    """

    questions: int = 1000
    opd_steps: int = 100
    opd_train_questions: int = 8_000
    opd_held_out: int = 256
    opd_every: int = 4

    def __post_init__(self) -> None:
        for name in ("questions", "opd_train_questions", "opd_held_out", "opd_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"measure.{name}: expected at least 1, got {getattr(self, name)}. Raise it.")


def measure_accuracy(
    models: dict[str, Qwen3ForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    size: int,
    max_new_tokens: int,
    seed: int,
    families: Iterable[str] = FAMILIES,
) -> list[dict[str, Any]]:
    """Test accuracy: one row per model, family and decoding (temperature 1, greedy).

    `accuracy` is the share of answers with score 1; `ci95` is its 95 % Wilson interval.
    """
    rows = []
    for role, model in models.items():
        for family in families:
            task = family_task(family, "test", size, seed)
            for decoding, temperature in (("sampled", 1.0), ("greedy", 0.0)):
                sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, batch_size=250, seed=seed)
                result = evaluate(model, tokenizer, task, sampling)
                accuracy = result.accuracy
                rows.append(
                    {
                        "model": role, "family": family, "decoding": decoding, "accuracy": round(accuracy.mean, 4),
                        "ci95": [round(accuracy.low, 4), round(accuracy.high, 4)], "n": accuracy.n,
                        "mean_length": round(sum(result.lengths) / len(result.lengths), 2),
                        "truncated_share": round(result.truncated_share, 4),
                    }
                )  # fmt: skip
    return rows


def rollout_kl(
    student: Qwen3ForCausalLM,
    teacher: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_new_tokens: int,
    seed: int,
) -> float:
    """Exact reverse KL(student ‖ teacher) on fresh student rollouts, in nats per token.

    The mean is over all completion tokens; the rollouts have one sampling seed.
    """
    prompts = [example.prompt for example in examples]
    sampling = Sampling(max_new_tokens=max_new_tokens, batch_size=len(prompts), seed=seed)
    rollouts = generate(student, tokenizer, prompts, sampling)
    sums, counts = reverse_kl_of_completions(
        student,
        teacher,
        [rollout.prompt_ids for rollout in rollouts],
        [rollout.completion_ids for rollout in rollouts],
        vocab_size=student.config.vocab_size,
        pad_token_id=tokenizer.pad_token_id,
    )
    return sum(sums) / sum(counts)


def measure_reference_opd(
    student: Qwen3ForCausalLM,
    teacher: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    reference: dict[str, Any],
    settings: MeasureSettings,
    seed: int,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Plain on-policy distillation with TRL's `DistillationTrainer`; neither model is changed.

    Args:
        reference: arguments of `trl.DistillationConfig`, see
            `effopd.tasks.builtin_models.reference_settings`.

    Returns:
        A dictionary with, among others:

        - `held_out_kl`: [step, exact reverse KL in nats per token] on fresh student rollouts with
          one fixed sampling seed.
        - `steps_to_90_percent`: first measured step with at most 10 % of the KL at step 0; `None`:
          not reached.
        - `median_seconds_per_step`: without the time of the measurements.
    """
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    student, per_family = copy.deepcopy(student), max(1, settings.opd_held_out // len(FAMILIES))
    held_out = mixed_examples("validation", per_family, seed)
    train = mixed_examples("train", settings.opd_train_questions, seed)
    random.Random(seed).shuffle(train)

    def held_out_kl() -> float:
        return rollout_kl(student, teacher, tokenizer, held_out, reference["max_completion_length"], seed)

    watch = _WatchKL(held_out_kl, settings.opd_every, log)
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder, max_steps=settings.opd_steps, seed=seed, **{**trainer_defaults(), **reference}
        )
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": example.prompt} for example in train]),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        run_quietly(trainer)
    start = watch.curve[0][1]
    return {
        "seed": seed,
        "held_out_prompts": len(held_out),
        "held_out_kl_start": start,
        "held_out_kl_end": watch.curve[-1][1],
        "steps_to_90_percent": next((step for step, kl in watch.curve if kl <= 0.1 * start), None),
        "measured_every": settings.opd_every,
        "median_seconds_per_step": round(float(torch.tensor(watch.seconds).median()), 3),
        "held_out_kl": [[step, round(kl, 6)] for step, kl in watch.curve],
        "settings": dict(reference),
    }


class _WatchKL(TrainerCallback):
    """Measure the held-out KL every few steps, outside the timed seconds of a step."""

    def __init__(self, measure: Callable[[], float], every: int, log: Callable[[str], None]) -> None:
        self.measure, self.every, self.log = measure, every, log
        self.curve: list[tuple[int, float]] = []
        self.seconds: list[float] = []
        self._mark = 0.0

    def _measure(self, step: int) -> None:
        self.curve.append((step, self.measure()))
        self.log(f"opd step {step}: held-out reverse KL {self.curve[-1][1]:.5f}")
        self._mark = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self._measure(0)

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds.append(now - self._mark)
        self._mark = now
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step)
