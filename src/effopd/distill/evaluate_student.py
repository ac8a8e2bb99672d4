"""Held-out exact reverse KL and accuracy of a student, on the same sampled answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effopd.common.distributed import all_gather_or_raise, merge_from_ranks, rank, split_between_ranks
from effopd.common.isolation import evaluating
from effopd.common.statistics import accuracy_interval, ratio_with_error
from effopd.distill.divergence import AnswerKL, answer_kls
from effopd.distill.served.measure import kl_of_completions
from effopd.distill.served.teacher import ServedTeacher
from effopd.distill.teachers.offload import in_use
from effopd.distill.teachers.several import TeacherSet, kl_sums_by_teacher
from effopd.runs.ledger import CostLedger
from effopd.runs.missing_answers import AnswerWatch, Counts
from effopd.tasks.base import Grading, Task, verdict_counts
from effopd.tasks.evaluate import evaluate
from effopd.tasks.generate import Completion
from effopd.tasks.sampling import Sampling


class OwnTeachers(NamedTuple):
    """Several teachers, each for its own rows of a task; `unwrap` removes a trainer's wrappers."""

    teachers: TeacherSet
    unwrap: Callable


def evaluate_trainer(
    trainer: Any, task: Task, teacher: PreTrainedModel | TeacherSet | ServedTeacher | None
) -> tuple[dict[str, float], int]:
    """`evaluate_task` for the student and the settings of a distillation trainer.

    Args:
        trainer: an `OPDTrainer`, `OfflineOPDTrainer` or `TaskDGRPOTrainer`.
        teacher: the trainer's teacher or teachers as it holds them, or `None`.
    """
    unwrap, schedule = trainer.accelerator.unwrap_model, getattr(trainer, "horizon", None)
    if isinstance(teacher, TeacherSet):
        teacher = OwnTeachers(teacher, unwrap)
    elif teacher is not None and not isinstance(teacher, ServedTeacher):
        teacher = unwrap(teacher)
    metrics, tokens = evaluate_task(
        unwrap(trainer.model), teacher, trainer.text_tokenizer, task,
        trainer.args, vocab_size=trainer.vocab_size, autocast=trainer.accelerator.autocast, watch=trainer.answer_watch,
        ledger=trainer.ledger,
        horizon=None if schedule is None else schedule.length(trainer.state.global_step, trainer.state.max_steps),
    )  # fmt: skip
    if schedule is not None and rank() == 0:
        schedule.see(metrics.get("kl_beyond_horizon", 0.0))
    return metrics, tokens


def evaluate_task(
    student: PreTrainedModel,
    teacher: PreTrainedModel | OwnTeachers | ServedTeacher | None,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    args: Any,
    *,
    vocab_size: int,
    autocast: Callable[[], AbstractContextManager],
    watch: AnswerWatch | None = None,
    ledger: CostLedger | None = None,
    horizon: int | None = None,
) -> tuple[dict[str, float], int]:
    """Sample one answer per prompt and measure its KL to the teacher and its accuracy.

    Every evaluation uses the same prompts and sampling noise (`args.eval_seed`), so the points of a
    curve are paired. Each rank answers a share of the prompts with its own noise, and all ranks get
    the whole result. `args.eval_greedy` adds the accuracy of greedy decoding.

    Args:
        teacher: `None`: no `kl`, `kl_se` and `loss`. With several, the KL of each answer is that to
            its own row's teacher, and `kl_LABEL` is the mean over the rows of one teacher. A served
            teacher: `kl` is that of its support (`effopd.distill.served.support`), and `tail_mass`
            and `tail_kl` are added.
        watch: warns on rank 0 if nearly no answer can be graded.
        ledger: rank 0 adds the forward tokens of the KL to it, those of student and local teacher.
        horizon: maximum length of the training rollouts; `kl_beyond_horizon` is added. `None`: not
            shorter than the answers.

    Returns:
        Metrics without prefix, as `EvaluationRecord` describes them, and the number of tokens
        generated over all ranks. `answers_found` is there only if the verifier reports it.
    """
    start = time.perf_counter()
    answers = _Answers(student, tokenizer, task, args, vocab_size, autocast, horizon or 0)
    sampled = answers.at(args.eval_temperature, teacher)
    if watch is not None and rank() == 0:
        watch.see(task, _counts(sampled), f"the accuracy on {task.name} does not measure the student's ability")
    metrics: dict[str, float] = {}
    if teacher is not None:
        kl, error = ratio_with_error([answer.kl for answer in sampled], [answer.tokens for answer in sampled])
        metrics = {"kl": kl, "kl_se": error, "loss": kl}
        if ledger is not None and rank() == 0:
            models = 1 if isinstance(teacher, ServedTeacher) else 2
            ledger.count("eval", forward=models * sum(answer.prompt + answer.tokens for answer in sampled))
        if horizon is not None and (total := sum(answer.kl for answer in sampled)) > 0:
            metrics["kl_beyond_horizon"] = sum(answer.late for answer in sampled) / total
        if len(sampled) < 2:
            del metrics["kl_se"]  # one answer has no standard error
        if isinstance(teacher, OwnTeachers):
            metrics |= _kl_by_teacher(sampled, teacher.teachers.labels)
    if isinstance(teacher, ServedTeacher):
        tokens = max(1, sum(answer.tokens for answer in sampled))
        metrics |= {
            "tail_mass": sum(answer.tail_mass for answer in sampled) / tokens,
            "tail_kl": sum(answer.tail_kl for answer in sampled) / tokens,
        }
    metrics |= _accuracy("accuracy", sampled)
    greedy = answers.at(0.0) if args.eval_greedy else []
    if greedy:
        metrics |= _accuracy("accuracy_greedy", greedy)
    metrics |= {
        "response_length": float(np.mean([answer.tokens for answer in sampled])),
        "truncated_share": float(np.mean([answer.truncated for answer in sampled])),
        "answers": len(sampled),
        **({"answers_found": sum(bool(a.gradable) for a in sampled)} if sampled[0].gradable is not None else {}),
        "answers_cut": sum(answer.truncated for answer in sampled),
        "answers_empty": sum(answer.empty for answer in sampled),
        **_verdicts(sampled),
        "runtime": time.perf_counter() - start,
    }
    return metrics, sum(answer.tokens for answer in [*sampled, *greedy])


class _Answer(NamedTuple):
    correct: bool
    tokens: int
    truncated: bool
    kl: float  # sum over its tokens, in nats
    gradable: bool | None  # has something to grade; `None`: the verifier does not report it
    empty: bool
    scored: bool  # has a verifier score above 0
    verdict: str | None  # of a verifier that runs programs
    example: str  # of one answer of each rank that has nothing to grade, the text
    late: float = 0.0  # part of `kl` beyond the horizon
    tail_mass: float = 0.0  # of a served teacher outside its top k, sum over tokens
    tail_kl: float = 0.0  # estimate of what `kl` leaves out there, in nats
    teacher: int = 0  # index of its row's teacher, with several
    prompt: int = 0  # tokens of its prompt


def _kl_by_teacher(answers: Sequence[_Answer], labels: Sequence[str]) -> dict[str, float]:
    """Mean KL per token, in nats, over the rows of each teacher that has rows."""
    means = {}
    for index, label in enumerate(labels):
        mine = [answer for answer in answers if answer.teacher == index]
        if mine:
            means[f"kl_{label}"], _ = ratio_with_error([each.kl for each in mine], [each.tokens for each in mine])
    return means


def _counts(answers: Sequence[_Answer]) -> Counts:
    return Counts(
        answers=len(answers),
        found=None if answers[0].gradable is None else sum(bool(answer.gradable) for answer in answers),
        cut=sum(answer.truncated for answer in answers),
        empty=sum(answer.empty for answer in answers),
        right=sum(answer.scored for answer in answers),
        example=next((answer.example for answer in answers if answer.example), ""),
    )


def _verdicts(answers: Sequence[_Answer]) -> dict[str, int]:
    """Number of answers by verdict; empty if the verifier has only scores."""
    counts = verdict_counts([Grading(float(answer.correct), answer.verdict) for answer in answers])
    return {f"verdict_{name}": count for name, count in (counts or {}).items()}


def _accuracy(name: str, answers: Sequence[_Answer]) -> dict[str, float]:
    interval = accuracy_interval([[answer.correct] for answer in answers])
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


@dataclass(frozen=True)
class _Answers:
    """Samples the student's answers to all prompts of a task and measures their KL to a teacher."""

    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    args: Any
    vocab_size: int
    autocast: Callable[[], AbstractContextManager]
    horizon: int

    def at(
        self, temperature: float, teacher: PreTrainedModel | OwnTeachers | ServedTeacher | None = None
    ) -> list[_Answer]:
        """One answer per prompt, in order; each rank samples a share, all ranks get all answers."""
        shares = all_gather_or_raise(lambda: self._of_this_rank(temperature, teacher))
        return merge_from_ranks(shares, len(self.task))

    def _of_this_rank(
        self, temperature: float, teacher: PreTrainedModel | OwnTeachers | ServedTeacher | None
    ) -> list[_Answer]:
        task = self.task.subset(split_between_ranks(self.task.examples))
        silent = self.args.disable_tqdm or rank() > 0
        with tqdm(total=len(task), desc="evaluate", leave=False, disable=silent or None) as bar:
            result = evaluate(
                self.student,
                self.tokenizer,
                task,
                _sampling(self.args, temperature),
                vocab_size=self.vocab_size or None,
                progress=bar.update,
            )
        completions = [row[0] for row in result.completions]
        kl, own = [AnswerKL()] * len(task), [0] * len(task)
        if isinstance(teacher, OwnTeachers):
            own = teacher.teachers.indices(task.examples)
        if teacher is not None:  # `if teacher` would call len() on a compiled module
            kl = self._kl(teacher, own, completions)
        reported = task.answers_found([completion.marked for completion in completions])
        gradable: Sequence[bool | None] = [None] * len(task) if reported is None else reported
        verdicts = [row[0].verdict for row in result.gradings] or [None] * len(task)
        answers = [
            _Answer(
                correct,
                len(c.completion_ids),
                c.truncated,
                kl_sum.kl,
                to_grade,
                not c.text.strip(),
                score > 0,
                verdict,
                "",
                kl_sum.late,
                kl_sum.tail_mass,
                kl_sum.tail_kl,
                index,
                len(c.prompt_ids),
            )
            for c, (correct,), (score,), kl_sum, to_grade, verdict, index in zip(
                completions, result.correct, result.scores, kl, gradable, verdicts, own, strict=True
            )
        ]
        for i, answer in enumerate(answers):
            if not (answer.scored if answer.gradable is None else answer.gradable) and not answer.empty:
                answers[i] = answer._replace(example=completions[i].marked)
                break
        return answers

    def _kl(self, teacher: Any, own: Sequence[int], completions: Sequence[Completion]) -> list[AnswerKL]:
        """KL(student ‖ teacher) of each answer, in nats, summed over its tokens.

        Args:
            own: index of each row's teacher, if there are several.
        """
        prompts = [completion.prompt_ids for completion in completions]
        answers = [completion.completion_ids for completion in completions]
        ends: dict[str, Any] = {
            "pad_token_id": self.tokenizer.pad_token_id, "temperature": self.args.temperature,
            "batch_size": self.args.per_device_eval_batch_size, "horizon": self.horizon,
        }  # fmt: skip
        student, size = self.student, self.vocab_size
        with evaluating(student), self.autocast():
            if isinstance(teacher, ServedTeacher):
                return kl_of_completions(student, teacher, prompts, answers, **ends)
            if isinstance(teacher, OwnTeachers):
                models, unwrap = teacher
                return kl_sums_by_teacher(student, models, unwrap, own, prompts, answers, vocab_size=size, **ends)
            with evaluating(teacher), in_use(teacher):
                return answer_kls(student, teacher, prompts, answers, vocab_size=size, **ends)


def _sampling(args: Any, temperature: float) -> Sampling:
    return Sampling(
        temperature=temperature,
        max_new_tokens=args.max_completion_length,
        batch_size=args.per_device_eval_batch_size,
        chat_template_kwargs=args.chat_template_kwargs,
        seed=args.eval_seed + rank(),  # ranks must not share sampling noise
    )
