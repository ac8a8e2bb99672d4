"""`effopd init`: write a commented YAML for `effopd train --config`, and dry-run it.

The settings come from flags, or from a few questions on a terminal. An existing file is never
overwritten. The YAML uses the same names as the flags of `effopd train`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from effopd.common.files import write_atomically
from effopd.errors import ConfigError, EffOPDError
from effopd.tasks.config import split_task_name

#: Flags that replace the questions; with one of them, all three are required.
_REQUIRED = ("model_name_or_path", "teacher_model_name_or_path", "task")


@dataclass(frozen=True)
class Answers:
    """Content of the YAML.

    Attributes:
        student, teacher: model folders, Hub ids or `testbed:` names.
        task: "kind:name".
        output_dir: folder of the run.
    """

    student: str
    teacher: str
    task: str
    output_dir: str


def build_parser() -> argparse.ArgumentParser:
    """The parser of `effopd init`."""
    parser = argparse.ArgumentParser(
        prog="effopd init",
        description="Write a commented YAML for `effopd train --config` and dry-run it: all checks, the plan, and\n"
        "the estimated memory. Without flags, three questions are asked on a terminal.",
        epilog="Example:\n"
        "  effopd init --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-4B \\\n"
        "      --task math:problems.jsonl --out first.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model_name_or_path",
        metavar="STUDENT",
        help="The student: folder, Hub id, testbed:student or testbed:smollm2.",
    )
    parser.add_argument(
        "--teacher_model_name_or_path",
        metavar="TEACHER",
        help="The teacher, with the student's tokenizer: folder, Hub id or testbed:teacher.",
    )
    parser.add_argument(
        "--task",
        metavar="TASK",
        help="Source of the prompts: math:FILE_OR_HUB_ID, code:FILE_OR_HUB_ID, reasoning-gym:NAME, testbed:FAMILY.",
    )
    parser.add_argument("--out", type=Path, help="The YAML, a new file. Default: opd.yaml.")
    parser.add_argument("--output_dir", help="Folder of the run. Default: runs/ and the name of the YAML.")
    return parser


def run_init(argv: Sequence[str]) -> int:
    """Run `effopd init`: ask or read flags, write the YAML, dry-run it."""
    arguments = build_parser().parse_args(list(argv))
    out: Path = arguments.out or Path("opd.yaml")
    check_new(out)
    given = {name: getattr(arguments, name) for name in _REQUIRED if getattr(arguments, name)}
    if not given and sys.stdin.isatty():
        given = ask(input)
    check(given)
    student, teacher, task = (given[name] for name in _REQUIRED)
    answers = Answers(student, teacher, task, arguments.output_dir or f"runs/{out.stem}")
    text = yaml_text(answers, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--out {out}: the file cannot be written ({error}). Choose another folder.") from error
    print(f"{out} is written. Dry run:", flush=True)
    command = f"effopd train --config {shlex.quote(str(out))}"
    try:
        _dry_run(out)
    except EffOPDError:
        print(f"{out} is kept. Correct it, then repeat: {command} --dry_run", file=sys.stderr)
        raise
    print(f"Next:\n  {command}\n  effopd report {shlex.quote(answers.output_dir)}")
    return 0


def check_new(out: Path) -> None:
    """Check that the YAML can be a new file.

    Raises:
        ConfigError: `out` exists, is not a YAML name, or its folder is a file.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out {out} exists. Choose another file, or delete it. Nothing was changed.")
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {out}: expected a name that ends in .yaml, got {out.name!r}.")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir():
        raise ConfigError(f"--out {out}: {parent} is a file: expected a folder.")


def check(given: dict[str, str]) -> None:
    """Check that nothing is missing and that the names have the right form.

    Raises:
        ConfigError: a setting is missing, or a name has the wrong form.
        CompatibilityError: a model is neither a folder nor a valid Hub id.
    """
    missing = [f"--{name}" for name in _REQUIRED if name not in given]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: expected a value, got none. Without a terminal, or if one of --"
            f"{', --'.join(_REQUIRED)} is given, all three are required."
        )
    for name in _REQUIRED:
        _CHECKS[name](name, given[name])


def _check_model(name: str, value: str) -> None:
    from effopd.launch.preflight import check_model_name
    from effopd.tasks.builtin_models import resolve_model

    check_model_name(f"--{name}", resolve_model(value, network=False))


def _check_task(name: str, value: str) -> None:
    split_task_name(f"--{name}", value)


_CHECKS: dict[str, Callable[[str, str], None]] = {
    "model_name_or_path": _check_model, "teacher_model_name_or_path": _check_model, "task": _check_task,
}  # fmt: skip

# -- questions -------------------------------------------------------------------------------------

#: Question, and default answers in the testbed, per setting.
_QUESTIONS = {
    "model_name_or_path": ("Student (folder, Hub id, or testbed:student)", "testbed:student"),
    "teacher_model_name_or_path": ("Teacher, with the same tokenizer (folder or Hub id)", "testbed:teacher"),
    "task": ("Prompts (math:FILE_OR_HUB_ID, code:FILE_OR_HUB_ID, reasoning-gym:NAME)", "testbed:chain_sum"),
}


def ask(answer: Callable[[str], str]) -> dict[str, str]:
    """Setting → answer on a terminal. A wrong answer is explained and asked for again.

    Args:
        answer: prints a question and returns a line, as `input` does.

    Raises:
        ConfigError: the input ends.
    """
    given: dict[str, str] = {}
    for name, (question, example) in _QUESTIONS.items():
        builtin = set(given.values()) <= {"testbed:student", "testbed:teacher"}
        while name not in given:
            try:
                text = answer(f"{question}{f' [{example}]' if builtin else ''}: ").strip()
            except EOFError as error:
                raise ConfigError(f"--{name}: the input ended before an answer. Nothing was written.") from error
            text = text or (example if builtin else "")
            try:
                _CHECKS[name](name, text)
            except EffOPDError as error:
                print(f"  {error}")
            else:
                given[name] = text
    return given


# -- the file --------------------------------------------------------------------------------------


def yaml_text(answers: Answers, out: Path) -> str:
    """The YAML: settings with a comment each, and further settings that are commented out."""
    small = answers.student == "testbed:student" and answers.task.startswith("testbed:")
    values = _SMALL if small else _LARGE
    lines = [
        "# On-policy distillation, written by `effopd init`.",
        f"#   effopd train --config {out} --dry_run    checks everything, estimates the memory, writes nothing",
        f"#   effopd train --config {out}",
        "# Names are those of the flags in `effopd train --help`; flags on the command line take precedence.",
    ]
    for title, settings in values.items():
        lines += ["", f"# -- {title} --"]
        for name, value, comment in settings:
            comment = f"  # {comment}" if comment else ""
            filled = _FROM_ANSWERS.get(name)
            text = value if filled is None else _scalar(getattr(answers, filled))
            lines.append(f"{name}: {text}{comment}")
    return "\n".join(lines) + "\n"


def _scalar(text: str) -> str:
    """A string as a YAML scalar; JSON strings are YAML."""
    plain = text.replace("/", "").replace(":", "").replace("-", "").replace("_", "").replace(".", "")
    safe = plain.isalnum() and plain.isascii() and text[:1].isalpha() and not text.endswith(":")
    safe = safe and text.lower() not in ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
    return text if safe else json.dumps(text, ensure_ascii=False)


_FROM_ANSWERS = {
    "model_name_or_path": "student", "teacher_model_name_or_path": "teacher", "task": "task",
    "output_dir": "output_dir",
}  # fmt: skip
_Settings = dict[str, tuple[tuple[str, str, str], ...]]
_SAME = {
    "models": (
        ("model_name_or_path", "", "the student, which is trained"),
        ("teacher_model_name_or_path", "", "scores every token of the student's answers; same tokenizer"),
    ),
    "look-ahead": (
        ("effopd", "{strategy: newton_search}", "none: plain OPD; effopd: the paper's search"),
        ("# updates_per_rollouts", "3", "reuse saves sampling; with the next three lines, needs effopd[optimizers]"),
        ("# replay_batches", "10", "the last of these updates on one of the last 10 batches"),
        ("# optimizer_class", "schedulefree:AdamWScheduleFree", ""),
        ("# optimizer_args", '\'{"betas": [0.95, 0.99], "r": 2}\'', ""),
        ("# rollout_horizon", "topd", "short rollouts, cheaper early; eval_kl_beyond_horizon is what they miss"),
    ),
}
#: Section → (setting, value, comment). A name that starts with "# " is commented out.
_LARGE: _Settings = {
    "models": (
        *_SAME["models"],
        ("# teacher_dtype", "bfloat16", "default: bfloat16 on a GPU, float32 on the CPU"),
        ("# use_peft", "true", "LoRA instead of all weights; needs effopd[peft]"),
    ),
    "prompts": (
        ("task", "", "of a file or data set, a tenth of the rows (at most 100) is held out"),
        ("# task_args", "'{\"prompt_column\": \"question\"}'", "columns with other names"),
        ("# eval_task", "math:test.jsonl", "another source of held-out prompts"),
        ("# as_chat", "false", "for a base model without a chat template"),
        ("# max_prompt_length", "1024", "tokens; longer prompts are refused"),
        ("max_completion_length", "1024", "tokens per answer of the student; longer answers are cut"),
    ),
    "steps": (
        ("max_steps", "200", "optimizer steps; each trains on 8 × 16 answers per process"),
        ("per_device_train_batch_size", "8", "answers per forward pass: lower it if memory is short"),
        ("gradient_accumulation_steps", "16", "forward passes per step"),
        ("# learning_rate", "1.0e-5", "a start: newton_search sets it by its first search; without it, compare a few"),
        ("seed", "42", ""),
    ),
    "look-ahead": _SAME["look-ahead"],
    "output": (
        ("output_dir", "", "rows, checkpoints and the trained model"),
        ("eval_strategy", "steps", "held-out KL to the teacher, and accuracy"),
        ("eval_steps", "10", "steps between evaluations"),
        ("save_strategy", "steps", "checkpoints to resume from: --resume_from_checkpoint true"),
        ("save_steps", "50", "steps between checkpoints"),
        ("# report_to", "tensorboard", "or wandb, trackio, mlflow, …"),
    ),
}  # fmt: skip
_SMALL: _Settings = {
    "models": _SAME["models"],
    "prompts": (
        ("task", "", ""),
        ("train_size", "4096", "prompts"),
        ("eval_size", "256", "held-out prompts"),
        ("max_completion_length", "24", "tokens per answer of the student; longer answers are cut"),
    ),
    "steps": (
        ("max_steps", "96", "optimizer steps; each trains on 256 answers"),
        ("per_device_train_batch_size", "256", "answers per forward pass"),
        ("per_device_eval_batch_size", "256", ""),
        ("learning_rate", "3.0e-5", ""),
        ("lr_scheduler_type", "constant", ""),
        ("activation_checkpointing", "false", "saves memory that these models do not need"),
        ("seed", "0", ""),
    ),
    "look-ahead": _SAME["look-ahead"],
    "output": (
        ("output_dir", "", "rows, checkpoints and the trained model"),
        ("eval_strategy", "steps", "held-out KL to the teacher, and accuracy"),
        ("eval_steps", "8", "steps between evaluations"),
        ("save_strategy", "steps", "checkpoints to resume from: --resume_from_checkpoint true"),
        ("save_steps", "32", "steps between checkpoints"),
    ),
}  # fmt: skip


def _dry_run(out: Path) -> None:
    from effopd.commands.train import parse_command
    from effopd.launch.dry_run import plan_tables, print_plan

    print_plan(plan_tables(parse_command(["--config", str(out), "--dry_run"])[0]))
