"""Typed rows of a run's files: training steps, searches with their trials, evaluations.

Standard library only: reading a run needs neither torch nor the trainers. The tables of
`docs/run_files.md` are generated from these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Self

from effopd.common.files import read_rows
from effopd.runs.columns import Column, Group, Record

METRICS, EVALS, SEARCHES = "metrics.jsonl", "evals.jsonl", "searches.jsonl"
CONFIG = "config.yaml"
BEST = "best.json"

#: Metric of `evaluate_task` → whether more is better; `None`: neither more nor less is.
DIRECTIONS: dict[str, bool | None] = {
    "kl": False,
    "kl_se": False,
    "loss": False,
    "accuracy": True,
    "accuracy_low": True,
    "accuracy_high": True,
    "accuracy_greedy": True,
    "accuracy_greedy_low": True,
    "accuracy_greedy_high": True,
    "truncated_share": False,
    "answers": None,
    "answers_cut": None,
    "answers_empty": None,
    "response_length": None,
    "runtime": None,
}


def metric_names(*, teacher: bool, greedy: bool) -> list[str]:
    """Names of the metrics that `evaluate_task` returns."""
    without = [] if teacher else ["kl", "kl_se", "loss"]
    return [name for name in DIRECTIONS if name not in without and (greedy or "greedy" not in name)]


Number = float | None
Count = int | None


@dataclass(frozen=True)
class Costs(Record, prefix="cost/"):
    """Cumulative costs of a run: seconds on its `cost_clock`, and tokens of all processes.

    Seconds are those of the slowest process, per column. *Sampled* tokens are counted when they are
    generated, tool output not among them; *forward* tokens in all other forward passes.
    """

    rollout_seconds: Annotated[Number, Column("sampling the rollouts", "s")] = None
    teacher_seconds: Annotated[
        Number, Column("forward passes of the teacher, or of the reference in reinforcement learning", "s")
    ] = None
    update_seconds: Annotated[Number, Column("loss, backward pass and optimizer", "s")] = None
    search_seconds: Annotated[Number, Column("the look-ahead", "s")] = None
    eval_seconds: Annotated[Number, Column("evaluation", "s")] = None
    other_seconds: Annotated[Number, Column("everything else: data, logging, saving", "s")] = None
    rollout_generated_tokens: Annotated[Count, Column("sampled for rollouts", "tokens")] = None
    search_generated_tokens: Annotated[Count, Column("sampled by searches", "tokens")] = None
    eval_generated_tokens: Annotated[Count, Column("sampled by evaluations", "tokens")] = None
    teacher_forward_tokens: Annotated[Count, Column("forward tokens of the teacher or that reference", "tokens")] = (
        None
    )
    update_forward_tokens: Annotated[Count, Column("forward tokens of the student's loss", "tokens")] = None
    search_forward_tokens: Annotated[Count, Column("forward tokens of searches", "tokens")] = None
    search_teacher_tokens: Annotated[Count, Column("the teacher's part of the searches' forward tokens", "tokens")] = (
        None
    )
    eval_forward_tokens: Annotated[Count, Column("forward tokens of evaluations", "tokens")] = None
    net_seconds: Annotated[Number, Column("all seconds except evaluation; search included", "s")] = None
    net_generated_tokens: Annotated[Count, Column("all sampled tokens except evaluation", "tokens")] = None
    net_forward_tokens: Annotated[
        Count,
        Column("all forward tokens except evaluation; also the student's before the loss, without a column", "tokens"),
    ] = None

    @property
    def teacher_tokens(self) -> int | None:
        """Net forward tokens of the teacher and of other frozen models, searches included."""
        in_search = 0 if self.search_forward_tokens == 0 else self.search_teacher_tokens
        if self.teacher_forward_tokens is None or in_search is None:
            return None
        return self.teacher_forward_tokens + in_search

    @property
    def student_forward_tokens(self) -> int | None:
        """Net forward tokens of the student outside sampling, searches included."""
        teacher = self.teacher_tokens
        return None if teacher is None or self.net_forward_tokens is None else self.net_forward_tokens - teacher

    @property
    def student_backward_tokens(self) -> int | None:
        """Tokens in backward passes: every forward token of the loss has one."""
        return self.update_forward_tokens


@dataclass(frozen=True)
class Health(Record, prefix="health/"):
    """Token-level metrics on some of a step's tokens, before its update.

    p: student, q: teacher, y: the sampled token.
    """

    sampler_logp_gap: Annotated[Number, Column("mean |log p(y) at sampling − log p(y) in the loss|", "nats")] = None
    sampled_reverse_kl: Annotated[Number, Column("mean of log p(y) − log q(y)", "nats")] = None
    sampled_reverse_kl_p95: Annotated[Number, Column("95th percentile of log p(y) − log q(y)", "nats")] = None
    reverse_kl: Annotated[Number, Column("exact KL(p ‖ q), mean over tokens", "nats")] = None
    reverse_kl_q1: Annotated[Number, Column("the same, over the first quarter of each answer", "nats")] = None
    reverse_kl_q2: Annotated[Number, Column("the same, over the second quarter", "nats")] = None
    reverse_kl_q3: Annotated[Number, Column("the same, over the third quarter", "nats")] = None
    reverse_kl_q4: Annotated[Number, Column("the same, over the last quarter", "nats")] = None
    overlap_ratio: Annotated[Number, Column("share of the 16 most likely tokens that p and q have in common")] = None
    student_overlap_mass: Annotated[Number, Column("probability of the shared tokens under p")] = None
    teacher_overlap_mass: Annotated[Number, Column("probability of the shared tokens under q")] = None
    overlap_advantage: Annotated[
        Number, Column("Σ p̂ (log q̂ − log p̂), both renormalized on the shared tokens", "nats")
    ] = None
    student_entropy: Annotated[Number, Column("entropy of p", "nats")] = None
    teacher_entropy: Annotated[Number, Column("entropy of q", "nats")] = None
    entropy_gap: Annotated[Number, Column("mean |entropy of p − entropy of q|", "nats")] = None
    support_mass: Annotated[Number, Column("loss_type teacher_top_k: probability of q's top k under p")] = None
    outside_support: Annotated[Number, Column("loss_type teacher_top_k: share of y outside q's top k")] = None


@dataclass(frozen=True)
class Served(Record, prefix="served/"):
    """With `--teacher_server`, per process: what the teacher's top k leaves out, and traffic."""

    tail_mass: Annotated[Number, Column("the teacher's probability outside its top k, mean over tokens")] = None
    student_tail_mass: Annotated[Number, Column("the student's probability there")] = None
    tail_kl: Annotated[
        Number, Column("estimate, from the sampled tokens, of the reverse KL that the top k leaves out", "nats")
    ] = None
    received_bytes: Annotated[Number, Column("received from the server since the previous step", "bytes")] = None
    retries: Annotated[Number, Column("requests repeated since the previous step")] = None


@dataclass(frozen=True)
class Offline(Record, prefix="offline/"):
    """With `--rollouts`: drift of the student from the stored answers.

    r: probability of a stored token under the student, divided by that under its sampler.
    """

    ratio_mean: Annotated[Number, Column("mean r")] = None
    ratio_std: Annotated[Number, Column("standard deviation of r")] = None
    advantage_mean: Annotated[Number, Column("mean advantage", "nats")] = None
    clipped_share: Annotated[Number, Column("share of tokens at `--advantage_clip`")] = None
    weight_mean: Annotated[Number, Column("loss_type discord: mean token weight, before division by it")] = None
    top_k_kl: Annotated[
        Number, Column("KL to the teacher, both renormalized on the stored top-K tokens", "nats per token")
    ] = None


@dataclass(frozen=True)
class Prune(Record, prefix="prune/"):
    """Prune-OPD: agreement of student and teacher on a step's answers, over all processes."""

    hit_share: Annotated[Number, Column("share of answers that are reliable up to the maximum length")] = None
    reliable_length: Annotated[Number, Column("mean reliable length of the answers", "tokens")] = None
    bad_share: Annotated[Number, Column("share of tokens with an overlap below prune_threshold")] = None
    overlap: Annotated[Number, Column("mean overlap of the two sets of likeliest tokens")] = None
    weight: Annotated[Number, Column("mean token weight")] = None


@dataclass(frozen=True)
class SearchMetrics(Record, prefix="effopd/"):
    """A search in the row of its step; means if a row covers several steps (`--logging_steps`)."""

    accepted_scale: Annotated[Number, Column("scale s of the jump; 0: no jump, negative: backward jump")] = None
    delta_norm: Annotated[Number, Column("‖Δ‖ over all moved weights")] = None
    candidates: Annotated[Number, Column("number of candidates, without the start")] = None
    search_seconds: Annotated[Number, Column("wall-clock time of the search", "s")] = None
    search_generated_tokens: Annotated[Number, Column("tokens sampled by the search", "tokens")] = None
    start_score: Annotated[Number, Column("score at s = 0")] = None
    memory_bytes: Annotated[Number, Column("memory of the look-ahead beyond the model, on this rank", "bytes")] = None
    best_scale: Annotated[Number, Column("the highest-scoring scale, accepted or not")] = None
    best_gain: Annotated[Number, Column("highest score − score at s = 0")] = None
    learning_rate_factor: Annotated[Number, Column("product of the factors of all searches so far")] = None


@dataclass(frozen=True)
class StepRecord(Record):
    """A row of `metrics.jsonl`: an optimizer step, or a mean over several (`--logging_steps`)."""

    step: Annotated[int, Column("optimizer steps done, from 1")]
    loss: Annotated[Number, Column("the training objective", "nats per token, for distillation")] = None
    grad_norm: Annotated[Number, Column("‖gradient‖ before clipping")] = None
    learning_rate: Annotated[Number, Column("the schedule's rate times the look-ahead's factor")] = None
    costs: Annotated[Costs, Group(Costs)] = field(default_factory=Costs)
    entropy: Annotated[Number, Column("entropy of the student, mean over tokens", "nats")] = None
    mean_length: Annotated[Number, Column("mean length of the answers", "tokens", "completions/mean_length")] = None
    clipped_share: Annotated[Number, Column("share of answers cut at the limit", "", "completions/clipped_ratio")] = (
        None
    )
    reward: Annotated[Number, Column("reinforcement learning: mean reward")] = None
    kl: Annotated[Number, Column("reinforcement learning: KL to the start, or to the teacher of dgrpo", "nats")] = None
    tied_groups_share: Annotated[
        Number,
        Column(
            "reinforcement learning: share of groups with equal rewards, which have no gradient",
            "",
            "frac_reward_zero_std",
        ),
    ] = None
    horizon: Annotated[Number, Column("maximum length of the rollouts, with a rollout_horizon", "tokens")] = None
    stage: Annotated[Number, Column("stage of the curriculum, from 1", "", "curriculum/stage")] = None
    replay_age: Annotated[
        Number, Column("with replay_batches: batches sampled since the one that is trained on", "", "replay/age")
    ] = None
    on_policy: Annotated[
        Number, Column("lmbda, teacher_mixed_alpha: 1 if the student sampled alone", "", "rollouts/on_policy")
    ] = None
    prune: Annotated[Prune, Group(Prune)] = field(default_factory=Prune)
    health: Annotated[Health, Group(Health)] = field(default_factory=Health)
    served: Annotated[Served, Group(Served)] = field(default_factory=Served)
    offline: Annotated[Offline, Group(Offline)] = field(default_factory=Offline)
    search: Annotated[SearchMetrics, Group(SearchMetrics)] = field(default_factory=SearchMetrics)
    #: Other values that the host logged, by key.
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationRecord(Record, prefix="eval_"):
    """A row of `evals.jsonl`: an evaluation on held-out prompts."""

    step: Annotated[int, Column("optimizer steps done; 0: before training", "", "step")]
    kl: Annotated[Number, Column("exact reverse KL to the teacher, mean over tokens", "nats per token")] = None
    kl_se: Annotated[Number, Column("standard error of `eval_kl` over prompts", "nats per token")] = None
    loss: Annotated[Number, Column("equal to `eval_kl`; without a task, the host's loss", "nats per token")] = None
    accuracy: Annotated[Number, Column("share of right answers, one sampled per prompt")] = None
    accuracy_low: Annotated[Number, Column("lower end of its 95 % interval")] = None
    accuracy_high: Annotated[Number, Column("upper end of its 95 % interval")] = None
    accuracy_greedy: Annotated[Number, Column("share of right answers with greedy decoding (`--eval_greedy`)")] = None
    accuracy_greedy_low: Annotated[Number, Column("lower end of its 95 % interval")] = None
    accuracy_greedy_high: Annotated[Number, Column("upper end of its 95 % interval")] = None
    kl_beyond_horizon: Annotated[
        Number, Column("share of `eval_kl` on tokens beyond the horizon of the rollouts, with a rollout_horizon")
    ] = None
    tail_mass: Annotated[
        Number, Column("`--teacher_server`, where `eval_kl` is a lower bound: the teacher's mass outside its top k")
    ] = None
    tail_kl: Annotated[
        Number, Column("`--teacher_server`: estimate of what `eval_kl` leaves out there", "nats per token")
    ] = None
    reward: Annotated[Number, Column("without a task: mean reward")] = None
    response_length: Annotated[Number, Column("mean length of the sampled answers", "tokens")] = None
    truncated_share: Annotated[Number, Column("share of sampled answers cut at the limit")] = None
    answers: Annotated[Count, Column("number of sampled answers")] = None
    answers_found: Annotated[Count, Column("sampled answers with something to grade, if the verifier reports it")] = (
        None
    )
    answers_cut: Annotated[Count, Column("sampled answers cut at the limit")] = None
    answers_empty: Annotated[Count, Column("sampled answers without text")] = None
    verdict_passed: Annotated[Count, Column("code tasks: answers whose program passed")] = None
    verdict_wrong: Annotated[Count, Column("code tasks: answers with a wrong result")] = None
    verdict_error: Annotated[Count, Column("code tasks: programs that raised or died")] = None
    verdict_timeout: Annotated[Count, Column("code tasks: programs stopped at a time limit")] = None
    verdict_memory: Annotated[Count, Column("code tasks: programs stopped at the memory limit")] = None
    verdict_refused: Annotated[Count, Column("code tasks: answers without a program")] = None
    runtime: Annotated[Number, Column("wall-clock time of the evaluation", "s")] = None
    costs: Annotated[Costs, Group(Costs)] = field(default_factory=Costs)
    #: Other values that the host reported, by key (with the prefix `eval_`).
    extra: Mapping[str, Any] = field(default_factory=dict)
    #: Prefix of the keys in the row: `eval`, or with several datasets `eval_first` and so on.
    name: str = "eval"

    def to_row(self) -> dict[str, Any]:
        return _renamed(super().to_row(), "eval", self.name)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        name = next((key.removesuffix("_runtime") for key in row if key.endswith("_runtime")), "eval")
        return replace(super().from_row(_renamed(row, name, "eval")), name=name)


def _renamed(row: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new + key.removeprefix(old) if key.startswith(f"{old}_") else key: value for key, value in row.items()}


@dataclass(frozen=True)
class TrialRecord(Record):
    """A candidate W + sΔ of a search; without score and costs if it was not scored."""

    scale: Annotated[float, Column("s")]
    verdict: Annotated[str, Column("`start`, `accepted`, `rejected` or `non-finite`")]
    score: Annotated[Number, Column("larger is better; null: not finite")] = None
    per_example: Annotated[tuple[float, ...] | None, Column("score per validation example, in a fixed order")] = None
    seconds: Annotated[Number, Column("wall-clock time of scoring it", "s")] = None
    generated_tokens: Annotated[Count, Column("tokens sampled for the score", "tokens")] = None
    forward_tokens: Annotated[Count, Column("tokens of forward passes other than sampling", "tokens")] = None
    verdicts: Annotated[Mapping[str, int] | None, Column("code tasks: number of answers by verdict")] = None

    def to_row(self) -> dict[str, Any]:
        """As for every record, but a scored candidate always has a score: null if not finite."""
        start = {"scale": self.scale, "verdict": self.verdict}
        if self.seconds is not None:
            start["score"] = self.score
        row = start | super().to_row()
        return row if self.per_example is None else row | {"per_example": list(self.per_example)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        values = row.get("per_example")
        return super().from_row({**row, "per_example": None if values is None else tuple(values)})


@dataclass(frozen=True)
class SearchRecord(Record):
    """A row of `searches.jsonl`: a search, or an observation of a strategy that predicts."""

    step: Annotated[
        int,
        Column(
            "optimizer step after which the search ran; with `score_rollouts`, the step that then trains on the "
            "scored rollouts"
        ),
    ]
    anchor_step: Annotated[Count, Column("step of the weights that are the anchor; 0: the initial weights")] = None
    delta_norm: Annotated[Number, Column("‖Δ‖ over all moved weights; null: not finite", null=True)] = None
    accepted_scale: Annotated[float, Column("scale s of the jump; 0: no jump, negative: backward jump")] = 0.0
    best_scale: Annotated[Number, Column("the highest-scoring scale, accepted or not; decides the learning rate")] = (
        None
    )
    seconds: Annotated[float, Column("wall-clock time of the search", "s")] = 0.0
    generated_tokens: Annotated[int, Column("tokens sampled by the search", "tokens")] = 0
    forward_tokens: Annotated[int, Column("tokens of forward passes other than sampling", "tokens")] = 0
    trials: Annotated[tuple[TrialRecord, ...], Column("the start and the candidates, in order of scoring")] = ()
    memory_bytes: Annotated[Count, Column("memory of the look-ahead beyond the model, on this rank", "bytes")] = None
    learning_rate_factor: Annotated[Number, Column("factor of this search on the schedule's learning rate")] = None
    learning_rate_factor_total: Annotated[Number, Column("product of the factors of all searches so far")] = None
    lora_lost_share: Annotated[Number, Column("LoRA: largest share of a matrix's jump lost to the adapter's rank")] = (
        None
    )
    fit: Annotated[Mapping[str, Number] | None, Column("strategies that predict: measures of the fit, by name")] = None
    observation: Annotated[Count, Column("strategies that predict: number of the observation, from 1")] = None
    teacher_tokens: Annotated[
        Count, Column("the teacher's part of `forward_tokens`, which no loss reads", "tokens")
    ] = None

    @property
    def searched(self) -> bool:
        """Whether the search scored or proposed a candidate besides the start."""
        return len(self.trials) > 1

    @property
    def candidates(self) -> int:
        """Number of candidates, without the start."""
        return max(len(self.trials) - 1, 0)

    @property
    def start_score(self) -> float | None:
        """The score at s = 0."""
        return self.trials[0].score if self.trials else None

    @property
    def best_gain(self) -> float | None:
        """Highest score minus the score at s = 0; `None` without both."""
        scores = [trial.score for trial in self.trials if trial.score is not None]
        return None if self.start_score is None or len(scores) < 2 else max(scores) - self.start_score

    def metrics(self) -> SearchMetrics:
        """The part of the search that the row of its step contains."""
        return SearchMetrics(
            accepted_scale=self.accepted_scale,
            delta_norm=self.delta_norm,
            candidates=self.candidates,
            search_seconds=self.seconds,
            search_generated_tokens=self.generated_tokens,
            start_score=self.start_score,
            memory_bytes=self.memory_bytes,
            best_scale=self.best_scale,
            best_gain=self.best_gain,
            learning_rate_factor=self.learning_rate_factor_total,
        )

    def to_row(self) -> dict[str, Any]:
        return super().to_row() | {"trials": [trial.to_row() for trial in self.trials]}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        return super().from_row({**row, "trials": tuple(map(TrialRecord.from_row, row.get("trials", ())))})


def read_steps(run: Path) -> list[StepRecord]:
    """The logged steps of a run directory; empty without `metrics.jsonl`."""
    return [StepRecord.from_row(row) for row in read_rows(run / METRICS)]


def read_searches(run: Path) -> list[SearchRecord]:
    """The searches of a run directory; empty without `searches.jsonl`."""
    return [SearchRecord.from_row(row) for row in read_rows(run / SEARCHES)]


def read_evaluations(run: Path) -> list[EvaluationRecord]:
    """The evaluations of a run directory; empty without `evals.jsonl`."""
    return [EvaluationRecord.from_row(row) for row in read_rows(run / EVALS)]
