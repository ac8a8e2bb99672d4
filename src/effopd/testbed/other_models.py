"""Testbed models besides the built-in pair: a wider teacher, and a pair with long answers.

    effopd testbed other [--output_dir DIR] [--seed 0]

    wide_start     twice the built-in student's width, three times its parameters, its own random
                   initialization; supervised on correct reasoning of both families
    wide_teacher   for the built-in student: `wide_start`, trained further, mostly on chain_sum
    long_student   answers of about 100 tokens: supervised on partly falsified reasoning
    long_teacher   the long student, trained further on correct reasoning

The built-in teacher is an RL copy of the student; the wide teacher shares only the tokenizer with
it. Every model is a stage. A stage with a complete folder is skipped, and an interrupted one
continues from its progress file. `card.json` has accuracies, KL at the start and CPU seconds.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from effopd.common.files import write_atomically
from effopd.common.versions import versions
from effopd.errors import ConfigError
from effopd.tasks.base import Example
from effopd.tasks.builtin_models import OTHER_MODELS, WEIGHTS, student_path
from effopd.tasks.testbed_families import family_task, worked_reasoning
from effopd.testbed.base_training import BaseSettings, ModelSettings, falsified, new_model, train_base
from effopd.testbed.measure import measure_accuracy, rollout_kl
from effopd.testbed.progress import Progress
from effopd.testbed.recipe import save

LONG_FAMILY = "long_chain_sum"
#: Stage → stage whose model it trains further; other stages start from random weights.
_START = {"wide_teacher": "wide_start", "long_teacher": "long_student"}
#: Stage → share of its questions by family, in relation to `BaseSettings.questions`.
_SHARES = {
    "wide_start": {"chain_sum": 1.0, "spell_backward": 1.0},
    "wide_teacher": {"chain_sum": 1.0, "spell_backward": 0.25},
    "long_student": {LONG_FAMILY: 1.0},
    "long_teacher": {LONG_FAMILY: 1.0},
}
#: Token limits of the answers.
SHORT_LIMIT, LONG_LIMIT = 24, 128
#: CPU threads; the weights depend on them.
THREADS = 1
_PACKAGES = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class OtherSettings:
    """All hyperparameters.

    Attributes:
        test_questions: test questions per family for accuracies and the KL at the start.
        save_every: steps between two saves of the progress file.
    """

    wide_model: ModelSettings = field(default_factory=lambda: ModelSettings(256, 768, 3, 8, 4))
    wide_start: BaseSettings = field(
        default_factory=lambda: BaseSettings(steps=400, batch_size=64, warmup_steps=20, optimizer="muon")
    )
    wide_teacher: BaseSettings = field(
        default_factory=lambda: BaseSettings(steps=500, batch_size=64, warmup_steps=20, optimizer="muon")
    )
    long_model: ModelSettings = field(default_factory=lambda: ModelSettings(max_position_embeddings=256))
    long_student: BaseSettings = field(
        default_factory=lambda: BaseSettings(steps=500, batch_size=16, warmup_steps=20, optimizer="muon")
    )
    long_teacher: BaseSettings = field(
        default_factory=lambda: BaseSettings(
            steps=150, batch_size=16, learning_rate=1e-3, warmup_steps=10, optimizer="muon"
        )
    )
    test_questions: int = 250
    save_every: int = 20


class OtherBuild:
    """The build in one folder: `make` trains a model, `measure` its row of the card.

    Args:
        out: folder of the models; created if needed.
        seed: seed of the questions, the initial weights and the order of the examples.

    Raises:
        ConfigError: the folder holds models of another seed or other settings.
    """

    def __init__(
        self, out: Path, seed: int = 0, settings: OtherSettings | None = None, log: Callable[[str], None] = print
    ) -> None:
        self.out, self.seed, self.settings, self._log = out, seed, settings or OtherSettings(), log
        self.tokenizer = AutoTokenizer.from_pretrained(student_path())
        self.tokenizer.model_max_length = 256
        self._check_folder()

    def _check_folder(self) -> None:
        made_with = json.loads(json.dumps({"seed": self.seed, "settings": asdict(self.settings)}))
        path = self.out / "settings.json"
        if path.exists():
            if json.loads(path.read_text(encoding="utf-8")) != made_with:
                raise ConfigError(
                    f"--output_dir {self.out} holds models of another seed or other settings ({path}). Choose another "
                    "folder. Nothing was changed."
                )
            return
        if self.out.is_file() or (self.out.exists() and any(self.out.iterdir())):
            raise ConfigError(
                f"--output_dir {self.out} is not empty and holds no build to continue. Choose another folder. Nothing "
                "was changed."
            )
        self.out.mkdir(parents=True, exist_ok=True)
        _write_json(path, made_with)

    def log(self, line: str) -> None:
        """Print the line and append it to `build.log`."""
        self._log(line)
        with (self.out / "build.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def make(self, name: str) -> Qwen3ForCausalLM:
        """The model `name`; trained unless its folder is complete."""
        folder = self.out / name
        if not folder.exists():
            self._train(name, folder)
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    def _train(self, name: str, folder: Path) -> None:
        training: BaseSettings = getattr(self.settings, name)
        progress = Progress(self.out / f".{name}.progress.pt", self.settings.save_every)
        if name in _START:
            model = self.make(_START[name])
        else:
            model = new_model(self.tokenizer, getattr(self.settings, f"{name[:4]}_model"), self.seed)
        examples = [
            example
            for family, share in _SHARES[name].items()
            for example in family_task(family, "train", round(share * training.questions), self.seed).examples
        ]
        write = falsified if name == "long_student" else _correct
        self.log(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {training.steps} steps")

        def log(line: str) -> None:
            self.log(f"{name}: {line.removeprefix('base ')} ({progress.cpu_seconds / 60:.1f} CPU minutes)")

        train_base(model, self.tokenizer, examples, training, self.seed, log, write, progress)
        part = self.out / f".{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        save(model, self.tokenizer, part)
        _write_json(part / "training.json", {"cpu_seconds": round(progress.cpu_seconds, 3)})
        part.rename(folder)
        progress.path.unlink(missing_ok=True)
        self.log(f"{name}: finished, {folder}")

    def measure(self, name: str) -> dict[str, Any]:
        """Parameters, CPU seconds, accuracies and, for a teacher, the KL at the start.

        Measured once; kept in the model's folder.
        """
        path = self.out / name / "measured.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        model, families, size = self.make(name), list(_SHARES[name]), self.settings.test_questions
        long = name.startswith("long")
        limit = LONG_LIMIT if long else SHORT_LIMIT
        measured: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "cpu_seconds": self._cpu_seconds(name),
            "accuracy": measure_accuracy({name: model}, self.tokenizer, size, limit, self.seed, families),
            "sha256": hashlib.sha256((self.out / name / WEIGHTS).read_bytes()).hexdigest(),
        }
        if name.endswith("teacher"):
            student = AutoModelForCausalLM.from_pretrained(
                self.out / "long_student" if long else student_path()
            ).eval()
            measured["kl_at_start"] = {
                family: rollout_kl(
                    student,
                    model,
                    self.tokenizer,
                    family_task(family, "validation", size, self.seed).examples,
                    limit,
                    self.seed,
                )
                for family in families
            }
        _write_json(path, measured)
        for row in measured["accuracy"]:
            self.log("{model:12} {family:14} {decoding:7} accuracy {accuracy:.3f} {ci95}".format(**row))
        for family, kl in measured.get("kl_at_start", {}).items():
            self.log(f"{name:12} {family:14} reverse KL at the start {kl:.4f} nats per token")
        return measured

    def _cpu_seconds(self, name: str) -> float:
        """CPU seconds of the training, with those of the start if the card has no row for it."""
        own = json.loads((self.out / name / "training.json").read_text(encoding="utf-8"))["cpu_seconds"]
        start = _START.get(name)
        return own if start is None or start in OTHER_MODELS else round(own + self._cpu_seconds(start), 3)


def build_other(
    out: Path,
    names: Sequence[str] = OTHER_MODELS,
    seed: int = 0,
    settings: OtherSettings | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Build the models `names` in `out`, measure them, and return the card of all finished models.

    Args:
        out: new folder, or one with an unfinished build of the same seed and settings.
        seed: seed of the questions, the initial weights and the order of the examples.

    Raises:
        ConfigError: the folder holds something else.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        build = OtherBuild(out, seed, settings, log)
        for name in names:
            build.make(name)
            build.measure(name)
        card = {
            "seed": seed,
            "versions": versions(_PACKAGES),
            "machine": {"processor": platform.machine(), "vector_units": torch.backends.cpu.get_cpu_capability()},
            "settings": asdict(build.settings),
            "models": {name: build.measure(name) for name in OTHER_MODELS if (out / name).exists()},
        }
    finally:
        torch.set_num_threads(threads)
    _write_json(out / "card.json", card)
    return card


def _correct(example: Example, rng: random.Random) -> str:
    return worked_reasoning(example)


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
