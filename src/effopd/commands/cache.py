"""`effopd cache`: sample answers once, score them with teacher and student, and store them."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effopd.commands.parser import CommandParser, OneSpelling, add_dry_run, parsed
from effopd.common.progress import Counted
from effopd.distill.divergence import shared_vocab_size
from effopd.distill.offline_cache import collect, correct_rows
from effopd.distill.offline_store import (
    SAMPLERS,
    CollectCosts,
    Header,
    ModelIdentity,
    RolloutStore,
    prompts_sha256,
)
from effopd.errors import ConfigError
from effopd.launch.meta_model import check_positions_of
from effopd.launch.offline import warn_of_teachers
from effopd.launch.preflight import check_model_name, check_models, check_task, load_tokenizer
from effopd.models.checks import check_models as check_logits
from effopd.models.files import check_dtype, load_model
from effopd.models.fingerprint import model_folder, tokenizer_sha256, weights_sha256
from effopd.models.folders import check_whole_model
from effopd.runs.console import quiet_hosts
from effopd.tasks import Task, TaskConfig, load_task, needs_network
from effopd.tasks.builtin_models import resolve_model, spoken_name
from effopd.tasks.config import json_object
from effopd.tasks.generate import encode_prompts

#: Bytes per answer token on disk without top-K: an id and two log-probabilities.
_BYTES_PER_TOKEN, _BYTES_PER_TOP = 12, 8


@dataclass
class CacheArguments:
    """Flags of `effopd cache`, except those of the task."""

    model_name_or_path: str = field(
        metadata={"help": "The student that samples and from which training will start: folder, Hub id or testbed:…"}
    )
    teacher_model_name_or_path: str = field(
        metadata={"help": "The teacher, with the same tokenizer as the student: folder, Hub id or testbed:…"}
    )
    output_dir: str = field(metadata={"help": "Folder for the rollouts: new or empty, or one to continue."})
    sampled_by: str = field(
        default="student",
        metadata={
            "help": "Model that samples the answers. 'student': rollouts for offline distillation; 'teacher': "
            "traces for --loss_type discord or --lmbda, graded by the task's verifier.",
            "choices": list(SAMPLERS),
        },
    )
    sft_teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model that wrote the student's supervised data. Offline distillation needs it to be the teacher, "
            "and warns otherwise. Default: not stated."
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of a student on the Hub."})
    teacher_model_revision: str | None = field(default=None, metadata={"help": "Revision of a teacher on the Hub."})
    temperature: float = field(
        default=1.0,
        metadata={"help": "Sampling temperature (> 0); both log-probabilities are stored at this temperature."},
    )
    max_completion_length: int = field(default=256, metadata={"help": "Maximum length of an answer, in tokens."})
    top_k_logprobs: int = field(
        default=0,
        metadata={
            "help": "Number of teacher tokens stored per position, with their log-probabilities; 8 bytes each. "
            "Training then logs the KL on these tokens. 0: none."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Answers per generation batch and forward pass."})
    rows_per_file: int = field(
        default=512, metadata={"help": "Answers per Parquet file; an interrupted file is sampled again."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sampling noise."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of both models: auto, float32, bfloat16, …"})
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "JSON object with arguments of the tokenizer's chat template."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code from the models' repositories."})

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.sampled_by not in SAMPLERS:
            raise ConfigError(f"--sampled_by: expected one of {', '.join(SAMPLERS)}; got {self.sampled_by!r}.")
        self.chat_template_kwargs = json_object(
            "--chat_template_kwargs", self.chat_template_kwargs, '{"enable_thinking": false}'
        )
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"--temperature must be above 0 and finite, got {self.temperature}.")
        least = {"max_completion_length": 1, "batch_size": 1, "rows_per_file": 1, "top_k_logprobs": 0, "seed": 0}
        for name, lowest in least.items():
            if not lowest <= getattr(self, name) < 2**31:
                raise ConfigError(f"--{name} must be at least {lowest} and below 2^31, got {getattr(self, name)}.")
        if self.top_k_logprobs == 1:
            raise ConfigError("--top_k_logprobs 1: a distribution over one token is constant. Use 0, or at least 2.")

    @property
    def template(self) -> dict[str, Any]:
        """Keyword arguments of the chat template."""
        return self.chat_template_kwargs if isinstance(self.chat_template_kwargs, dict) else {}


def cache_parser() -> CommandParser:
    """The parser of `effopd cache`."""
    parser = CommandParser(
        [CacheArguments, TaskConfig],
        prog="effopd cache",
        usage="effopd cache --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER --task TASK "
        "--output_dir DIR [--FLAG VALUE …]",
        description="Sample one answer per training prompt from the student (or from the teacher, with --sampled_by\n"
        "teacher), score it with teacher and student, and store tokens and log-probabilities as Parquet.\n"
        "effopd train --rollouts DIR then trains without a teacher.\n"
        "An interrupted command continues when it is repeated.",
        epilog="Example:\n  effopd cache --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER "
        "--task math:train.jsonl --output_dir rollouts\n"
        "  effopd train --model_name_or_path STUDENT --rollouts rollouts --output_dir runs/offline",
        formatter_class=OneSpelling,
    )
    add_dry_run(parser, "Check flags, models, prompts and the output folder, print the plan and write nothing.")
    return parser


def run_cache(argv: Sequence[str]) -> int:
    """Run `effopd cache`: parse, check, sample and store."""
    arguments, task_config, command = parsed(cache_parser(), argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: effopd cache runs in one process. Start it without a launcher."
        )
    plan = _checked(arguments, task_config, dry=command.dry_run)
    for line in plan.lines:
        print(line, flush=True)
    if command.dry_run:
        return 0
    costs = _collect(arguments, plan)
    traces = plan.header.sampler == "teacher"
    correct = f"{len(correct_rows(plan.store.read(plan.header)[0])):,} of them correct; " if traces else ""
    print(
        f"stored: {plan.header.prompts:,} answers in {plan.store.folder}; {correct}this call sampled "
        f"{costs.generated_tokens:,} tokens and ran {costs.teacher_forward_tokens:,} teacher tokens in "
        f"{costs.seconds:.1f} s\n"
        f"train: effopd train --model_name_or_path {shlex.quote(spoken_name(arguments.model_name_or_path))} "
        f"--rollouts {shlex.quote(str(plan.store.folder))} "
        f"{'--loss_type discord ' if traces else ''}--temperature {arguments.temperature:g} --max_completion_length "
        f"{arguments.max_completion_length}"
    )
    return 0


@dataclass(frozen=True)
class _Plan:
    """What will be collected: the store, its header, the prompts, the tokenizer, lines to print."""

    store: RolloutStore
    header: Header
    task: Task
    tokenizer: Any
    lines: tuple[str, ...]


def _checked(arguments: CacheArguments, config: TaskConfig, *, dry: bool) -> _Plan:
    """All checks that need no weights in memory; nothing is written."""
    for role in ("", "teacher_", "sft_teacher_"):
        name = f"{role}model_name_or_path"
        if getattr(arguments, name) is not None:
            setattr(arguments, name, resolve_model(getattr(arguments, name), network=not dry))
    names = {
        "--model_name_or_path": arguments.model_name_or_path,
        "--teacher_model_name_or_path": arguments.teacher_model_name_or_path,
    }
    for flag, name in names.items():
        check_model_name(flag, name)
        check_whole_model(flag, name)
    revisions = (arguments.model_revision, arguments.teacher_model_revision)
    store, load = RolloutStore(arguments.output_dir), {"trust_remote_code": arguments.trust_remote_code}
    if not store.started:
        store.check_new()
    if dry:
        _refuse_network(names, config)
    with quiet_hosts(bars=True):
        tokenizer = load_tokenizer(arguments.model_name_or_path, revision=revisions[0], **load)
        student, teacher = names.values()
        check_models(student, teacher, tokenizer, revisions, trust_remote_code=arguments.trust_remote_code)
        graded = arguments.sampled_by == "teacher"
        why = "Answers are needed because of --sampled_by teacher: only correct traces are trained on."
        task = load_task(config, "train", answers_required=graded, why=why)
        longest = check_task(task, tokenizer, config.max_prompt_length, arguments.template, graded=graded)
        limit = arguments.max_completion_length
        for (flag, name), revision in zip(names.items(), revisions, strict=True):
            check_positions_of(flag, name, longest, limit, "--max_completion_length", revision=revision, **load)
        header = _header(arguments, config, task, tokenizer)
    if store.started:
        store.check_same(header)
    warn_of_teachers(header)
    return _Plan(store, header, task, tokenizer, tuple(_lines(header, store)))


def _refuse_network(names: dict[str, str], config: TaskConfig) -> None:
    """Refuse a dry run that would need the network."""
    for flag, name in names.items():
        if not Path(name).is_dir():
            raise ConfigError(f"{flag} {name!r}: --dry_run reads models in local folders only. Leave --dry_run out.")
    if needs_network(config):
        raise ConfigError(f"--task {config.task}: --dry_run reads local tasks only. Leave --dry_run out.")


def _header(arguments: CacheArguments, config: TaskConfig, task: Task, tokenizer: Any) -> Header:
    prompts = encode_prompts(tokenizer, [example.prompt for example in task.examples], arguments.template)
    sft = arguments.sft_teacher_model_name_or_path
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    vocab_size = _vocab_size(arguments, len(tokenizer))
    if arguments.top_k_logprobs > vocab_size:
        raise ConfigError(f"--top_k_logprobs {arguments.top_k_logprobs}: the models share {vocab_size} tokens.")
    return Header(
        teacher=_identity(
            "--teacher_model_name_or_path", arguments.teacher_model_name_or_path, arguments.teacher_model_revision
        ),
        student=_identity("--model_name_or_path", arguments.model_name_or_path, arguments.model_revision),
        sft_teacher=None if sft is None else _named(sft),
        tokenizer=tokenizer_sha256(tokenizer),
        vocab_size=vocab_size,
        temperature=arguments.temperature,
        max_completion_length=arguments.max_completion_length,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        top_k=arguments.top_k_logprobs,
        prompts=len(prompts),
        prompts_sha256=prompts_sha256(prompts),
        rows_per_file=arguments.rows_per_file,
        task={name: value for name, value in values.items() if value is not None},
        sampler=arguments.sampled_by,
    )


def _vocab_size(arguments: CacheArguments, tokens: int) -> int:
    """Vocabulary rows that both models have, from their configurations."""
    from transformers import AutoConfig

    pair = [
        argparse.Namespace(
            config=AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=arguments.trust_remote_code)
        )
        for name, revision in (
            (arguments.model_name_or_path, arguments.model_revision),
            (arguments.teacher_model_name_or_path, arguments.teacher_model_revision),
        )
    ]
    return shared_vocab_size(pair[0], pair[1], tokens)  # it reads only the configurations


def _identity(flag: str, name: str, revision: str | None) -> ModelIdentity:
    return ModelIdentity(name, revision, weights_sha256(model_folder(flag, name, revision)))


def _named(name: str) -> ModelIdentity:
    """Author of the supervised data: with a fingerprint if it is a folder, otherwise its name."""
    return ModelIdentity(name, None, weights_sha256(Path(name)) if Path(name).is_dir() else "")


def _lines(header: Header, store: RolloutStore) -> list[str]:
    tokens = header.prompts * header.max_completion_length
    size = tokens * (_BYTES_PER_TOKEN + _BYTES_PER_TOP * header.top_k)
    author = "not stated" if header.sft_teacher is None else header.sft_teacher.name
    done = header.files - len(store.missing(header)) if store.started else 0
    return [
        f"student     {header.student.name} ({header.student.sha256[:8]})",
        f"teacher     {header.teacher.name} ({header.teacher.sha256[:8]}); supervised data by: {author}",
        f"prompts     {header.prompts:,} of {header.task.get('task', '')}, in {header.files} file(s)"
        + (f", {done} already written" if done else ""),
        f"answers     one per prompt by the {header.sampler}, up to {header.max_completion_length} tokens at "
        f"temperature {header.temperature:g}; top-K {header.top_k}",
        f"written to  {store.folder}, at most {size / 1e9:,.2g} GB",
    ]


def _collect(arguments: CacheArguments, plan: _Plan) -> CollectCosts:
    done = plan.store.open(plan.header)
    if done == plan.header.prompts:
        return CollectCosts()
    load = {"dtype": arguments.dtype, "trust_remote_code": arguments.trust_remote_code}
    with quiet_hosts(bars=True):
        student = load_model(
            "--model_name_or_path", arguments.model_name_or_path, revision=arguments.model_revision or "main", **load
        )
        teacher = load_model(
            "--teacher_model_name_or_path",
            arguments.teacher_model_name_or_path,
            revision=arguments.teacher_model_revision or "main",
            **load,
        )
        check_logits(student, {"teacher": teacher}, generates=True)
    with Counted(plan.header.prompts, "collect", "answer", done=done) as bar:
        return collect(
            plan.store, plan.header, student, teacher, plan.tokenizer, plan.task,
            chat_template_kwargs=arguments.template, progress=bar.update,
        )  # fmt: skip
