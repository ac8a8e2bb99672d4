"""Students and teachers for two tasks on which no rule of any strategy was chosen.

    .venv/bin/python benchmarks/held_out_pair.py number_filtering
    .venv/bin/python benchmarks/held_out_pair.py letter_counting
        runs/held-out/TASK/student, …/teacher, …/card.json
    effopd compare recipes/compare-held-out.yaml
    effopd compare --report runs/held-out-pairs --out docs/held_out

Both tasks are reasoning-gym's. Training follows the testbed's recipe: supervised training of the
student uses worked answers with falsified steps, so the most likely answer is correct, a sampled
one rarely.

    number_filtering   "Remove all numbers smaller than 4 in this list: ['3', '8', '1']", three to
                       five numbers; each decision to keep one is falsified with probability 0.22.
                       Student: three wide layers, 0.93M parameters. Teacher: it after GRPO.
    letter_counting    "How many times does the letter "e" appear in the text: "these words"?", two
                       words; each count is falsified with probability 0.1. Student: six narrow
                       layers, 0.68M parameters. Teacher: its own initialization, 2.4M parameters,
                       supervised on correct answers.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import Qwen3ForCausalLM

from effopd.commands.quickstart import quiet
from effopd.common.files import write_atomically
from effopd.errors import ConfigError
from effopd.tasks import Example, TaskConfig, load_task
from effopd.tasks.evaluate import evaluate
from effopd.tasks.sampling import Sampling
from effopd.tasks.testbed_families import question
from effopd.testbed.base_training import BaseSettings, ModelSettings, new_model, train_base
from effopd.testbed.measure import rollout_kl
from effopd.testbed.recipe import save
from effopd.testbed.rl import RLSettings, train_teacher
from effopd.testbed.tokenizer import build_tokenizer

Worked = Callable[[Example, random.Random, float], str]


def filtering(example: Example, rng: random.Random, corruption: float) -> str:
    """Every number with y (it stays) or n, then the resulting list."""
    entry = example.metadata["entry"]
    numbers, correct = entry["metadata"]["original_numbers"], set(ast.literal_eval(entry["answer"]))
    stays = [(number in correct) != (rng.random() < corruption) for number in numbers]
    decisions = " ".join(number + "ny"[stay] for number, stay in zip(numbers, stays, strict=True))
    return f"{decisions} <answer>{[n for n, stay in zip(numbers, stays, strict=True) if stay]}</answer>"


def counting(example: Example, rng: random.Random, corruption: float) -> str:
    """Every letter with the count so far, then the last count."""
    ((letter, text),) = re.findall(r'letter "(.)".*text: "(.*)"\?', question(example))
    count, steps = 0, []
    for character in text.replace(" ", ""):
        count += (character.lower() == letter.lower()) != (rng.random() < corruption)
        steps.append(f"{character}{count}")
    return f"{''.join(steps)} <answer>{count}</answer>"


@dataclass(frozen=True)
class Pair:
    """Task and models of a pair.

    Attributes:
        starts: beginnings of the questions; each becomes one token.
        phrases: constant parts inside the questions; each becomes one token.
        corruption: probability that a step of the student's worked answers is falsified.
        limit: longest answer in tokens, as in the recipe.
        wide: shape of a teacher with its own initialization; `None`: the student after GRPO.
    """

    task_args: dict[str, Any]
    starts: Sequence[str]
    phrases: Sequence[str]
    worked: Worked
    corruption: float
    limit: int
    student: ModelSettings
    wide: ModelSettings | None = None


#: Supervised training of every model.
BASE = BaseSettings(steps=600, batch_size=64, warmup_steps=20, optimizer="muon")


PAIRS = {
    "number_filtering": Pair(
        task_args={
            "min_numbers": 3,
            "max_numbers": 5,
            "min_decimals": 0,
            "max_decimals": 0,
            "min_value": 0,
            "max_value": 9,
        },
        starts=[f"{verb} all numbers {which}" for verb in ("Keep", "Remove") for which in ("larger", "smaller")],
        phrases=["\nReturn the new list in the same format."],
        worked=filtering,
        corruption=0.22,
        limit=40,
        student=ModelSettings(160, 480, 3, 5, 1),
    ),
    "letter_counting": Pair(
        task_args={"min_words": 2, "max_words": 2},
        starts=["How many"],
        phrases=['" appear in the text: "'],
        worked=counting,
        corruption=0.1,
        limit=64,
        student=ModelSettings(96, 288, 6, 3, 1),
        wide=ModelSettings(256, 768, 3, 8, 4),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=PAIRS)
    parser.add_argument("--output_dir", type=Path, help="default: runs/held-out/TASK")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base_steps", type=int, default=BASE.steps)
    parser.add_argument("--rl_steps", type=int, default=120)
    arguments = parser.parse_args()
    pair, seed = PAIRS[arguments.task], arguments.seed
    out = arguments.output_dir or Path("runs/held-out") / arguments.task
    base = replace(BASE, steps=arguments.base_steps)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--output_dir {out} is not empty. Choose another folder (nothing was changed).")
    quiet()
    torch.set_num_threads(1)  # the resulting weights depend on it
    task = TaskConfig(
        task=f"reasoning-gym:{arguments.task}",
        task_args=pair.task_args,
        prompt_suffix="",
        train_size=12_000,
        eval_size=256,
    )
    train, held_out = load_task(task, "train"), load_task(task, "eval")
    examples = list(train.examples)
    tokenizer = build_tokenizer(
        [[question(e) for e in examples if question(e).startswith(start)] for start in pair.starts]
    )
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in pair.phrases])

    def supervised(shape: ModelSettings, corruption: float) -> Qwen3ForCausalLM:
        model = new_model(tokenizer, shape, seed)
        write = partial(pair.worked, corruption=corruption)
        train_base(model, tokenizer, examples, base, seed, print_now, write=write)
        return model

    student = supervised(pair.student, pair.corruption)
    save(student, tokenizer, out / "student")
    if pair.wide is not None:
        teacher = supervised(pair.wide, 0.0)
    else:
        rl = RLSettings(steps=arguments.rl_steps, max_completion_length=pair.limit)
        teacher = deepcopy(student)
        train_teacher(teacher, tokenizer, examples[: rl.questions], rl, seed, print_now, train.verify)
    save(teacher, tokenizer, out / "teacher")
    models = {"student": student, "teacher": teacher}
    card: dict = {"parameters": {role: sum(p.numel() for p in m.parameters()) for role, m in models.items()}}
    card |= {"seed": seed, "accuracy": {}}
    for role, model in models.items():
        for decoding, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            sampling = Sampling(max_new_tokens=pair.limit, temperature=temperature, batch_size=256, seed=seed)
            result = evaluate(model, tokenizer, held_out, sampling)
            card["accuracy"][f"{role}, {decoding}"] = [result.accuracy.mean, result.accuracy.low, result.accuracy.high]
    card["kl_at_start"] = rollout_kl(student, teacher, tokenizer, held_out.examples, pair.limit, seed)
    write_atomically(out / "card.json", lambda path: path.write_text(json.dumps(card, indent=1) + "\n"))
    print(json.dumps(card, indent=1))


def print_now(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
