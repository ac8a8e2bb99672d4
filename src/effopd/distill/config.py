"""`OPDConfig`: every flag of TRL's `DistillationConfig`, with the paper's defaults, plus what TRL
lacks.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from trl import DistillationConfig

from effopd.common.optional import ensure
from effopd.distill.values import check_values
from effopd.errors import ConfigError
from effopd.runs.best_model import default_metric, settle_direction
from effopd.runs.ledger import CLOCKS
from effopd.runs.run_dir import in_trajectory

logger = logging.getLogger(__name__)

LOSS_WEIGHTINGS = ("token", "answer")
LOSSES = ("full", "sampled")
HORIZONS = ("full", "topd", "popd")
#: Settings of a rollout horizon that only one of them reads.
_ONLY_FOR = {"horizon_fraction": "topd", "horizon_start": "popd", "horizon_stages": "popd", "horizon_growth": "popd"}


@dataclass
class RunArguments:
    """Flags that every trainer of this package adds to its TRL host's, and defaults it changes: a
    constant learning rate, a row a step, `bf16=False` where there is no accelerator.

    Raises:
        ConfigError: a value is out of range.
        MissingDependencyError: `deepspeed` without its package.
    """

    #: What the best model is told by where `metric_for_best_model` is not given.
    best_metric: ClassVar[str] = "loss"

    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Learning-rate schedule; the paper's is constant, without warm-up."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every that many optimizer steps."})
    eval_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the sampled answers of accuracy evaluations."}
    )
    eval_greedy: bool = field(
        default=True, metadata={"help": "Also evaluate greedy decoding (one more generation per evaluation)."}
    )
    eval_seed: int = field(default=1234, metadata={"help": "Seed of the evaluation's sampling noise."})
    cost_clock: str = field(
        default="wall",
        metadata={
            "help": "What the cost ledger's seconds are. 'wall': the clock on the wall. 'cpu': CPU seconds of this "
            "process, all threads together; on a shared machine without accelerator, other jobs do not count. "
            "The `seconds` of searches.jsonl are on the wall in any case.",
            "choices": list(CLOCKS),
        },
    )
    trajectory: str = field(
        default="none",
        metadata={
            "help": "Keep weights for analysis in trajectory/: 'none', 'powers_of_two' (steps 0, 1, 2, 4, …), or a "
            "number N (steps 0, N, 2N, …); the last step is always kept."
        },
    )

    def __post_init__(self) -> None:
        check_values(self)
        accelerated = torch.accelerator.is_available() and not getattr(self, "use_cpu", False)
        self._check_precision(accelerated)
        if getattr(self, "bf16", None) is None and not getattr(self, "fp16", False) and not accelerated:
            self.bf16 = False
        if not accelerated:
            self.dataloader_pin_memory = False  # nothing to pin for; torch would warn
        if self.cost_clock not in CLOCKS:
            raise ConfigError(f"cost_clock must be one of {', '.join(CLOCKS)}; got {self.cost_clock!r}.")
        if self.cost_clock == "cpu" and accelerated:
            raise ConfigError(
                "cost_clock='cpu' does not see the work of the accelerator this machine has. "
                "Use 'wall', or use_cpu=True."
            )
        if getattr(self, "deepspeed", None):
            ensure("deepspeed")  # the host looks for it while it is built
        default_metric(self, self.best_metric)
        greater_is_better = getattr(self, "greater_is_better", None)  # as it was given; the host goes by the name
        with warnings.catch_warnings():  # TRL sets the old name by default; the user need not hear of it
            warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
            super().__post_init__()  # type: ignore[misc]  # the host's config comes next in the order of bases
        settle_direction(self, greater_is_better)
        if getattr(self, "push_to_hub", False):
            raise ConfigError(
                "push_to_hub would upload the whole run directory at every save, optimizer "
                "states and trajectory included "
                "(transformers leaves out folders named checkpoint-N only). Upload the finished model instead: "
                "hf upload REPO OUTPUT_DIR --exclude 'checkpoints/*' 'trajectory/*' 'superseded/*'."
            )
        if getattr(self, "auto_find_batch_size", False):
            raise ConfigError(
                "auto_find_batch_size starts over at step 0 with fewer answers per step "
                "after an out-of-memory error, but with the "
                "weights as they are by then. Lower per_device_train_batch_size and raise "
                "gradient_accumulation_steps instead: "
                "their product is what a step learns from."
            )
        if (order := getattr(self, "train_sampling_strategy", "random")) != "random":
            raise ConfigError(
                f"train_sampling_strategy={order!r} is not read: TRL samples prompts in its own order. Expected "
                "'random'; --shuffle_dataset false takes them as they come."
            )
        self.trajectory = str(self.trajectory)  # YAML reads a bare 8 as a number
        in_trajectory(self.trajectory, 0, 0)
        if getattr(self, "max_completion_length", None) is None:
            raise ConfigError("--max_completion_length: expected a whole number of at least 1, got none.")

    def _check_precision(self, accelerated: bool) -> None:
        """The host says it late, or of `bf16` without naming the flag."""
        on_cpu = "this run is on the CPU" if getattr(self, "use_cpu", False) else "this machine has no accelerator"
        for name in ("fp16", "fp16_full_eval"):
            if getattr(self, name, False) and not accelerated:
                raise ConfigError(f"--{name} true: {on_cpu}, and float16 needs one. Leave it out, or use --bf16 true.")
        for name in ("bf16", "bf16_full_eval"):
            if getattr(self, name, False) and not accelerated and not getattr(self, "use_cpu", False):
                raise ConfigError(
                    f"--{name} true: {on_cpu} that computes in bfloat16. Add --use_cpu true "
                    "to compute in bfloat16 on the "
                    f"CPU, or leave --{name} out to compute in float32."
                )
        if getattr(self, "label_smoothing_factor", 0.0):
            raise ConfigError(
                "--label_smoothing_factor has no effect on rollouts, which have no labels. Leave it out."
            )


@dataclass
class OPDConfig(RunArguments, DistillationConfig):
    """Configuration of `OPDTrainer`.

    Raises:
        ConfigError: a value is out of range or contradicts another one.
    """

    output_dir: str = field(default="runs/opd", metadata={"help": "The run directory."})

    eval_on_start: bool | None = field(  # the host takes None as false
        default=None,
        metadata={
            "help": "Also evaluate before the first step. Default: with a look-ahead whose run "
            "evaluates, because the first "
            "evaluation would come after the first jumps otherwise."
        },
    )
    loss_type: str = field(
        default="full",
        metadata={
            "help": "'full': exact full-vocabulary divergence at every student-visited token (`beta` selects it). "
            "'sampled': the paper's policy-gradient form on the sampled token (always the reverse KL).",
            "choices": list(LOSSES),
        },
    )
    loss_weighting: str = field(
        default="token",
        metadata={
            "help": "'token': every token counts alike, as in TRL. 'answer': every answer does (the "
            "mean over answers of "
            "the mean over their tokens), as in the scripts of arXiv 2605.11739.",
            "choices": list(LOSS_WEIGHTINGS),
        },
    )
    lambda_extrapolation: float = field(
        default=1.0,
        metadata={
            "help": "ExOPD (arXiv 2602.12125): learn softmax(λ·teacher + (1−λ)·reference logits) "
            "instead of the teacher. "
            "1 is plain OPD; 1.25 is its authors' value; 1.5 and above are unstable. Needs "
            "--reference_model_name_or_path."
        },
    )
    reference_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The reference of ExOPD: the student's start, or the teacher's base before RL. "
            "Stays frozen, and is "
            "never the look-ahead's anchor."
        },
    )
    rollout_horizon: str = field(
        default="full",
        metadata={
            "help": "How much of an answer is generated and learned from (arXiv 2605.31490). 'topd': its first "
            "horizon_fraction of max_completion_length; 'popd': from horizon_start to all of it, in horizon_stages "
            "equal steps over the first horizon_growth of training. Evaluations are always full length.",
            "choices": list(HORIZONS),
        },
    )
    horizon_fraction: float = field(default=0.25, metadata={"help": "TOPD: share of max_completion_length."})
    horizon_start: float = field(default=0.125, metadata={"help": "POPD: share of max_completion_length at step 0."})
    horizon_stages: int = field(default=8, metadata={"help": "POPD: number of increments."})
    horizon_growth: float = field(
        default=0.5, metadata={"help": "POPD: share of training after which the length is full."}
    )
    health_tokens: int = field(
        default=256,
        metadata={"help": "Health metrics are computed on at most this many tokens per logged step (0: none)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type not in LOSSES:
            raise ConfigError(f"loss_type must be one of {', '.join(LOSSES)}; got {self.loss_type!r}.")
        if self.loss_weighting not in LOSS_WEIGHTINGS:
            raise ConfigError(
                f"loss_weighting must be one of {', '.join(LOSS_WEIGHTINGS)}; got {self.loss_weighting!r}."
            )
        if self.health_tokens < 0:
            raise ConfigError(f"health_tokens must be >= 0, got {self.health_tokens}.")
        if self.loss_type == "sampled":
            self._check_sampled()
        self._check_extrapolation()
        self._check_horizon()

    def _check_extrapolation(self) -> None:
        exopd, reference = self.lambda_extrapolation, self.reference_model_name_or_path
        if not 0 < exopd < float("inf"):
            raise ConfigError(f"lambda_extrapolation must be above 0 and finite, got {exopd}. 1 is plain OPD.")
        if exopd == 1 and reference is not None:
            raise ConfigError(
                f"reference_model_name_or_path={reference!r} has no effect with lambda_extrapolation=1. Set "
                "--lambda_extrapolation (1.25, say), or leave the reference out."
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
                    f"{name} is read with rollout_horizon={kind!r} only, so here it would be ignored "
                    f"(rollout_horizon={self.rollout_horizon!r})."
                )
        for name in ("horizon_fraction", "horizon_start", "horizon_growth"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share in (0, 1], got {getattr(self, name)}.")
        if self.horizon_stages < 1:
            raise ConfigError(f"horizon_stages must be at least 1, got {self.horizon_stages}.")
        limits = {"max_new_tokens", "max_tokens", "max_length"} & set(self.generation_kwargs or {})
        if self.rollout_horizon != "full" and limits:
            raise ConfigError(
                f"generation_kwargs sets {', '.join(sorted(limits))}, which would override rollout_horizon="
                f"{self.rollout_horizon!r}. Leave it out; max_completion_length is the full length."
            )

    def _check_sampled(self) -> None:
        """The sampled loss is a score-function estimate: it is only right if y was drawn from π_θ
        itself.
        """
        wrong = {
            "beta": self.beta != 1.0,
            "top_p": self.top_p < 1.0,
            "top_k": self.top_k > 0,
            "min_p": bool(self.min_p),
            "repetition_penalty": self.repetition_penalty != 1.0,
            "generation_kwargs": bool(self.generation_kwargs),
        }
        if self.use_vllm and self.vllm_mode == "server" and self.temperature != 1:
            raise ConfigError(
                "loss_type='sampled' weighs vLLM's answers by its log-probabilities, and a vLLM server gives those at "
                f"temperature 1, got temperature={self.temperature}. Use temperature=1, vllm_mode='colocate', or "
                "loss_type='full'."
            )
        names = [name for name, is_wrong in wrong.items() if is_wrong]
        if names:
            raise ConfigError(
                f"loss_type='sampled' needs answers drawn from the student itself, unfiltered, but {', '.join(names)} "
                "change the sampler or the objective. Use "
                "the defaults of these flags, or loss_type='full'."
            )
