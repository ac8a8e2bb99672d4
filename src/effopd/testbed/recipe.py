"""Recipe for the testbed's student and teacher, from one seed to checkpoints and a measured card.

    effopd testbed build --output_dir OUT_DIR [--seed 0]

Stages: questions → tokenizer → base student (supervised, partly falsified reasoning) → teacher
(GRPO) → accuracies → reference run of plain distillation. Writes `student/`, `teacher/`,
`card.json` and `build.log`. Set `OMP_WAIT_POLICY=PASSIVE` if other programs use the same cores.

The package ships the output for the default settings. The same machine and versions give the same
bytes; other processors may round differently and give slightly different weights.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3ForCausalLM

from effopd.common.files import write_atomically
from effopd.common.versions import versions
from effopd.errors import ConfigError
from effopd.tasks.builtin_models import reference_settings
from effopd.tasks.testbed_families import FAMILIES, family_task, mixed_examples, question
from effopd.testbed.base_training import BaseSettings, ModelSettings, new_model, train_base
from effopd.testbed.measure import MeasureSettings, measure_accuracy, measure_reference_opd
from effopd.testbed.rl import RLSettings, train_teacher
from effopd.testbed.tokenizer import build_tokenizer

#: Packages whose versions affect the resulting bytes.
_PACKAGES = ("torch", "transformers", "trl", "tokenizers", "reasoning-gym")


@dataclass(frozen=True)
class RecipeSettings:
    """All hyperparameters of the recipe.

    Attributes:
        threads: CPU threads of torch; results can depend on them.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    base: BaseSettings = field(default_factory=BaseSettings)
    rl: RLSettings = field(default_factory=RLSettings)
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    threads: int = 2

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"threads: expected at least 1, got {self.threads}. Raise it.")


def build(out_dir: str | Path, seed: int = 0, settings: RecipeSettings | None = None) -> dict[str, Any]:
    """Build the pair in `out_dir` and return its card.

    Args:
        out_dir: created if needed; its `student/`, `teacher/`, `card.json` and `build.log` are
            replaced.
        seed: seed of the questions, initial weights and sampling.
        settings: hyperparameters; `None`: those of the shipped pair, about ten minutes on two CPU
            cores.
    """
    settings, out = settings or RecipeSettings(), Path(out_dir)
    _clean(out)
    log = _Log(out / "build.log")
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        return _build(out, seed, settings, log)
    finally:
        torch.set_num_threads(threads)


def _build(out: Path, seed: int, settings: RecipeSettings, log: _Log) -> dict[str, Any]:
    with log.stage("tokenizer"):
        examples = [family_task(family, "train", settings.base.questions, seed).examples for family in FAMILIES]
        tokenizer = build_tokenizer([[question(example) for example in family] for family in examples])
    with log.stage("base"):
        student = new_model(tokenizer, settings.model, seed)
        train_base(student, tokenizer, [e for family in examples for e in family], settings.base, seed, log)
        save(student, tokenizer, out / "student")
    with log.stage("teacher"):
        teacher = deepcopy(student)
        rl = mixed_examples("train", settings.rl.questions, seed)
        train_teacher(teacher, tokenizer, rl, settings.rl, seed, log)
        save(teacher, tokenizer, out / "teacher")
    with log.stage("accuracy"):
        pair = {"student": student, "teacher": teacher}
        accuracy = measure_accuracy(
            pair, tokenizer, settings.measure.questions, settings.rl.max_completion_length, seed
        )
        for row in accuracy:
            log("{model:8} {family:15} {decoding:8} {accuracy:.3f} {ci95}".format(**row))
    reference = None
    if settings.measure.opd_steps:
        with log.stage("reference_opd"):
            reference = measure_reference_opd(
                student, teacher, tokenizer, reference_settings(), settings.measure, seed, log
            )
    card = {
        "seed": seed,
        "versions": versions(_PACKAGES),
        "machine": {"processor": platform.machine(), "vector_units": torch.backends.cpu.get_cpu_capability()},
        "families": {name: asdict(family) for name, family in FAMILIES.items()},
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in student.parameters()),
        "vocabulary": len(tokenizer),
        "seconds": log.seconds,
        "accuracy": accuracy,
        **{f"{role}_accuracy": _sampled(accuracy, role) for role in pair},
        "reference_opd": reference,
        "sha256": {f"{role}/model.safetensors": _sha256(out / role / "model.safetensors") for role in pair},
    }
    text = json.dumps(card, indent=1) + "\n"
    write_atomically(out / "card.json", lambda path: path.write_text(text, encoding="utf-8"))
    return card


class _Log:
    """Log to the console and a file, with the seconds of each stage."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, line: str) -> None:
        line = f"[{time.perf_counter() - self.start:7.1f} s] {line}"
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self(f"stage {name}")
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def _clean(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("student", "teacher"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("card.json", "build.log"):
        (out / name).unlink(missing_ok=True)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save model and tokenizer as a checkpoint that all users can read."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ends)
    model.config.use_cache = True  # trainers switch it off
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors files are created private, which breaks installs shared by several users


def _sampled(rows: list[dict[str, Any]], role: str) -> dict[str, float]:
    """Sampled accuracy of one model by family."""
    return {r["family"]: r["accuracy"] for r in rows if r["model"] == role and r["decoding"] == "sampled"}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
