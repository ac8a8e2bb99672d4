"""Every decision of the look-ahead search, explicit."""

from __future__ import annotations

from dataclasses import dataclass, field

from effopd.errors import ConfigError
from effopd.extrapolate.live_weights import compile_rule
from effopd.extrapolate.schedule import SCHEDULES

#: Where the paper and the authors' public code differ; `None` in `EffOPDConfig` means "as the variant says".
VARIANTS: dict[str, dict[str, str]] = {
    "paper": {"gate": "ge", "parameters": "attention+mlp"},
    "released-code": {"gate": "gt", "parameters": "released-code"},
}
GATES = ("ge", "gt")
STRATEGIES = ("effopd", "noop")


@dataclass
class EffOPDConfig:
    r"""Settings of EffOPD (arXiv 2605.11739); the defaults are the paper's.

    After optimizer step $t \in \{1, 2, 4, 8, …\}$ the search tries $W + s\,\Delta$ for the scales $s$ in order, where
    $\Delta = W - W_\mathrm{anchor}$ and the anchor is the weights the previous trigger left (at first: the start). A
    candidate whose score passes the gate is accepted and becomes the score to beat; the first failure ends the search.

    Raises:
        ConfigError: a value is out of range; the message names the field, the value and the fix.
    """

    enabled: bool = field(default=False, metadata={"help": "Switch the look-ahead on (`effopd train` only)."})
    variant: str = field(
        default="paper",
        metadata={
            "help": "'paper': accept if score >= best, move attention and MLP matrices. 'released-code': accept only "
            "if score > best, and move what the authors' public code moves (adds post-attention norms, q/k norms).",
            "choices": list(VARIANTS),
        },
    )
    strategy: str = field(
        default="effopd",
        metadata={
            "help": "'effopd': the paper's search. 'noop': the control; pays for the same scoring but its only "
            "candidate is the current weights, so training is bit-identical to a run without look-ahead.",
            "choices": list(STRATEGIES),
        },
    )
    schedule: str = field(
        default="powers_of_two",
        metadata={"help": "At which optimizer steps to search.", "choices": list(SCHEDULES)},
    )
    scales: list[float] = field(
        default_factory=lambda: [2.0, 4.0, 6.0, 8.0, 10.0],
        metadata={"help": "Candidate scales s of W + s·Δ, tried in this order (the paper: 2k for k = 1..5)."},
    )
    gate: str | None = field(
        default=None,
        metadata={
            "help": "'ge' accepts score >= best so far, 'gt' only score > best so far. Default: as the variant says.",
            "choices": list(GATES),
        },
    )
    parameters: str | None = field(
        default=None,
        metadata={
            "help": "Which parameters move: 'attention+mlp', 'all', 'released-code', or a regular expression "
            "searched in parameter names. Default: as the variant says."
        },
    )
    validation_size: int = field(
        default=50, metadata={"help": "Size of D_v: how many training prompts each candidate answers."}
    )
    validation_batch_size: int = field(
        default=64, metadata={"help": "How many of the D_v prompts are generated at once."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature of the validation answers (0 = greedy)."}
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={"help": "Token limit of the validation answers. Default: the trainer's max_completion_length."},
    )
    seed: int = field(
        default=0, metadata={"help": "Draws D_v and seeds the sampling noise that all candidates of a search share."}
    )
    anchor_device: str | None = field(
        default=None, metadata={"help": "Where the fp32 anchor lives, e.g. 'cpu'. Default: with the parameters."}
    )

    def __post_init__(self) -> None:
        self._check_choice("variant", VARIANTS)
        self._check_choice("strategy", STRATEGIES)
        self._check_choice("schedule", SCHEDULES)
        if self.gate is not None:
            self._check_choice("gate", GATES)
        if not self.scales or any(not 0 < scale < float("inf") for scale in self.scales):
            raise ConfigError(
                f"EffOPDConfig.scales must be a non-empty list of positive finite numbers, got {self.scales}. "
                "The paper's are [2, 4, 6, 8, 10]."
            )
        if self.validation_size < 1 or self.validation_batch_size < 1:
            raise ConfigError(
                "EffOPDConfig.validation_size and validation_batch_size must be at least 1, got "
                f"{self.validation_size} and {self.validation_batch_size}. The paper's D_v has 50 prompts."
            )
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"EffOPDConfig.temperature must be >= 0, got {self.temperature}.")
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ConfigError(
                f"EffOPDConfig.max_completion_length must be at least 1 or unset, got {self.max_completion_length}."
            )
        compile_rule(self.resolved_parameters)

    def _check_choice(self, name: str, allowed) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigError(f"EffOPDConfig.{name} must be one of {', '.join(allowed)}; got {value!r}.")

    @property
    def resolved_gate(self) -> str:
        """`gate`, or the variant's."""
        return self.gate or VARIANTS[self.variant]["gate"]

    @property
    def resolved_parameters(self) -> str:
        """`parameters`, or the variant's."""
        return self.parameters or VARIANTS[self.variant]["parameters"]

    @property
    def resolved_scales(self) -> tuple[float, ...]:
        """`scales`, or the single scale 0 of the no-op control."""
        return (0.0,) if self.strategy == "noop" else tuple(self.scales)
