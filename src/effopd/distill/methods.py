"""`METHODS`: all training methods of the package, with their papers, flags and needs.

The taxonomy follows the survey arXiv 2604.00626: what is optimized, where the signal comes from,
how training is stabilized, and whether the trained tokens are the student's own.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("objective", "data", "schedule", "reward", "look-ahead")
#: What a method can need besides prompts and a student.
NEEDS = ("teacher logits", "teacher top-k", "teacher log-probs", "reference logits", "answers", "rewards")


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: short name.
        kind: one of `KINDS`.
        paper: arXiv id; "": of this package.
        flags: flags of `effopd train`, or of the command that they start with, that select it.
        objective: what is optimized.
        signal: where the training signal comes from.
        dynamics: how training is stabilized or scheduled; "": nothing.
        on_policy: whether the trained tokens are sampled from the current student.
        needs: entries of `NEEDS`.
    """

    name: str
    kind: str
    paper: str
    flags: str
    objective: str
    signal: str
    dynamics: str
    on_policy: bool
    needs: tuple[str, ...]


_TEACHER, _SAMPLED = ("teacher logits",), ("teacher log-probs",)

METHODS: list[Method] = [
    # -- objectives
    Method(
        "full KL", "objective", "2604.00626", "--loss_type full --beta 1", "KL(student ‖ teacher) over the vocabulary",
        "teacher, token", "", True, _TEACHER,
    ),
    Method(
        "f-divergence", "objective", "2604.00626", "--loss_type full --beta BETA --normalize_beta true",
        "forward KL at 0, Jensen–Shannon between, reverse KL at 1", "teacher, token", "", True, _TEACHER,
    ),
    Method(
        "sampled", "objective", "2605.11739", "--loss_type sampled", "reverse KL, policy gradient",
        "teacher, token", "", True, _SAMPLED,
    ),
    Method(
        "vOPD", "objective", "2605.07865", "--loss_type sampled --baseline value [--baseline_top_k 100]",
        "reverse KL, policy gradient", "teacher, token", "baseline −KL", True, _TEACHER,
    ),
    Method(
        "optimal baseline", "objective", "", "--loss_type sampled --baseline optimal", "reverse KL, policy gradient",
        "teacher, token", "variance-minimal scalar baseline", True, _TEACHER,
    ),
    Method(
        "several samples", "objective", "2606.24143", "--loss_type sampled --samples_per_prefix M",
        "reverse KL, policy gradient", "teacher, token", "mean of M tokens per prefix", True, _TEACHER,
    ),
    Method(
        "Revisiting OPD", "objective", "2603.25562",
        "--loss_type teacher_top_k --top_p 0.9 [--token_mask first_special]",
        "reverse KL renormalized on the teacher's top k", "teacher, token", "special-token mask", True,
        ("teacher top-k",),
    ),
    Method(
        "ExOPD", "objective", "2602.12125", "--lambda_extrapolation 1.25 --reference_model_name_or_path REF",
        "KL to the target beyond the teacher", "teacher and reference, token", "", True,
        ("teacher logits", "reference logits"),
    ),
    Method(
        "negative advantage", "objective", "2608.31046", "--loss_type negative_advantage",
        "fixed advantage on unlikely tokens", "self", "", True, (),
    ),
    Method(
        "OPSA", "objective", "2608.31046", "--loss_type negative_advantage --entropy_advantage true",
        "negative advantage on unlikely tokens", "self", "grows with the student's entropy", True, (),
    ),
    # -- data
    Method(
        "served teacher", "data", "", "--teacher_server URL --teacher_top_k K",
        "divergence of the teacher's top k and one outcome for the rest", "teacher, token", "", True,
        ("teacher top-k",),
    ),
    Method(
        "Lightning OPD", "data", "2604.13010", "effopd cache, then --rollouts DIR",
        "reverse KL, policy gradient with a clipped advantage", "teacher, token, stored",
        "drift of the student is watched", False, _SAMPLED,
    ),
    Method(
        "Lightning OPD 2.0", "data", "2607.28449", "effopd cache, then --rollouts DIR --residualize true",
        "reverse KL, policy gradient with a clipped advantage", "teacher, token, stored",
        "the teacher's mean bias by token and place is subtracted", False, _SAMPLED,
    ),
    Method(
        "DisCorD", "data", "2605.14071", "effopd cache --sampled_by teacher, then --rollouts DIR --loss_type discord",
        "weighted cross-entropy on correct teacher answers", "teacher, token, stored",
        "sigmoid of the student/teacher ratio", False, ("teacher log-probs", "answers"),
    ),
    Method(
        "GKD mixing", "data", "2306.13649", "--lmbda 0.5 [--traces DIR]", "full KL or teacher top k",
        "teacher, token", "given answers in a share of the steps", False, _TEACHER,
    ),
    Method(
        "MiniLLM sampler", "data", "2306.08543", "--teacher_mixed_alpha 0.2", "full KL, teacher top k or sampled",
        "teacher, token", "tokens drawn from α teacher + (1−α) student; bounded importance weights in sampled", False,
        _TEACHER,
    ),
    Method(
        "Replay", "data", "1011.0686", "--updates_per_rollouts 3 --replay_batches 10",
        "full KL, f-divergence or teacher top k", "teacher, token",
        "several updates per batch, the last on a random one of the last 10 (dataset aggregation)", False, _TEACHER,
    ),
    Method(
        "Mini-batches", "data", "1707.06347", "--updates_per_rollouts 8 --num_mini_batches 8",
        "full KL, f-divergence or teacher top k", "teacher, token",
        "a large batch of rollouts in parts, one update on each (PPO)", False, _TEACHER,
    ),
    # -- schedules
    Method(
        "ESR", "schedule", "2605.27028", "--rollout_horizon esr --horizon_tokens 100", "any", "any",
        "rollouts cut to a number of tokens", True, (),
    ),
    Method(
        "TOPD", "schedule", "2605.31490", "--rollout_horizon topd --horizon_fraction 0.25", "any",
        "any", "rollouts cut to a fixed length", True, (),
    ),
    Method(
        "POPD", "schedule", "2605.31490", "--rollout_horizon popd", "any", "any", "rollouts grow during training",
        True, (),
    ),
    Method(
        "Randomized horizon", "schedule", "1905.07006",
        "--rollout_horizon esr --horizon_whole_share 0.25", "any but negative advantage", "any",
        "ESR, TOPD or POPD with a share of whole answers, weighted: the gradient of whole answers", True, (),
    ),
    Method(
        "Prune-OPD", "schedule", "2605.07804", "--rollout_horizon prune", "any", "teacher, token",
        "token weights and rollout length follow the top-k overlap", True, ("teacher top-k",),
    ),
    Method(
        "CLPD", "schedule", "2605.11260", "--curriculum prompt_length [--curriculum_teachers A B …]", "any", "any",
        "stages of difficulty, with a teacher each", True, (),
    ),
    # -- rewards
    Method(
        "GRPO", "reward", "2402.03300", "effopd rl --algorithm grpo", "expected reward", "verifier, answer",
        "group-relative advantage, clipped ratio", True, ("answers", "rewards"),
    ),
    Method(
        "DAPO", "reward", "2503.14476", "effopd rl --algorithm dapo", "expected reward", "verifier, answer",
        "higher upper clip, length penalty", True, ("answers", "rewards"),
    ),
    Method(
        "RLOO", "reward", "2402.14740", "effopd rl --algorithm rloo", "expected reward", "verifier, answer",
        "leave-one-out baseline", True, ("answers", "rewards"),
    ),
    Method(
        "dGRPO", "reward", "2605.12227", "effopd rl --algorithm dgrpo --teacher_model_name_or_path TEACHER",
        "expected reward − β KL(student ‖ teacher)", "verifier, answer; teacher, token",
        "group-relative advantage, clipped ratio", True, ("teacher logits", "answers", "rewards"),
    ),
    # -- look-ahead: composes with every objective and schedule of `effopd train`
    Method(
        "EffOPD", "look-ahead", "2605.11739", "--effopd.strategy effopd", "any", "any", "jumps scored by answers",
        True, ("answers",),
    ),
    Method(
        "line search", "look-ahead", "", "--effopd.strategy line_search", "any", "any",
        "jumps scored by the KL on rollouts", True, _TEACHER,
    ),
    Method(
        "Newton search", "look-ahead", "", "--effopd.strategy newton_search", "any", "any",
        "jumps and rate from the slope of the KL", True, _TEACHER,
    ),
    Method(
        "AlphaOPD", "look-ahead", "2510.00553", "--effopd.strategy alpha_opd", "any", "any", "one predicted jump",
        True, ("answers",),
    ),
    Method(
        "RELEX", "look-ahead", "2605.21468", "--effopd.strategy relex", "any", "any", "one predicted jump", True, (),
    ),
]  # fmt: skip
