"""Parts `steps_random` and `steps_smollm2`: seconds and memory of a step and of a search.

steps_random    a random student of the shape of Qwen3-1.7B; its teacher in bfloat16
steps_smollm2   SmolLM2-135M-Instruct; its teacher is the student with noise
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import shutil
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from effopd import EffOPDCallback, EffOPDConfig, OPDConfig, OPDTrainer, TaskConfig, load_task
from effopd.extrapolate.live_weights import LiveWeights
from effopd.runs.ledger import CATEGORIES, synchronized_clock
from effopd.runs.records import StepRecord, read_searches, read_steps
from effopd.tasks.builtin_models import smollm2_path, student_path
from gpu_parts.plan import PARTS, REHEARSAL
from gpu_parts.results import Results, device

#: Share of noise by which a teacher differs from its student.
_NOISE = 0.05
#: Passes over the moved weights of a candidate: read origin and anchor, write.
_PASSES = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the measured steps.

    Attributes:
        steps: optimizer steps of a run.
        skipped: first steps, which are left out of the medians.
        rollouts: rollouts per step.
        tokens: longest answer.
        shape: `Qwen3Config` of the random student.
    """

    steps: int
    skipped: int
    rollouts: int
    tokens: int
    shape: dict[str, Any]


QWEN3_1_7B = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip
RANDOM = Sizes(2, 1, 4, 6, TINY) if REHEARSAL else Sizes(6, 2, 32, 128, QWEN3_1_7B)
SMOLLM2 = RANDOM if REHEARSAL else Sizes(6, 2, 64, 128, {})

Pair = tuple[Any, Any, Any]


def measure(results: Results, state: Path) -> None:
    """Measure the units of the part that have no result yet."""
    random = results.part == "steps_random"
    sizes, build = (RANDOM, random_pair) if random else (SMOLLM2, smollm2_pair)
    folder = state / "steps" / results.part
    for unit in PARTS[results.part].units:
        shutil.rmtree(folder, ignore_errors=True)
        if unit == "moves":
            results.run(unit, moves, least=15)
        else:
            bf16, look = settings_of(unit)
            results.run(unit, lambda bf16=bf16, look=look: step_costs(build(), folder, sizes, bf16, look), least=20)
        _free()


def settings_of(unit: str) -> tuple[bool, EffOPDConfig | None]:
    """(bf16 autocast, look-ahead) of a unit such as `line_search bf16, anchor in host memory`."""
    run, _, anchor = unit.partition(", ")
    strategy, precision = run.split()
    look = EffOPDConfig(strategy, anchor_device="cpu" if anchor else None) if strategy != "plain" else None
    return precision == "bf16", look


# -- models ----------------------------------------------------------------------------------------


def random_pair() -> Pair:
    """Random float32 student, bfloat16 teacher, and a tokenizer with fewer tokens."""
    tokenizer = AutoTokenizer.from_pretrained(student_path())
    torch.manual_seed(0)
    config = Qwen3Config(
        **RANDOM.shape, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.device(device()):
        student = Qwen3ForCausalLM(config).float()
    return student, _teacher(student, torch.bfloat16), tokenizer


def smollm2_pair() -> Pair:
    """SmolLM2-135M-Instruct and a teacher near it, in float32; in a rehearsal a tiny pair."""
    if REHEARSAL:
        return random_pair()
    folder = smollm2_path()
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device())
    return student, _teacher(student, torch.float32), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def _teacher(student: Any, dtype: torch.dtype) -> Any:
    teacher = copy.deepcopy(student).to(dtype)
    for parameter in teacher.parameters():
        parameter.mul_(1 + _NOISE * torch.randn_like(parameter))
    return teacher


# -- steps -----------------------------------------------------------------------------------------


def step_costs(pair: Pair, folder: Path, sizes: Sizes, bf16: bool, look_ahead: EffOPDConfig | None) -> dict[str, Any]:
    """Median seconds of a step by category, the searches, and peak memory in bytes."""
    student, teacher, tokenizer = pair
    task = load_task(TaskConfig(task="testbed:chain_sum", train_size=4 * sizes.rollouts), "train")
    config = OPDConfig(
        output_dir=str(folder), max_steps=sizes.steps, per_device_train_batch_size=sizes.rollouts,
        max_completion_length=sizes.tokens, learning_rate=1e-5, bf16=bf16, eval_strategy="no", save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=device() == "cpu",
    )  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = OPDTrainer(student, teacher, config, train_dataset=task.to_dataset(), processing_class=tokenizer)
    if look_ahead is not None:
        trainer.add_callback(EffOPDCallback(trainer, look_ahead))
    trainer.train()
    return {
        "parameters": sum(p.numel() for p in student.parameters()),
        "rollouts": sizes.rollouts,
        "seconds": median_seconds(read_steps(folder), sizes.skipped),
        "mean_length": statistics.mean(step.mean_length for step in read_steps(folder)),
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "searches": [
            {
                "seconds": search.seconds, "candidates": search.candidates, "scale": search.accepted_scale,
                "memory_bytes": search.memory_bytes, "scored": sum(t.seconds or 0.0 for t in search.trials),
            }
            for search in read_searches(folder)
        ],
    }  # fmt: skip


def median_seconds(steps: list[StepRecord], skipped: int) -> dict[str, float]:
    """Median seconds per step by category, after the first steps; `net`: without evaluation."""
    names = [name for name in (*CATEGORIES, "net") if name != "eval"]
    totals = {name: [getattr(step.costs, f"{name}_seconds") or 0.0 for step in steps] for name in names}
    return {
        name: statistics.median(after - before for before, after in pairwise(total[skipped - 1 :]))
        for name, total in totals.items()
    }


# -- moves -----------------------------------------------------------------------------------------


@torch.no_grad()
def moves() -> dict[str, Any]:
    """Seconds of the moves of all weights of the random student, by place of the anchor.

    `share`: bytes that a candidate moves per second, relative to a plain copy's.
    """
    student, _, _ = random_pair()
    numel = sum(p.numel() for p in student.parameters())
    bandwidth = copy_bandwidth()
    found: dict[str, Any] = {"parameters": numel, "copy_bytes_per_second": bandwidth}
    for place in (None, "cpu"):
        weights = LiveWeights(student, "all", place)
        for parameter in student.parameters():
            parameter.mul_(1.001)
        seconds = {
            "begin": _seconds(weights.begin),
            "candidate": _seconds(lambda weights=weights: weights.move_to(2.0)),
            "restore": _seconds(weights.restore),
            "norm": _seconds(weights.displacement_norm),
        }
        weights.abort()
        weights.begin()
        seconds["commit"] = _seconds(weights.commit, repeats=1)
        if place is None:
            found["share"] = _PASSES * 4 * numel / seconds["candidate"] / bandwidth
        found["anchor on the device" if place is None else "anchor in host memory"] = seconds
        del weights
        _free()
    return found


def copy_bandwidth(elements: int = 2**16 if REHEARSAL else 2**29) -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.randn(elements, device=device())
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


def _seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of a call, after one that is not counted if there are several."""
    taken = []
    for _ in range(repeats + (repeats > 1)):
        start = synchronized_clock()
        call()
        taken.append(synchronized_clock() - start)
    return statistics.median(taken[repeats > 1 :])


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
