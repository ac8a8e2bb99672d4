"""`OPDConfig`: every flag of TRL's `DistillationConfig`, with the paper's defaults, plus what TRL lacks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl import DistillationConfig

from effopd.distill.ledger import CLOCKS
from effopd.distill.run_dir import in_trajectory
from effopd.errors import ConfigError

LOSSES = ("full", "sampled")


@dataclass
class RunArguments:
    """Flags that every trainer of this package adds to its TRL host's, and defaults it changes: a constant learning
    rate, a row a step, `bf16=False` where there is no accelerator.

    Raises:
        ConfigError: a value is out of range.
    """

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
            "process, all threads together; on a shared machine without accelerator, other jobs do not count.",
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
        if (
            getattr(self, "bf16", None) is None
            and not getattr(self, "fp16", False)
            and not torch.accelerator.is_available()
        ):
            self.bf16 = False
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # nothing to pin for; torch would warn
        super().__post_init__()  # type: ignore[misc]  # the host's config comes next in the order of bases
        if self.cost_clock not in CLOCKS:
            raise ConfigError(f"cost_clock must be one of {', '.join(CLOCKS)}; got {self.cost_clock!r}.")
        if self.cost_clock == "cpu" and torch.accelerator.is_available():
            raise ConfigError(
                "cost_clock='cpu' does not see the work of the accelerator this machine has. Use 'wall'."
            )
        self.trajectory = str(self.trajectory)  # YAML reads a bare 8 as a number
        in_trajectory(self.trajectory, 0, 0)
        length = getattr(self, "max_completion_length", None)
        if length is None or length < 1:
            raise ConfigError(f"max_completion_length must be at least 1, got {length}.")


@dataclass
class OPDConfig(RunArguments, DistillationConfig):
    """Configuration of `OPDTrainer`.

    Raises:
        ConfigError: a value is out of range or contradicts another one.
    """

    output_dir: str = field(default="runs/opd", metadata={"help": "The run directory."})

    loss_type: str = field(
        default="full",
        metadata={
            "help": "'full': exact full-vocabulary divergence at every student-visited token (`beta` selects it). "
            "'sampled': the paper's policy-gradient form on the sampled token (always the reverse KL).",
            "choices": list(LOSSES),
        },
    )
    health_tokens: int = field(
        default=256,
        metadata={"help": "Health metrics are computed on at most this many tokens per logged step (0: none)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type not in LOSSES:
            raise ConfigError(f"loss_type must be one of {', '.join(LOSSES)}; got {self.loss_type!r}.")
        if self.health_tokens < 0:
            raise ConfigError(f"health_tokens must be >= 0, got {self.health_tokens}.")
        if self.loss_type == "sampled":
            self._check_sampled()

    def _check_sampled(self) -> None:
        """The sampled loss is a score-function estimate: it is only right if y was drawn from π_θ itself."""
        wrong = {
            "beta": self.beta != 1.0,
            "top_p": self.top_p < 1.0,
            "top_k": self.top_k > 0,
            "min_p": bool(self.min_p),
            "repetition_penalty": self.repetition_penalty != 1.0,
            "generation_kwargs": bool(self.generation_kwargs),
            "use_vllm": self.use_vllm,
        }
        names = [name for name, is_wrong in wrong.items() if is_wrong]
        if names:
            raise ConfigError(
                f"loss_type='sampled' needs answers drawn from the student itself, unfiltered, but {', '.join(names)} "
                "change the sampler or the objective (vLLM would need its log-probs for the importance weight). Use "
                "the defaults of these flags, or loss_type='full'."
            )
