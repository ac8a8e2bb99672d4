"""CPU seconds of `effopd train --dry_run` and number of models that it builds.

    python benchmarks/dry_run.py [--repeats 5]

Student and teacher have the shape of SmolLM2-135M, the tokenizer of the testbed, and no weights.
Each case runs in this process, so that imports are not counted. Prints the number of models, the
CPU seconds of building them, and those of the whole dry run: medians over the repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from effopd.commands.main import main as effopd
from effopd.tasks.builtin_models import student_path

_LORA = ["--use_peft", "true", "--lora_target_modules", "all-linear"]
#: Name of a case → its command and flags; "S" and "T" stand for student and teacher.
CASES = {
    "train": ["train", "--teacher_model_name_or_path", "T"],
    "train, LoRA": ["train", "--teacher_model_name_or_path", "T", *_LORA],
    "train, several teachers": ["train", "--teachers", "T", "S"],
    "train, reference": [
        "train", "--teacher_model_name_or_path", "T", "--reference_model_name_or_path", "S",
        "--lambda_extrapolation", "1.25",
    ],
    "rl, LoRA": ["rl", *_LORA],
    "rl, dGRPO": ["rl", "--algorithm", "dgrpo", "--teacher_model_name_or_path", "T"],
}  # fmt: skip


def write_model(folder: Path) -> None:
    """A model folder without weights."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, num_hidden_layers=30, intermediate_size=1536, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=[2, 323],
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(student_path()).save_pretrained(folder)
    save_file({}, folder / "model.safetensors", metadata={"format": "pt"})


def words(case: str, folder: Path) -> list[str]:
    """Words of a dry run."""
    named = {"S": str(folder / "student"), "T": str(folder / "teacher")}
    prefix = {"S": "b=", "T": "a="} if "--teachers" in CASES[case] else {"S": "", "T": ""}
    given = [prefix[word] + named[word] if word in named else word for word in CASES[case]]
    common = [
        "--task",
        f"math:{folder / 'math.jsonl'}",
        "--max_completion_length",
        "64",
        "--use_cpu",
        "--report_to",
        "none",
    ]
    return [*given, "--model_name_or_path", named["S"], *common, "--output_dir", str(folder / "run"), "--dry_run"]


def measured(given: list[str]) -> tuple[int, float, float]:
    """(models built, CPU seconds of building them, CPU seconds of the dry run)."""
    built: list[float] = []
    build = LlamaForCausalLM._from_config

    def counted(*args, **kwargs):
        start = time.process_time()
        model = build(*args, **kwargs)
        built.append(time.process_time() - start)
        return model

    start = time.process_time()
    with mock.patch.object(LlamaForCausalLM, "_from_config", counted), contextlib.redirect_stdout(io.StringIO()):
        status = effopd(given)
    if status:
        raise SystemExit(f"failed: {' '.join(given)}")
    return len(built), sum(built), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed dry runs per case, after one that warms up")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for role in ("student", "teacher"):
            write_model(Path(folder) / role)
        problems = [{"problem": f"{i} + {i} = ?", "answer": str(2 * i), "teacher": "ab"[i % 2]} for i in range(64)]
        (Path(folder) / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
        for case in CASES:
            rows = [measured(words(case, Path(folder))) for _ in range(1 + arguments.repeats)][1:]
            count, building, whole = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"{case}: {count:g} models in {building:.2f} s, whole dry run {whole:.2f} s", flush=True)


if __name__ == "__main__":
    main()
