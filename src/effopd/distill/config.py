"""`OPDConfig`: TRL's `DistillationConfig` with the paper's defaults and this package's flags."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from trl import DistillationConfig

from effopd.common.optional import ensure
from effopd.distill.eval_spacing import check_log_spacing
from effopd.distill.mixing_config import MixingArguments
from effopd.distill.objective_config import ObjectiveArguments
from effopd.distill.offline_config import OfflineArguments
from effopd.distill.optimizers.settings import OptimizerArguments, check_optimizer_settings
from effopd.distill.schedule_config import PRUNE_FLAGS, ScheduleArguments
from effopd.distill.served.config import ServedArguments
from effopd.distill.teachers.settings import TeacherArguments
from effopd.distill.values import check_values
from effopd.errors import ConfigError, EffOPDError
from effopd.runs.best_model import check_saved_steps, default_metric, settle_direction
from effopd.runs.ledger import CLOCKS
from effopd.runs.run_dir import in_trajectory

logger = logging.getLogger(__name__)

LOSS_WEIGHTINGS = ("token", "answer")
HORIZONS = ("full", "topd", "esr", "popd", "prune")
#: Setting → the only rollout horizon that reads it.
_ONLY_FOR = {
    "horizon_fraction": "topd", "horizon_tokens": "esr",
    "horizon_start": "popd", "horizon_stages": "popd", "horizon_growth": "popd",
    **dict.fromkeys(PRUNE_FLAGS, "prune"),
}  # fmt: skip


@dataclass
class RunArguments(OptimizerArguments):
    """Flags and changed defaults shared by all trainers of this package.

    Changed defaults: constant learning rate, one row per step, and `bf16=False` without an
    accelerator.

    Raises:
        ConfigError: a value is out of range, or the host refuses it.
        MissingDependencyError: `deepspeed` is set but its package is not installed.
    """

    #: Default of `metric_for_best_model`.
    best_metric: ClassVar[str] = "loss"

    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Learning-rate schedule. Default: constant, no warm-up (the paper's)."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps between two logged rows."})
    eval_temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature of the answers in accuracy evaluations."}
    )
    eval_greedy: bool = field(
        default=True, metadata={"help": "Also evaluate greedy decoding, at one more generation per evaluation."}
    )
    eval_log_spacing: bool = field(
        default=False,
        metadata={
            "help": "Also evaluate at log-spaced steps: every step below 12, every second one below 24, every fourth "
            "one below 48, …. For speed-ups of short runs; eval_steps then sets the largest gap. Needs "
            "--eval_strategy steps."
        },
    )
    eval_seed: int = field(default=1234, metadata={"help": "Seed for sampling evaluation answers."})
    cost_clock: str = field(
        default="wall",
        metadata={
            "help": "Clock of the cost ledger. 'wall': wall-clock seconds. 'cpu': CPU seconds of this process, summed "
            "over its threads, for shared machines without an accelerator. `seconds` in searches.jsonl are always "
            "wall-clock.",
            "choices": list(CLOCKS),
        },
    )
    trajectory: str = field(
        default="none",
        metadata={
            "help": "Steps whose weights are kept in trajectory/ for analysis: 'none', 'powers_of_two' (0, 1, 2, 4, "
            "…) or a number N (0, N, 2N, …). The last two also keep the last step."
        },
    )

    def __post_init__(self) -> None:
        check_values(self)
        check_optimizer_settings(self)
        accelerated = torch.accelerator.is_available() and not getattr(self, "use_cpu", False)
        self._check_precision(accelerated)
        if getattr(self, "bf16", None) is None and not getattr(self, "fp16", False) and not accelerated:
            self.bf16 = False
        if not accelerated:
            self.dataloader_pin_memory = False  # without an accelerator, torch warns about pinning
        if self.cost_clock not in CLOCKS:
            raise ConfigError(f"cost_clock must be one of {', '.join(CLOCKS)}; got {self.cost_clock!r}.")
        if self.cost_clock == "cpu" and accelerated:
            raise ConfigError(
                "cost_clock='cpu' does not count the work of this machine's accelerator. Use 'wall', or use_cpu=True."
            )
        if getattr(self, "deepspeed", None):
            ensure("deepspeed")  # the host imports it in its constructor
        check_saved_steps(self)
        default_metric(self, self.best_metric)
        greater_is_better = getattr(self, "greater_is_better", None)  # as given; the host infers it from the name
        with warnings.catch_warnings():  # TRL itself sets the deprecated name
            warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
            try:
                super().__post_init__()  # type: ignore[misc]  # the host's config comes next in the order of bases
            except EffOPDError:
                raise
            except ValueError as error:
                raise ConfigError(str(error)) from error
        check_log_spacing(self)
        settle_direction(self, greater_is_better)
        if getattr(self, "push_to_hub", False):
            raise ConfigError(
                "push_to_hub=True uploads the whole run directory at every save, with optimizer states and "
                "trajectory. Upload the finished model instead: "
                "hf upload REPO OUTPUT_DIR --exclude 'checkpoints/*' --exclude 'trajectory/*' "
                "--exclude 'superseded/*' --exclude training_args.bin"
            )
        if getattr(self, "auto_find_batch_size", False):
            raise ConfigError(
                "auto_find_batch_size=True restarts at step 0 after an out-of-memory error, with fewer answers per "
                "step and with weights that are already trained. Lower per_device_train_batch_size and raise "
                "gradient_accumulation_steps instead: their product is the number of answers per step."
            )
        if (order := getattr(self, "train_sampling_strategy", "random")) != "random":
            raise ConfigError(
                f"train_sampling_strategy={order!r} has no effect, because TRL orders the prompts itself: expected "
                "'random'. Set --shuffle_dataset false to keep the dataset's order."
            )
        self.trajectory = str(self.trajectory)  # YAML reads a bare 8 as a number
        in_trajectory(self.trajectory, 0, 0)
        if getattr(self, "max_completion_length", None) is None:
            raise ConfigError("--max_completion_length: expected a whole number of at least 1, got none.")

    def _check_precision(self, accelerated: bool) -> None:
        """Check precision flags early; the host checks later, or without naming the flag."""
        on_cpu = "this run is on the CPU" if getattr(self, "use_cpu", False) else "this machine has no accelerator"
        for name in ("fp16", "fp16_full_eval"):
            if getattr(self, name, False) and not accelerated:
                raise ConfigError(
                    f"--{name} true: {on_cpu}, and float16 needs an accelerator. Leave it out, or use --bf16 true."
                )
        for name in ("bf16", "bf16_full_eval"):
            if getattr(self, name, False) and not accelerated and not getattr(self, "use_cpu", False):
                raise ConfigError(
                    f"--{name} true: {on_cpu} that computes in bfloat16. Add --use_cpu true to compute in bfloat16 "
                    f"on the CPU, or leave --{name} out to compute in float32."
                )
        if getattr(self, "label_smoothing_factor", 0.0):
            raise ConfigError(
                "--label_smoothing_factor has no effect on rollouts, which have no labels. Leave it out."
            )


@dataclass
class OPDConfig(
    ServedArguments,
    OfflineArguments,
    MixingArguments,
    ObjectiveArguments,
    ScheduleArguments,
    TeacherArguments,
    RunArguments,
    DistillationConfig,
):
    """Configuration of `OPDTrainer`.

    Raises:
        ConfigError: a value is out of range or contradicts another one.
    """

    output_dir: str = field(default="runs/opd", metadata={"help": "The run directory."})

    eval_on_start: bool | None = field(  # the host takes None as false
        default=None,
        metadata={
            "help": "Also evaluate before the first step. Default: true if the run has evaluations and a look-ahead, "
            "whose first jumps come before the first regular evaluation."
        },
    )
    loss_weighting: str = field(
        default="token",
        metadata={
            "help": "Weighting of the loss. 'token': mean over all tokens, as in TRL. 'answer': mean over answers of "
            "their token means, as in the scripts of arXiv 2605.11739.",
            "choices": list(LOSS_WEIGHTINGS),
        },
    )
    lambda_extrapolation: float = field(
        default=1.0,
        metadata={
            "help": "λ of ExOPD (arXiv 2602.12125), whose target is softmax(λ·teacher + (1−λ)·reference logits). "
            "1: plain OPD. Its authors use 1.25 and report that 1.5 and above are unstable. Other values than 1 need "
            "--reference_model_name_or_path."
        },
    )
    reference_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Frozen reference model of ExOPD: the initial student, or the teacher's base before RL. It is "
            "independent of the look-ahead's anchor."
        },
    )
    reference_model_revision: str | None = field(
        default=None, metadata={"help": "Revision of a reference model on the Hub."}
    )
    rollout_horizon: str = field(
        default="full",
        metadata={
            "help": "Maximum rollout length as a share of max_completion_length (arXiv 2605.31490). 'full': all of "
            "it. 'topd': horizon_fraction. 'esr': horizon_tokens (2605.27028). 'popd': grows from horizon_start to 1 "
            "in horizon_stages equal increments over the first horizon_growth of training. 'prune': grows and shrinks "
            "with the agreement of student and teacher, which also weights the tokens (2605.07804; see prune_…). "
            "Evaluations always use the full length.",
            "choices": list(HORIZONS),
        },
    )
    updates_per_rollouts: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps per batch of rollouts. Above 1, all steps after the first train on rollouts of "
            "earlier weights, which losses on sampled tokens refuse. Searches scored on rollouts wait for new "
            "ones, except the one that finds the learning rate."
        },
    )
    num_mini_batches: int = field(
        default=1,
        metadata={
            "help": "Parts of a batch of rollouts: each optimizer step trains on one, all in turn. "
            "updates_per_rollouts and per_device_train_batch_size are multiples of it. For large batches: with 8 and "
            "updates_per_rollouts 8, a batch of 256 gives 8 steps on 32 rollouts."
        },
    )
    replay_batches: int = field(
        default=0,
        metadata={
            "help": "With updates_per_rollouts above 1, the last step on a batch of rollouts trains on a random one "
            "of the last N batches (dataset aggregation). The teacher's predictions for them are kept in host memory. "
            "0: none."
        },
    )
    horizon_fraction: float = field(default=0.25, metadata={"help": "TOPD: share of max_completion_length."})
    horizon_tokens: int = field(default=100, metadata={"help": "ESR: number of tokens per rollout."})
    horizon_start: float = field(default=0.125, metadata={"help": "POPD: share of max_completion_length at step 0."})
    horizon_stages: int = field(default=8, metadata={"help": "POPD: number of increments."})
    horizon_growth: float = field(
        default=0.5, metadata={"help": "POPD: share of training after which rollouts have full length."}
    )
    horizon_whole_share: float = field(
        default=0.0,
        metadata={
            "help": "TOPD, ESR, POPD: share of a step's answers sampled whole. Their tokens beyond the horizon weigh "
            "1/share, so that the expected gradient is that of whole answers, and searches score them alone. "
            "0: none, as published; what comes after the horizon is then not trained."
        },
    )
    health_tokens: int = field(
        default=256,
        metadata={"help": "Maximum number of tokens per logged step that the health metrics use. 0: no metrics."},
    )

    def __post_init__(self) -> None:
        self.imply_offline()
        super().__post_init__()
        self.check_offline()
        self.check_served()
        if self.loss_weighting not in LOSS_WEIGHTINGS:
            raise ConfigError(
                f"loss_weighting must be one of {', '.join(LOSS_WEIGHTINGS)}; got {self.loss_weighting!r}."
            )
        if self.health_tokens < 0:
            raise ConfigError(f"health_tokens must be >= 0, got {self.health_tokens}.")
        self._check_objective()
        if self.updates_per_rollouts > 1 and self.on_sampled_tokens:
            raise ConfigError(
                f"updates_per_rollouts={self.updates_per_rollouts}: loss_type={self.loss_type!r} is an estimate for "
                "rollouts of the present weights. Use --loss_type full, or --updates_per_rollouts 1."
            )
        self._check_parts()
        self._check_replay()
        self._check_extrapolation()
        self._check_horizon()
        self._check_with_teachers()

    def _check_parts(self) -> None:
        parts, updates, rows = self.num_mini_batches, self.updates_per_rollouts, self.per_device_train_batch_size
        if updates % parts:
            nearest = parts * max(1, round(updates / parts))
            raise ConfigError(
                f"num_mini_batches={parts} with updates_per_rollouts={updates}: every step trains on one part, and "
                f"all parts equally often. Set --updates_per_rollouts to a multiple of {parts}, for example {nearest}."
            )
        if rows % parts:
            raise ConfigError(
                f"num_mini_batches={parts} with per_device_train_batch_size={rows}: the rows of every micro-batch are "
                f"split. Set --per_device_train_batch_size to a multiple of {parts}, for example "
                f"{parts * max(1, round(rows / parts))}."
            )
        if parts > 1 and self.rollout_horizon == "prune":
            raise ConfigError(
                f"num_mini_batches={parts} with rollout_horizon='prune': the length of the next rollouts follows all "
                "answers of a step, and a part has some of them. Use another horizon, or --num_mini_batches 1."
            )
        if parts > 1 and self.horizon_whole_share:
            raise ConfigError(
                f"num_mini_batches={parts} with horizon_whole_share={self.horizon_whole_share}: a part can have no "
                "whole answer to score. Set --horizon_whole_share 0, or --num_mini_batches 1."
            )

    def _check_replay(self) -> None:
        if not self.replay_batches:
            return
        if self.updates_per_rollouts == 1:
            raise ConfigError(
                f"replay_batches={self.replay_batches} with updates_per_rollouts=1: replay takes the last of several "
                "steps per batch of rollouts. Set --updates_per_rollouts 3, or --replay_batches 0."
            )
        if self.curriculum_teachers:
            raise ConfigError(
                f"replay_batches={self.replay_batches} trains on rollouts of earlier stages, which another teacher of "
                "curriculum_teachers graded. Set --replay_batches 0, or use one teacher."
            )
        if self.teachers_in_memory == "one":
            raise ConfigError(
                f"replay_batches={self.replay_batches} keeps predictions of every batch with their teachers' output "
                "layers, and teachers_in_memory='one' loads a new one per batch. Set --replay_batches 0, or "
                "--teachers_in_memory all."
            )

    def _check_with_teachers(self) -> None:
        """Checks whose result depends on the number of teachers."""
        self.check_teachers()
        self.check_mixing()
        self._check_prune()
        self._check_curriculum()

    def check_teachers_given(self, labels: Sequence[str] | None) -> None:
        """Check the settings beside the teacher or teachers that a trainer gets as an argument.

        Args:
            labels: of several teachers. `None`: a single teacher.

        Raises:
            ConfigError: a setting needs a single teacher, or several; or `teachers` has other
                labels.
        """
        named = sorted(self.teacher_sources)
        if named and named != labels:
            raise ConfigError(
                f"teachers names {', '.join(named)}, but teacher_model is "
                f"{'a single teacher' if labels is None else 'for ' + ', '.join(labels)}: expected the same labels. "
                "Leave one of them out."
            )
        if labels is None:
            self.check_single_given()
            return
        told = copy.copy(self)
        told.teachers, told.teacher_model_name_or_path = ["given=model"], None  # the argument takes precedence
        told._check_with_teachers()

    def _check_extrapolation(self) -> None:
        exopd, reference = self.lambda_extrapolation, self.reference_model_name_or_path
        if exopd == 1 and self.reference_model_revision is not None:
            raise ConfigError(
                f"reference_model_revision={self.reference_model_revision!r} has no effect with "
                "lambda_extrapolation=1, which reads no reference. Leave it out."
            )
        if not 0 < exopd < float("inf"):
            raise ConfigError(f"lambda_extrapolation must be above 0 and finite, got {exopd}. 1 is plain OPD.")
        if exopd == 1 and reference is not None:
            raise ConfigError(
                f"reference_model_name_or_path={reference!r} has no effect with lambda_extrapolation=1. Set "
                "--lambda_extrapolation (for example 1.25), or leave the reference out."
            )
        if exopd != 1 and self.beta != 1.0:
            raise ConfigError(
                f"lambda_extrapolation={exopd} is defined for the reverse KL (beta=1), got beta={self.beta}."
            )
        if exopd >= 1.5:
            logger.warning("lambda_extrapolation=%s: its authors found 1.5 and above unstable.", exopd)

    def _check_horizon(self) -> None:
        if self.rollout_horizon not in HORIZONS:
            raise ConfigError(f"rollout_horizon must be one of {', '.join(HORIZONS)}; got {self.rollout_horizon!r}.")
        defaults = {f.name: f.default for f in fields(self)}
        for name, kind in _ONLY_FOR.items():
            if getattr(self, name) != defaults[name] and self.rollout_horizon != kind:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is read only with rollout_horizon={kind!r}, got "
                    f"rollout_horizon={self.rollout_horizon!r}. Leave it out, or set --rollout_horizon {kind}."
                )
        for name in ("horizon_fraction", "horizon_start", "horizon_growth"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share in (0, 1], got {getattr(self, name)}.")
        self._check_whole_share()
        if self.horizon_stages < 1:
            raise ConfigError(f"horizon_stages must be at least 1, got {self.horizon_stages}.")
        limits = {"max_new_tokens", "max_tokens", "max_length"} & set(self.generation_kwargs or {})
        if self.rollout_horizon != "full" and limits:
            raise ConfigError(
                f"generation_kwargs sets {', '.join(sorted(limits))}, which overrides rollout_horizon="
                f"{self.rollout_horizon!r}. Leave it out: max_completion_length sets the full length."
            )

    def _check_whole_share(self) -> None:
        share = self.horizon_whole_share
        if not 0 <= share < 1:
            raise ConfigError(f"horizon_whole_share is a share in [0, 1), got {share}.")
        wrong = {
            "rollout_horizon": (
                self.rollout_horizon not in ("topd", "esr", "popd"), "it is read with topd, esr and popd only"
            ),
            "loss_weighting": (
                self.loss_weighting == "answer", "an answer's mean over its tokens is not known for a cut one"
            ),
            "highest_entropy_share": (self.highest_entropy_share < 1, "it takes a share of each answer's tokens"),
            "loss_type": (self.loss_type == "negative_advantage", "this loss takes no token weights"),
            "lmbda": (self.lmbda < 1, "given answers are not sampled"),
            "teacher_mixed_alpha": (self.teacher_mixed_alpha > 0, "weights are for the student's own tokens"),
        }  # fmt: skip
        for name, (given, why) in wrong.items():
            if share and given:
                raise ConfigError(
                    f"horizon_whole_share={share:g} with {name}={getattr(self, name)!r}: {why}. Change {name}, or "
                    "leave horizon_whole_share out."
                )


def require_config(args: Any, kind: type, trainer: str) -> None:
    """Check that a trainer's `args` are a configuration of this package.

    Raises:
        ConfigError: they are something else, such as the host's own configuration.
    """
    if not isinstance(args, kind):
        raise ConfigError(
            f"{trainer}: expected args to be an {kind.__name__}, got {type(args).__name__}. Build an {kind.__name__} "
            "with the same fields, and pass it as args=…."
        )
