"""Gradient variance of the sampled losses against the full one, and agreement of Δ between seeds.

    python benchmarks/gradient_variance.py run     # docs/neighbours/variance.json, then the tables
    python benchmarks/gradient_variance.py page    # the tables of docs/neighbours.md only

Three measures for every loss of `LOSSES`, on the built-in pair:

- empirical: Σ Var(g) over parameters, from the gradients of `BATCHES` batches of 32 prompts with
  one rollout each. All losses see the same rollouts, at the weights of the start and after `WARM`
  steps of plain OPD.
- Adam: Σ(v̂ − m̂²) over parameters, from the bias-corrected moments at the end of a real run.
- agreement: cosine of Δ = W_t − W_{t/2} at t = 2ⁿ between two seeds, that is between runs with
  other prompts and other rollouts.

The empirical variance is relative to ‖mean gradient‖²: at 1, the noise of one batch is as long as
the gradient. Both estimators are those of vOPD's code (arXiv 2605.07865).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pages import DOCS, rewrite
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from effopd import OPDConfig, OPDTrainer
from effopd.common.files import write_atomically
from effopd.report.compare_lookup import table
from effopd.tasks import TaskConfig, load_task
from effopd.tasks.builtin_models import student_path, teacher_path

RESULTS = DOCS / "neighbours" / "variance.json"
TASK, LENGTH, PROMPTS, STEPS, RATE = "testbed:chain_sum", 24, 32, 16, 1.5e-4
#: Batches of the empirical variance, and steps of plain OPD before its second place.
BATCHES, WARM = 32, 8
LOSSES: dict[str, dict[str, Any]] = {
    "full reverse KL": {},
    "sampled": {"loss_type": "sampled"},
    "sampled, value baseline (vOPD)": {"loss_type": "sampled", "baseline": "value"},
    "sampled, optimal baseline": {"loss_type": "sampled", "baseline": "optimal"},
    "sampled, 8 per prefix": {"loss_type": "sampled", "samples_per_prefix": 8},
}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All elements as one float64 vector."""
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def total_variance(gradients: Sequence[Tensor]) -> tuple[float, float]:
    """Unbiased Σ Var(g) and ‖E g‖² from independent gradients.

    Example:
        >>> total_variance([torch.tensor([1.0, 3.0]), torch.tensor([3.0, 3.0])])
        (2.0, 12.0)
    """
    stacked = torch.stack(list(gradients))
    mean = stacked.mean(0)
    variance = float((stacked - mean).square().sum()) / (len(stacked) - 1)
    return variance, float(mean.square().sum()) - variance / len(stacked)


def adam_variance(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Σ(v̂ − m̂²) and Σ m̂² over all parameters, from Adam's bias-corrected moments."""
    second = first = 0.0
    for group in optimizer.param_groups:
        low, high = group["betas"]
        for parameter in group["params"]:
            if state := optimizer.state.get(parameter):
                step = float(state["step"])
                second += float(state["exp_avg_sq"].double().sum()) / (1 - high**step)
                first += float(state["exp_avg"].double().square().sum()) / (1 - low**step) ** 2
    return second - first, first


class Updates(TrainerCallback):
    """Δ = W_t − W_{t/2} at t = 2, 4, 8, …, and Adam's variance at the end."""

    def __init__(self) -> None:
        self.deltas: dict[int, Tensor] = {}
        self.adam = (0.0, 0.0)
        self._before: Tensor | None = None

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        """Record Δ at powers of two."""
        step = state.global_step
        if step & (step - 1) == 0:
            now = flat(model.parameters())
            if self._before is not None:
                self.deltas[step] = now - self._before
            self._before = now
        if step == state.max_steps:
            self.adam = adam_variance(getattr(optimizer, "optimizer", optimizer))


def trainer_of(folder: Path, seed: int, steps: int, model: Any = None, **loss: Any) -> OPDTrainer:
    """Trainer of the built-in pair on prompts of `seed`; `model`: default, the built-in student."""
    values: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": PROMPTS, "max_completion_length": LENGTH, "seed": seed,
        "learning_rate": RATE, "save_strategy": "no", "eval_strategy": "no", "use_cpu": True, "report_to": "none",
        "activation_checkpointing": False, "disable_tqdm": True, "health_tokens": 0,
    }  # fmt: skip
    task = load_task(TaskConfig(task=TASK, train_size=steps * PROMPTS, task_seed=seed), "train")
    student = model if model is not None else AutoModelForCausalLM.from_pretrained(student_path()).float()
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path()).float()
    tokenizer = AutoTokenizer.from_pretrained(student_path(), padding_side="left")
    config = OPDConfig(output_dir=str(folder), **values | loss)
    return OPDTrainer(student, teacher, config, train_dataset=task.to_dataset(), processing_class=tokenizer)


def empirical(folder: Path, seed: int, model: Any = None) -> dict[str, tuple[float, float]]:
    """Σ Var(g) and ‖E g‖² of every loss, on the same rollouts of `BATCHES` batches."""
    trainer = trainer_of(folder, seed, BATCHES, model)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    names = ("loss_type", "baseline", "samples_per_prefix")
    default = {name: getattr(trainer.args, name) for name in names}
    gradients: dict[str, list[Tensor]] = {name: [] for name in LOSSES}
    for batch in trainer.get_train_dataloader():
        inputs = trainer._prepare_inputs(batch)
        items = (inputs["completion_mask"] != 0).sum()
        for name, loss in LOSSES.items():
            for key, value in (default | loss).items():
                setattr(trainer.args, key, value)
            trainer.model.zero_grad()
            trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=items).backward()
            gradients[name].append(flat(p.grad for p in trainer.model.parameters() if p.grad is not None))
        trainer._step += 1
    return {name: total_variance(each) for name, each in gradients.items()}


def run(seeds: Sequence[int]) -> dict[str, Any]:
    """All three measures, JSON-ready."""
    results: dict[str, Any] = {"task": TASK, "prompts": PROMPTS, "rate": RATE, "steps": STEPS, "seeds": list(seeds)}
    with tempfile.TemporaryDirectory() as scratch:
        warm = trainer_of(Path(scratch) / "warm", 99, WARM)
        warm.train()
        results["empirical"] = {
            "0": empirical(Path(scratch) / "start", 0),
            f"{WARM}": empirical(Path(scratch) / "later", 0, warm.model),
        }
        results["adam"], results["cosine"] = {}, {}
        for name, loss in LOSSES.items():
            watched = []
            for seed in seeds:
                updates = Updates()
                trainer = trainer_of(Path(scratch) / f"{len(results['adam'])}-{seed}", seed, STEPS, **loss)
                trainer.add_callback(updates)
                trainer.train()
                watched.append(updates)
            results["adam"][name] = [each.adam for each in watched]
            results["cosine"][name] = {
                str(step): [
                    float(torch.nn.functional.cosine_similarity(a.deltas[step], b.deltas[step], dim=0))
                    for a, b in itertools.combinations(watched, 2)
                ]
                for step in watched[0].deltas
            }
            print(name, results["adam"][name], results["cosine"][name], flush=True)
    return results


def blocks(results: Mapping[str, Any]) -> dict[str, str]:
    """The page's tables: variances over ‖mean gradient‖² and over the full loss's; cosines of Δ."""
    places, full = list(results["empirical"]), "full reverse KL"
    steps = list(results["cosine"][full])
    adam = {name: statistics.median(variance for variance, _ in results["adam"][name]) for name in LOSSES}
    rows, agreement = [], []
    for name in LOSSES:
        cells = []
        for place in places:
            measured = results["empirical"][place]
            # all losses have the same expected gradient; the full loss estimates it best
            cells += [f"{measured[name][0] / measured[full][1]:.1f}", f"{measured[name][0] / measured[full][0]:.1f}×"]
        rows.append([name, *cells, f"{adam[name] / adam[full]:.1f}×"])
        agreement.append([
            name, *(f"{statistics.mean(results['cosine'][name][step]):.2f}" for step in steps)
        ])  # fmt: skip
    head = ["loss", *(text for p in places for text in (f"variance / ‖g‖², step {p}", "over full"))]
    return {
        "variance": table([*head, f"Adam's moments, step {results['steps']}, over full"], rows),
        "agreement": table(["loss", *(f"t = {step}" for step in steps)], agreement),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "page"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="run: seeds of the real runs")
    arguments = parser.parse_args()
    if arguments.what == "run":
        results = run(arguments.seeds)
        write_atomically(RESULTS, lambda path: path.write_text(json.dumps(results) + "\n"))
    rewrite(DOCS / "neighbours.md", blocks(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
