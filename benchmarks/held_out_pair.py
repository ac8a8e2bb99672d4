"""Student and teacher for a task that was not used to choose any rule of `line_search`.

    .venv/bin/python benchmarks/held_out_pair.py
        runs/held-out/student, …/teacher, …/card.json
    effopd compare recipes/compare-held-out.yaml
    effopd compare --report runs/compare-held-out --out docs/held_out

The task is reasoning-gym's `number_filtering` with three to five one-digit numbers ("Remove all
numbers smaller than 4 in this list: ['3', '8', '1']"). Training follows the testbed's recipe.
Supervised training uses worked answers in which each decision to keep a number is falsified with
probability 0.22: the most likely answer is correct, a sampled one rarely. GRPO follows. The model
has three wide layers instead of four, 0.9M parameters.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
from copy import deepcopy
from pathlib import Path

import torch
from tokenizers import AddedToken

from effopd.commands.quickstart import quiet
from effopd.common.files import write_atomically
from effopd.errors import ConfigError
from effopd.tasks import Example, TaskConfig, load_task
from effopd.tasks.evaluate import evaluate
from effopd.tasks.sampling import Sampling
from effopd.tasks.testbed_families import question
from effopd.testbed.base_training import BaseSettings, ModelSettings, new_model, train_base
from effopd.testbed.recipe import save
from effopd.testbed.rl import RLSettings, train_teacher
from effopd.testbed.tokenizer import build_tokenizer

#: As in recipes/compare-held-out.yaml.
TASK = TaskConfig(
    task="reasoning-gym:number_filtering",
    task_args={
        "min_numbers": 3,
        "max_numbers": 5,
        "min_decimals": 0,
        "max_decimals": 0,
        "min_value": 0,
        "max_value": 9,
    },
    prompt_suffix="",
    train_size=12_000,
    eval_size=256,
)
SHAPE = ModelSettings(
    hidden_size=160, intermediate_size=480, num_hidden_layers=3, num_attention_heads=5, num_key_value_heads=1
)
CORRUPTION = 0.22
OPERATIONS = (
    "Keep all numbers larger",
    "Keep all numbers smaller",
    "Remove all numbers larger",
    "Remove all numbers smaller",
)
ENDING = "\nReturn the new list in the same format."


def worked(example: Example, rng: random.Random) -> str:
    """Worked answer: every number with y (it stays) or n, then the resulting list.

    Each decision is falsified with probability `CORRUPTION`.
    """
    entry = example.metadata["entry"]
    numbers, correct = entry["metadata"]["original_numbers"], set(ast.literal_eval(entry["answer"]))
    stays = [(number in correct) != (rng.random() < CORRUPTION) for number in numbers]
    decisions = " ".join(number + "ny"[stay] for number, stay in zip(numbers, stays, strict=True))
    return f"{decisions} <answer>{[n for n, stay in zip(numbers, stays, strict=True) if stay]}</answer>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/held-out"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base_steps", type=int, default=1200)
    parser.add_argument("--rl_steps", type=int, default=120)
    arguments = parser.parse_args()
    out, seed = arguments.output_dir, arguments.seed
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--output_dir {out} is not empty. Choose another folder (nothing was changed).")
    quiet()
    torch.set_num_threads(1)  # the resulting weights depend on it
    train, held_out = load_task(TASK, "train"), load_task(TASK, "eval")
    examples = list(train.examples)
    starts = [[question(e) for e in examples if question(e).startswith(start)] for start in OPERATIONS]
    tokenizer = build_tokenizer(starts)
    tokenizer.add_tokens([AddedToken(ENDING, normalized=False)])
    rl = RLSettings(steps=arguments.rl_steps, max_completion_length=40)
    student = new_model(tokenizer, SHAPE, seed)
    train_base(student, tokenizer, examples, BaseSettings(steps=arguments.base_steps), seed, write=worked)
    save(student, tokenizer, out / "student")
    teacher = deepcopy(student)
    train_teacher(teacher, tokenizer, examples[: rl.questions], rl, seed, verify=train.verify)
    save(teacher, tokenizer, out / "teacher")
    card: dict = {"parameters": sum(p.numel() for p in student.parameters()), "seed": seed, "accuracy": {}}
    for role, model in {"student": student, "teacher": teacher}.items():
        for decoding, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            sampling = Sampling(max_new_tokens=40, temperature=temperature, batch_size=256, seed=seed)
            result = evaluate(model, tokenizer, held_out, sampling)
            card["accuracy"][f"{role}, {decoding}"] = [result.accuracy.mean, result.accuracy.low, result.accuracy.high]
    write_atomically(out / "card.json", lambda path: path.write_text(json.dumps(card, indent=1) + "\n"))
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
