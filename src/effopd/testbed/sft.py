"""`effopd testbed sft`: a short supervised start of a real model on worked answers, before GRPO.

A model that never answers right gets no reward, so GRPO alone cannot start. Some hundred worked
answers teach it the form of an answer; `effopd rl` goes on from there.

    chain_sum     "State the final …: 12 + 5 - 3 ="      →  12 + 5 = 17↵17 - 3 = 14
    products      "Solve the following …: 34 * 27. …"    →  34 * 27 = 680 + 238 = 918
    leg_counting  "… if you have 1 butterfly, 8 crabs?"  →  1 * 6 = 6↵8 * 10 = 80↵6 + 80 = 86

The result is graded by its last number (`effopd.tasks.verify:last_number`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from effopd.common.files import write_atomically
from effopd.common.optional import require
from effopd.common.versions import versions
from effopd.errors import ConfigError
from effopd.models.files import load_model, load_tokenizer
from effopd.tasks.base import Example
from effopd.tasks.builtin_models import spoken_name
from effopd.tasks.config import TaskConfig
from effopd.tasks.evaluate import evaluate
from effopd.tasks.load import load_task
from effopd.tasks.sampling import Sampling
from effopd.testbed.base_training import BaseSettings, train_base


@dataclass(frozen=True)
class WorkedTask:
    """A reasoning-gym task with worked answers.

    Attributes:
        args: parameters of the dataset.
        max_new_tokens: enough for every worked answer and its end token.
        write: reasoning-gym's entry → worked answer, which ends with the right number.
    """

    args: Mapping[str, Any]
    max_new_tokens: int
    write: Callable[[Mapping[str, Any]], str]

    def config(self, name: str, train_size: int, eval_size: int, task_seed: int = 0) -> TaskConfig:
        """The task's settings, as the recipes have them."""
        return TaskConfig(
            task=f"reasoning-gym:{name}", task_args=dict(self.args), prompt_suffix="", system_prompt=SYSTEM_PROMPT,
            verifier=VERIFIER, train_size=train_size, eval_size=eval_size, task_seed=task_seed,
        )  # fmt: skip


SYSTEM_PROMPT = "Answer briefly."
VERIFIER = "effopd.tasks.verify:last_number"


def chain_sum(entry: Mapping[str, Any]) -> str:
    """One line per sum of two numbers."""
    tokens = entry["metadata"]["expression"].split()
    total, lines = int(tokens[0]), []
    for sign, term in zip(tokens[1::2], tokens[2::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return "\n".join(lines)


def products(entry: Mapping[str, Any]) -> str:
    """Product by the tens and the ones of the last number that has both."""
    a, b = map(int, entry["metadata"]["expression"].split(" * "))
    split, other = (b, a) if b >= 10 or a < 10 else (a, b)
    parts = [part * other for part in (split // 10 * 10, split % 10) if part]
    sums = [" + ".join(map(str, parts))] if len(parts) > 1 else []
    return " = ".join([f"{a} * {b}", *sums, str(a * b)])


def leg_counting(entry: Mapping[str, Any]) -> str:
    """One line per animal, then one per sum."""
    legs = require("reasoning_gym.arithmetic.leg_counting").ANIMALS
    counts = entry["metadata"]["animals"]
    lines = [f"{n} * {legs[animal]} = {n * legs[animal]}" for animal, n in counts.items()]
    products = [n * legs[animal] for animal, n in counts.items()]
    for i in range(1, len(products)):
        lines.append(f"{sum(products[:i])} + {products[i]} = {sum(products[: i + 1])}")
    return "\n".join(lines)


TASKS: dict[str, WorkedTask] = {
    "chain_sum": WorkedTask({"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}, 26, chain_sum),
    "products": WorkedTask({"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}, 24, products),
    "leg_counting": WorkedTask({"min_animals": 1, "max_animals": 2, "max_instances": 9}, 34, leg_counting),
}


@dataclass(frozen=True)
class SFTSettings:
    """Settings of the supervised start.

    Attributes:
        questions: training questions, each with its worked answer.
        test_questions: held-out questions of the measured accuracies; sampled at temperature 1.
    """

    questions: int = 800
    test_questions: int = 200
    training: BaseSettings = field(default_factory=lambda: _training(100, 1e-4))

    @classmethod
    def of(cls, steps: int, learning_rate: float) -> SFTSettings:
        """Settings with other steps and another peak rate; every question is used about once."""
        return cls(questions=max(1, 8 * steps), training=_training(steps, learning_rate))


def _training(steps: int, learning_rate: float) -> BaseSettings:
    """8 worked answers per step, a tenth of the steps as warm-up."""
    return BaseSettings(
        questions=8 * steps, steps=steps, batch_size=8, learning_rate=learning_rate, warmup_steps=max(1, steps // 10),
        weight_decay=0.0,
    )  # fmt: skip


def start(
    name: str, model: str, out: Path, seed: int = 0, settings: SFTSettings | None = None,
    log: Callable[[str], None] = print, device: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a copy of `model` on worked answers of a task; write model, tokenizer and `card.json`.

    Args:
        name: key of `TASKS`.
        model: folder or Hub id of the model.
        out: new or empty folder.
        seed: seed of the questions and of their order.
        device: device of the training; `None`: the CPU.

    Returns:
        The card: seed, settings, versions, accuracies before and after.

    Raises:
        ConfigError: the task is unknown.
    """
    settings = settings or SFTSettings()
    if name not in TASKS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {name!r}. Use one of these.")
    task = TASKS[name]
    config = task.config(name, train_size=settings.questions, eval_size=settings.test_questions, task_seed=seed)
    examples, test = load_task(config, "train").examples, load_task(config, "eval")
    torch.manual_seed(seed)
    tokenizer = load_tokenizer("--model_name_or_path", model)
    student = load_model("--model_name_or_path", model, dtype=torch.float32).to(device or "cpu")
    sampling = Sampling(max_new_tokens=task.max_new_tokens, batch_size=50, seed=seed)

    def accuracy(when: str) -> dict[str, float]:
        result = evaluate(student, tokenizer, test, sampling).accuracy
        log(f"{name} accuracy {when}: {result.mean:.3f} ({result.low:.3f} to {result.high:.3f}, n = {result.n})")
        return {"mean": result.mean, "low": result.low, "high": result.high, "n": result.n}

    before = accuracy("before")

    def write(example: Example, _: Any) -> str:
        return task.write(example.metadata["entry"])

    train_base(student, tokenizer, examples, settings.training, seed, log, write)
    card = {
        "task": name, "model": spoken_name(model), "seed": seed, "settings": asdict(settings),
        "versions": versions(("torch", "transformers", "reasoning-gym")),
        "accuracy": {"before": before, "after": accuracy("after")},
    }  # fmt: skip
    student.config.use_cache = True
    student.save_pretrained(out)
    tokenizer.save_pretrained(out)
    text = json.dumps(card, indent=1) + "\n"
    write_atomically(out / "card.json", lambda path: path.write_text(text, encoding="utf-8"))
    return card
