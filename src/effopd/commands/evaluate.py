"""`effopd eval`: accuracy of a model on a task, with all answers on request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effopd.commands.measuring_parser import MeasuringParser, parsed_as_trained
from effopd.commands.parser import OneSpelling
from effopd.common.files import check_writable, write_atomically
from effopd.common.progress import Counted
from effopd.errors import ConfigError
from effopd.launch.meta_model import check_positions_of
from effopd.launch.preflight import check_model_name, check_task
from effopd.models.files import check_dtype, load_model, load_tokenizer
from effopd.runs.console import quiet_hosts
from effopd.runs.inputs import prompt_set, read_inputs
from effopd.runs.missing_answers import ENOUGH, AnswerWatch, Counts, missing_answers, mostly_missing
from effopd.runs.run_prompts import splits_as
from effopd.tasks import Task, TaskConfig, load_task
from effopd.tasks.builtin_models import resolve_model
from effopd.tasks.evaluate import EvalResult, evaluate
from effopd.tasks.generate import Completion
from effopd.tasks.sampling import Sampling


def summary_path(answers: Path) -> Path:
    """Path of the summary: `a.summary.json` for `a.jsonl`; else `.summary.json` is appended."""
    stem = answers.stem if answers.suffix == ".jsonl" else answers.name
    return answers.with_name(f"{stem}.summary.json")


@dataclass
class EvalArguments:
    """Flags of `effopd eval`, except those of sampling and task."""

    model: str = field(
        metadata={"help": "Model folder or Hub id, or testbed:student, testbed:teacher or testbed:smollm2."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of a model on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the weights: auto, float32, bfloat16, …"})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code from the model's repository."})
    output: str | None = field(
        default=None, metadata={"help": "JSONL file for all answers; a .summary.json is written beside it."}
    )

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.output is not None:
            if Path(self.output).exists():
                raise ConfigError(f"--output {self.output} exists; choose another file. Nothing was changed.")
            if (summary := summary_path(Path(self.output))).exists():
                raise ConfigError(
                    f"--output {self.output} needs its summary at {summary}, which exists: expected a new file. "
                    "Choose another name for --output. Nothing was changed."
                )
            check_writable(Path(self.output).parent, "--output")


@dataclass
class EvalTaskConfig(TaskConfig):
    """`TaskConfig` whose `task` is optional if `eval_task` is given.

    Raises:
        ConfigError: neither `task` nor `eval_task` is given, or as for `TaskConfig`.
    """

    task: str = field(
        default="",
        metadata={
            "help": "Source of the prompts: 'reasoning-gym:NAME', 'math:SOURCE' or 'code:SOURCE' (a local .jsonl, "
            ".json or .parquet file, or a Hub dataset id), or 'testbed:FAMILY'. Of a SOURCE only the rows held out "
            "in training are evaluated; use --eval_task to evaluate all rows."
        },
    )

    def __post_init__(self) -> None:
        if not self.task and not self.eval_task:
            raise ConfigError(
                "--task and --eval_task are missing: expected one of them, such as --eval_task math:test.jsonl "
                "(all rows) or --task math:train.jsonl (the rows held out in training)."
            )
        self.task = self.task or str(self.eval_task)
        super().__post_init__()


def eval_parser() -> MeasuringParser:
    """The parser of `effopd eval`."""
    return MeasuringParser(
        [EvalArguments, Sampling, EvalTaskConfig],
        prog="effopd eval",
        usage="effopd eval --model MODEL (--eval_task TASK | --task TASK) [--FLAG VALUE …]",
        description="Sample and verify answers; report the accuracy with its 95 % interval. The model's generation\n"
        "config is not used for sampling. For a model in a run directory, the run's config.yaml gives the\n"
        "defaults for prompts, sampling and task.",
        epilog="Examples: effopd eval --model MODEL --task reasoning-gym:chain_sum --n 4 --temperature 1.0\n"
        "          effopd eval --model MODEL --eval_task math:test.jsonl      (all rows of a file)\n"
        "          effopd eval --model runs/first                             (like the run's own evaluations)",
        formatter_class=OneSpelling,
    )


def run_eval(argv: Sequence[str]) -> int:
    """Run `effopd eval`: parse, check, evaluate and print."""
    parser = eval_parser()
    arguments, sampling, task_config = parsed_as_trained(parser, argv)
    arguments.model = resolve_model(arguments.model)
    check_model_name("--model", arguments.model)
    load = {"trust_remote_code": arguments.trust_remote_code, "revision": arguments.model_revision or "main"}
    with quiet_hosts(bars=True):
        tokenizer = load_tokenizer("--model", arguments.model, **load)
        task = load_task(task_config, "eval", why="Answers are needed to tell right from wrong.")
        longest = check_task(task, tokenizer, task_config.max_prompt_length, sampling.template)
        check_positions_of("--model", arguments.model, longest, sampling.max_new_tokens, "--max_new_tokens", **load)
        model = load_model("--model", arguments.model, dtype=arguments.dtype, **load)
    if text := _part(task, task_config, next(iter(parser.runs), None)):
        print(text, flush=True)
    with Counted(len(task) * sampling.n, task.name, "answer") as bar:
        look = _FirstLook(task, sampling.max_new_tokens)
        result = evaluate(model, tokenizer, task, sampling, progress=bar.update, seen=look)
    _print(result, sampling.n)
    if not look.watch.said and (text := missing_text(result, task, sampling.max_new_tokens)):
        print(text)
    if arguments.output is not None:
        _write(result, arguments, task.name, sampling.temperature)
    return 0


def _part(task: Task, config: TaskConfig, run: tuple[Path, Mapping[str, Any]] | None) -> str:
    """Note that only part of a source is evaluated; "" if all rows are or if they are generated.

    Args:
        run: `config.yaml` and settings of the model's run; `None`: no run.
    """
    if task.available is None or len(task) == task.available:
        return ""
    if config.eval_task is not None:
        why = f"--eval_size {config.eval_size}"
    elif run is not None and (how := _held_out(task, config, *run)):
        why = how
    else:
        why = f"held out with --task_seed {config.task_seed}, perhaps not as in training"
    return f"{len(task)} of {task.available} rows ({why}; --eval_size {task.available} for all)"


def _held_out(task: Task, config: TaskConfig, path: Path, settings: Mapping[str, Any]) -> str:
    """How the rows agree with those that the run held out; "": perhaps not at all."""
    inputs = read_inputs(path.parent)
    if inputs is not None and inputs.held_out is not None:
        same = prompt_set(example.prompt for example in task.examples) == inputs.held_out
        return "held out as in training" if same else ""
    return "held out with the settings of training" if splits_as(settings, vars(config)) else ""


def _print(result: EvalResult, n: int) -> None:
    summary = result.summary()
    rows = {
        f"avg@{n}": f"{result.accuracy:.3f}  (95 % interval over {summary['prompts']} prompts)",
        **{name: f"{value:.3f}" for name, value in summary.items() if name.startswith("pass@") and n > 1},
        "mean score": f"{summary['mean_score']:.3f}",
        "answer length": f"{summary['mean_length']:.1f} tokens on average, {summary['max_length']} at most",
        "answers": answers_text(summary),
        **({"verdicts": verdicts_text(summary["verdicts"])} if "verdicts" in summary else {}),
        "time": f"{summary['seconds']:.1f} s, {summary['generated_tokens']} tokens",
    }
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))


def answers_text(summary: Mapping[str, Any]) -> str:
    """Numbers of answers: all, gradable, cut at the limit, empty."""
    count = summary["prompts"] * summary["samples_per_prompt"]
    gradable = summary["answers_found"]
    parts = [f"{count}"] + ([] if gradable is None else [f"{gradable} with something to grade"])
    cut = f"{summary['answers_cut']} cut at the limit ({summary['truncated_share']:.1%})"
    return ", ".join([*parts, cut, f"{summary['answers_empty']} empty"])


def verdicts_text(verdicts: Mapping[str, int]) -> str:
    """Numbers of answers by verdict, without the zeros."""
    return ", ".join(f"{count} {name}" for name, count in verdicts.items() if count)


_EFFECT = "accuracy does not measure the model's ability"


class _FirstLook:
    """Warns during sampling, after the first answers, if nearly none of them can be graded."""

    def __init__(self, task: Task, limit: int):
        self.watch = AnswerWatch(limit=limit, flag="--max_new_tokens", train=False)
        self._task = task
        self._answers: list[Completion] = []
        self._done = task.answers_found([]) is None

    def __call__(self, answers: Sequence[Completion]) -> None:
        if not self._done:
            self._answers += answers
            self._done = len(self._answers) >= 2 * ENOUGH
            if self._done:
                self.watch.see(self._task, counts_of(self._task, self._answers), _EFFECT)


def counts_of(task: Task, answers: Sequence[Completion], scores: Sequence[float] | None = None) -> Counts:
    """Counts of answers for a warning; without scores they count as 0."""
    return Counts.of(task, [a.marked for a in answers], [a.truncated for a in answers], scores or [0.0] * len(answers))


def missing_text(result: EvalResult, task: Task, limit: int) -> str:
    """`missing_answers` for a result; "" if most answers could be graded."""
    answers = [answer for row in result.completions for answer in row]
    counts = counts_of(task, answers, [score for row in result.scores for score in row])
    if not counts.nearly_none and not mostly_missing(counts.found, counts.answers):
        return ""
    return missing_answers(task, counts, limit=limit, flag="--max_new_tokens", effect=_EFFECT)


def _write(result: EvalResult, arguments: EvalArguments, task: str, temperature: float) -> None:
    path = Path(arguments.output or "")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in result.rows())
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    revision = {} if arguments.model_revision is None else {"model_revision": arguments.model_revision}
    summary = {"model": arguments.model, **revision, "task": task, "temperature": temperature, **result.summary()}
    target = summary_path(path)
    write_atomically(target, lambda temporary: temporary.write_text(json.dumps(summary, indent=2)))
    print(f"answers: {path}\nsummary: {target}")
