"""How the held-out KL is spread over answers, and what a set of 128 prompts says about it.

    python benchmarks/kl_tail.py testbed:student runs/tail/…/seed-6 runs/tail/…/seed-7

One answer per prompt, sampled at temperature 1, exact reverse KL to the teacher. A row per model:
KL per token on all prompts, shares of the KL in the answers with the largest KL, and the KL on
disjoint sets of prompts. Used by docs/log/2026-11-29-a-few-answers-decide-the-last-targets.md.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from effopd.distill.divergence import answer_kls
from effopd.models.files import load_model, load_tokenizer
from effopd.report.compare_lookup import table
from effopd.tasks import TaskConfig, load_task
from effopd.tasks.builtin_models import resolve_model
from effopd.tasks.generate import generate
from effopd.tasks.sampling import Sampling

SHARES = (0.01, 0.05, 0.1, 0.25)


def spread(kls: np.ndarray, tokens: np.ndarray, size: int) -> list[str]:
    """Cells of a row.

    Args:
        kls: KL of every answer, summed over its tokens, in nats.
        tokens: number of tokens of every answer.
        size: prompts per set.
    """
    largest = np.sort(kls)[::-1].cumsum() / kls.sum()
    sets = [kls[i : i + size].sum() / tokens[i : i + size].sum() for i in range(0, len(kls) - size + 1, size)]
    shares = [f"{largest[max(1, round(share * len(kls))) - 1]:.0%}" for share in SHARES]
    return [f"{kls.sum() / tokens.sum():.4f}", *shares, f"{min(sets):.4f}–{max(sets):.4f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model folders, Hub ids or testbed:student")
    parser.add_argument("--teacher", default="testbed:teacher")
    parser.add_argument("--task", default="testbed:chain_sum")
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--set_size", type=int, default=128, help="prompts per disjoint set")
    parser.add_argument("--max_new_tokens", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    teacher = load_model("--teacher", resolve_model(arguments.teacher))
    task = load_task(TaskConfig(task=arguments.task, train_size=16, eval_size=arguments.prompts), "eval")
    sampling = Sampling(max_new_tokens=arguments.max_new_tokens, batch_size=256, temperature=1.0)
    rows = []
    for name in arguments.models:
        student = load_model("MODEL", resolve_model(name))
        tokenizer = load_tokenizer("MODEL", resolve_model(name))
        vocab_size = min(model.config.get_text_config().vocab_size for model in (student, teacher))
        answers = generate(
            student, tokenizer, [example.prompt for example in task.examples], sampling, vocab_size=vocab_size
        )
        ids = [answer.completion_ids for answer in answers]
        found = answer_kls(
            student, teacher, [answer.prompt_ids for answer in answers], ids, vocab_size=vocab_size,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        kls = np.array([each.kl for each in found])
        rows.append([f"`{name}`", *spread(kls, np.array(list(map(len, ids))), arguments.set_size)])
    heads = [f"in the largest {share:.0%}" for share in SHARES]
    print(table(["model", "KL per token", *heads, f"KL on sets of {arguments.set_size}"], rows))


if __name__ == "__main__":
    main()
