"""`effopd eval`: accuracy of a model on a task, with all answers kept."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from effopd.command_help import CommandParser, OneSpelling, parsed
from effopd.distill.meta_model import check_model_folder, check_positions_of
from effopd.distill.preflight import check_model_name, check_task
from effopd.errors import CompatibilityError, ConfigError, EffOPDError
from effopd.evaluation import EvalResult, evaluate
from effopd.files import write_atomically
from effopd.tasks import Task, TaskConfig, load_task
from effopd.testbed import resolve_model


@dataclass
class SamplingArguments:
    """How answers are sampled: flags that `effopd eval` and `effopd intervene` share.

    Raises:
        ConfigError: a value is out of range.
    """

    n: int = field(default=1, metadata={"help": "Answers per prompt; avg@n and pass@k for k = 1, 2, 4, … ≤ n."})
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Sampling temperature; 0 = greedy. Nothing else shapes the distribution but --top_p: the sampling "
            "defaults in the model's own generation_config (repetition penalty, top_k, …) are not used."
        },
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1 = off."})
    max_new_tokens: int = field(default=512, metadata={"help": "Token limit of an answer."})
    batch_size: int = field(default=64, metadata={"help": "Answers generated at once."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling noise."})

    def __post_init__(self) -> None:
        for name in ("n", "max_new_tokens", "batch_size"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ConfigError(f"--{name} must be at least 1 and below 2^31, got {getattr(self, name)}.")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"--temperature must be >= 0 and --top_p in (0, 1], got {self.temperature} and {self.top_p}."
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed must be a whole number from 0 to 2^32 - 1, got {self.seed}.")
        if self.temperature == 0 and self.n > 1:
            raise ConfigError("--n above 1 needs --temperature above 0: greedy answers are all the same.")

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `effopd.evaluation.evaluate`."""
        return dataclasses.asdict(self)


@dataclass
class EvalArguments:
    """Flags of `effopd eval` besides the sampling's and the task's."""

    model: str = field(metadata={"help": "Model folder or Hub id; testbed:student and testbed:teacher ship."})
    dtype: str = field(default="auto", metadata={"help": "Weights' dtype: auto, float32, bfloat16, …"})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code from the model's repository."})
    output: str | None = field(
        default=None, metadata={"help": "JSONL file for all answers; the summary goes beside it as .summary.json."}
    )

    def __post_init__(self) -> None:
        if self.dtype != "auto" and not getattr(getattr(torch, self.dtype, None), "is_floating_point", False):
            raise ConfigError(f"--dtype: expected auto, float32, bfloat16 or float16, got {self.dtype!r}.")
        if self.output is not None and Path(self.output).exists():
            raise ConfigError(f"--output {self.output} exists; choose another file (nothing was changed).")


@dataclass
class EvalTaskConfig(TaskConfig):
    """`TaskConfig` whose task may be left out where there is an `eval_task`.

    Raises:
        ConfigError: neither is given, or as for `TaskConfig`.
    """

    task: str = field(
        default="",
        metadata={
            "help": "Where prompts come from: 'reasoning-gym:NAME', 'math:SOURCE' (a local .jsonl, .json or .parquet file, "
            "or a Hub dataset id) or 'testbed:FAMILY'. Of a file or Hub dataset, only the rows that training holds out "
            "are evaluated (see eval_size); for a whole file write --eval_task instead."
        },
    )

    def __post_init__(self) -> None:
        if not self.task and not self.eval_task:
            raise ConfigError(
                "--task and --eval_task are missing: expected one of them, such as --eval_task math:test.jsonl (the whole "
                "file) or --task math:train.jsonl (the rows that training on it holds out)."
            )
        self.task = self.task or str(self.eval_task)
        super().__post_init__()


def run_eval(argv: Sequence[str]) -> int:
    """Parse, check, evaluate, print."""
    parser = CommandParser(
        [EvalArguments, SamplingArguments, EvalTaskConfig],
        prog="effopd eval",
        usage="effopd eval --model MODEL (--eval_task TASK | --task TASK) [--FLAG VALUE …]",
        description="Sample answers, verify them, and say how sure the accuracy is. The model's own sampling defaults are not "
        "used.",
        epilog="Examples: effopd eval --model MODEL --task reasoning-gym:chain_sum --n 4 --temperature 1.0\n"
        "          effopd eval --model MODEL --eval_task math:test.jsonl      (every row of a file)",
        formatter_class=OneSpelling,
    )
    arguments, sampling, task_config = parsed(parser, argv)
    arguments.model = resolve_model(arguments.model)
    check_model_name("--model", arguments.model)
    check_model_folder("--model", arguments.model, adapter=True)
    task = load_task(task_config, "eval", why="Answers are needed to tell right from wrong.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            arguments.model, padding_side="left", trust_remote_code=arguments.trust_remote_code
        )
        longest = check_task(task, tokenizer, task_config.max_prompt_length)
        load = {"trust_remote_code": arguments.trust_remote_code}
        check_positions_of("--model", arguments.model, longest, sampling.max_new_tokens, "--max_new_tokens", **load)
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=arguments.dtype, trust_remote_code=arguments.trust_remote_code
        )
    except (OSError, ValueError) as error:
        if isinstance(error, EffOPDError):
            raise
        raise CompatibilityError(
            f"--model {arguments.model!r} cannot be loaded: expected a model folder or a Hub id, got {error}"
        ) from error
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    if text := _part(task, task_config):
        print(text)
    with tqdm(total=len(task) * sampling.n, unit="answer", desc=task.name) as bar:
        result = evaluate(model, tokenizer, task, progress=bar.update, **sampling.settings())
    _print(result, sampling.n)
    if arguments.output is not None:
        _write(result, arguments, task.name, sampling.temperature)
    return 0


def _part(task: Task, config: TaskConfig) -> str:
    """What to know where not all of a source is evaluated; "" where all of it is, or where it is generated."""
    if task.available is None or len(task) == task.available:
        return ""
    why = "held out as in training" if config.eval_task is None else f"--eval_size {config.eval_size}"
    return f"{len(task)} of {task.available} rows ({why}; --eval_size {task.available} for all)"


def _print(result: EvalResult, n: int) -> None:
    summary = result.summary()
    rows = {
        f"avg@{n}": f"{result.accuracy}  (95 % interval over {summary['prompts']} prompts)",
        **{name: f"{value:.3f}" for name, value in summary.items() if name.startswith("pass@") and n > 1},
        "mean score": f"{summary['mean_score']:.3f}",
        "answer length": f"{summary['mean_length']:.1f} tokens on average, {summary['max_length']} at most",
        "cut at the limit": f"{summary['truncated_share']:.1%}",
        "time": f"{summary['seconds']:.1f} s, {summary['generated_tokens']} tokens",
    }
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))


def _write(result: EvalResult, arguments: EvalArguments, task: str, temperature: float) -> None:
    path = Path(arguments.output or "")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in result.rows())
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    summary = {"model": arguments.model, "task": task, "temperature": temperature, **result.summary()}
    target = path.with_suffix(".summary.json")
    write_atomically(target, lambda temporary: temporary.write_text(json.dumps(summary, indent=2)))
    print(f"answers: {path}\nsummary: {target}")
