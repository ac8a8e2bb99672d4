"""`Sampling`: settings for sampling answers, for Python, the command line and YAML."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from effopd.errors import ConfigError
from effopd.tasks.config import json_object


@dataclass(frozen=True)
class Sampling:
    """Token distribution softmax(logits / temperature), truncated to the nucleus `top_p`.

    Chat messages are formatted with the tokenizer's chat template and `chat_template_kwargs`.
    `seed=None` continues from the caller's random state.

    Raises:
        ConfigError: a value is out of range, or `n` > 1 with greedy decoding, which gives identical
            answers.
    """

    n: int = field(
        default=1, metadata={"help": "Number of answers per prompt, for avg@n and pass@k with k = 1, 2, 4, … ≤ n."}
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Sampling temperature (≥ 0); 0: greedy. Sampling defaults in the model's generation_config "
            "(repetition penalty, top_k, …) are not used."
        },
    )
    top_p: float = field(default=1.0, metadata={"help": "Probability mass of nucleus sampling, in (0, 1]; 1: off."})
    max_new_tokens: int = field(default=512, metadata={"help": "Length limit per answer, in tokens."})
    batch_size: int = field(default=64, metadata={"help": "Number of answers per generation batch."})
    seed: int | None = field(default=0, metadata={"help": "Seed of the sampling noise."})
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "JSON object with arguments of the tokenizer's chat template, e.g. '{\"enable_thinking\": false}'."
        },
    )

    def __post_init__(self) -> None:
        template = json_object("--chat_template_kwargs", self.chat_template_kwargs, '{"enable_thinking": false}')
        object.__setattr__(self, "chat_template_kwargs", template)
        for name in ("n", "max_new_tokens", "batch_size"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ConfigError(f"--{name} must be at least 1 and below 2^31, got {getattr(self, name)}.")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"--temperature must be >= 0 and --top_p in (0, 1], got {self.temperature} and {self.top_p}."
            )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed must be a whole number from 0 to 2^63 - 1, got {self.seed}.")
        if self.temperature == 0 and self.n > 1:
            raise ConfigError("--n above 1 needs --temperature above 0, because greedy answers are identical.")

    @property
    def template(self) -> dict[str, Any]:
        """Keyword arguments of the chat template."""
        return self.chat_template_kwargs if isinstance(self.chat_template_kwargs, dict) else {}
