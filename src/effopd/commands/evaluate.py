"""`effopd eval`: accuracy of a model on a task, with all answers kept."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effopd.commands.parser import CommandParser, OneSpelling, parsed
from effopd.common.files import write_atomically
from effopd.common.progress import Counted
from effopd.errors import ConfigError
from effopd.launch.meta_model import check_positions_of
from effopd.launch.preflight import check_model_name, check_task
from effopd.models.files import check_dtype, load_model, load_tokenizer
from effopd.runs.console import quiet_hosts
from effopd.runs.lines import missing_answers
from effopd.runs.run_prompts import agreed, run_of, spoken, taken_over
from effopd.tasks import Task, TaskConfig, load_task
from effopd.tasks.builtin_models import resolve_model
from effopd.tasks.config import json_object
from effopd.tasks.evaluate import EvalResult, evaluate


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
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "JSON object with arguments of the tokenizer's chat template, such as '{\"enable_thinking\": false}'."
        },
    )

    def __post_init__(self) -> None:
        self.chat_template_kwargs = json_object(
            "--chat_template_kwargs", self.chat_template_kwargs, '{"enable_thinking": false}'
        )
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
        """Keyword arguments of `effopd.tasks.evaluate.evaluate`."""
        return dataclasses.asdict(self)

    @property
    def template(self) -> dict[str, Any]:
        """Keyword arguments of the chat template."""
        return self.chat_template_kwargs if isinstance(self.chat_template_kwargs, dict) else {}


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
        check_dtype(self.dtype)
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


class MeasuringParser(CommandParser):
    """A parser of flags whose defaults are those of the run that a model comes from (see `distill.run_prompts`).

    Attributes:
        note: what was taken over from which run, in one line; "" if nothing.
    """

    #: Whether a command without a task measures on the run's own.
    own_task = True

    def __init__(self, *args: Any, **kwargs: Any):
        self.note = ""
        self._in_file: set[str] = set()
        super().__init__(*args, **kwargs)

    def models(self, found: argparse.Namespace) -> list[str]:
        """The folders or Hub ids that are measured."""
        return [str(found.model)] if found.model else []

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        """As the host's; remembers which settings the file has."""
        unset = object()
        before = [(action, action.default) for action in self._actions]
        for action in self._actions:
            action.default = unset
        try:
            return super().set_defaults_with_config(**settings)
        finally:
            for action, default in before:
                if action.default is unset:
                    action.default = default
                else:
                    self._in_file.add(action.dest)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As the host's, with the run's settings in the place of the defaults."""
        found, rest = super().parse_known_args(args, namespace)
        runs = [run for run in map(run_of, self.models(found)) if run is not None]
        if not runs:
            return found, rest
        explicit = self._explicit(args) | self._in_file
        common, conflicts = agreed(runs)
        if message := next((text for flag, text in conflicts.items() if flag not in explicit), None):
            raise ConfigError(message)
        values = taken_over(common, vars(found), explicit, own_task=self.own_task)
        if not values:
            return found, rest
        self.note = f"as in {runs[0][0]}: {spoken(values)}"
        self.set_defaults(**values)
        return super().parse_known_args(args, namespace)

    def _explicit(self, args: Any) -> set[str]:
        """Flags on the command line."""
        before = [(action, action.default, action.required) for action in self._actions]
        defaults: dict[str, Any] = self._defaults  # type: ignore[has-type]
        self._defaults = {}
        try:
            for action in self._actions:
                action.default, action.required = argparse.SUPPRESS, False
            return set(vars(argparse.ArgumentParser.parse_known_args(self, args)[0]))
        finally:
            self._defaults = defaults
            for action, default, required in before:
                action.default, action.required = default, required


def parsed_as_trained(parser: MeasuringParser, argv: Sequence[str]) -> tuple[Any, ...]:
    """`parsed`; says in one line what was taken over from a run, also where it leads to an error."""
    try:
        arguments = parsed(parser, argv)
    except ConfigError as error:
        raise ConfigError(f"{error} ({parser.note})") if parser.note else error from error
    if parser.note:
        print(parser.note, flush=True)
    return arguments


def run_eval(argv: Sequence[str]) -> int:
    """Parse, check, evaluate, print."""
    parser = MeasuringParser(
        [EvalArguments, SamplingArguments, EvalTaskConfig],
        prog="effopd eval",
        usage="effopd eval --model MODEL (--eval_task TASK | --task TASK) [--FLAG VALUE …]",
        description="Sample answers, verify them, and say how sure the accuracy is. The model's own sampling defaults are not "
        "used.\nOf a model in a run directory, prompts are written and answers sampled as config.yaml there says, unless a flag "
        "says otherwise; without a task, the run's own is used.",
        epilog="Examples: effopd eval --model MODEL --task reasoning-gym:chain_sum --n 4 --temperature 1.0\n"
        "          effopd eval --model MODEL --eval_task math:test.jsonl      (every row of a file)\n"
        "          effopd eval --model runs/first                             (as its own evaluations)",
        formatter_class=OneSpelling,
    )
    arguments, sampling, task_config = parsed_as_trained(parser, argv)
    arguments.model = resolve_model(arguments.model)
    check_model_name("--model", arguments.model)
    load = {"trust_remote_code": arguments.trust_remote_code}
    with quiet_hosts(bars=True):
        tokenizer = load_tokenizer("--model", arguments.model, **load)
        task = load_task(task_config, "eval", why="Answers are needed to tell right from wrong.")
        longest = check_task(task, tokenizer, task_config.max_prompt_length, **sampling.template)
        check_positions_of("--model", arguments.model, longest, sampling.max_new_tokens, "--max_new_tokens", **load)
        model = load_model("--model", arguments.model, dtype=arguments.dtype, **load)
    if text := _part(task, task_config):
        print(text, flush=True)
    with Counted(len(task) * sampling.n, task.name, "answer") as bar:
        result = evaluate(model, tokenizer, task, progress=bar.update, **sampling.settings())
    _print(result, sampling.n)
    if text := missing_text(result, task.name, sampling.max_new_tokens):
        print(text)
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
        f"avg@{n}": f"{result.accuracy:.3f}  (95 % interval over {summary['prompts']} prompts)",
        **{name: f"{value:.3f}" for name, value in summary.items() if name.startswith("pass@") and n > 1},
        "mean score": f"{summary['mean_score']:.3f}",
        "answer length": f"{summary['mean_length']:.1f} tokens on average, {summary['max_length']} at most",
        "answers": answers_text(summary),
        "time": f"{summary['seconds']:.1f} s, {summary['generated_tokens']} tokens",
    }
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))


def answers_text(summary: Mapping[str, Any]) -> str:
    """How many answers there were, could be graded, were cut and were empty."""
    count = summary["prompts"] * summary["samples_per_prompt"]
    found = summary["answers_found"]
    parts = [f"{count}"] + ([] if found is None else [f"{found} with something to grade"])
    cut = f"{summary['answers_cut']} cut at the limit ({summary['truncated_share']:.1%})"
    return ", ".join([*parts, cut, f"{summary['answers_empty']} empty"])


def missing_text(result: EvalResult, task: str, limit: int) -> str:
    """`console.missing_answers` of a result."""
    return missing_answers(
        task,
        result.accuracy.mean,
        len(result.lengths),
        result.answers_found,
        result.answers_cut,
        result.answers_empty,
        limit=limit,
    )


def _write(result: EvalResult, arguments: EvalArguments, task: str, temperature: float) -> None:
    path = Path(arguments.output or "")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in result.rows())
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    summary = {"model": arguments.model, "task": task, "temperature": temperature, **result.summary()}
    target = path.with_suffix(".summary.json")
    write_atomically(target, lambda temporary: temporary.write_text(json.dumps(summary, indent=2)))
    print(f"answers: {path}\nsummary: {target}")
