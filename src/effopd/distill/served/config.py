"""Settings of a teacher behind a server, and those without effect or not exact there."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from effopd.distill.served.client import server_url
from effopd.distill.teachers.settings import LOCAL_ONLY
from effopd.errors import ConfigError

#: Settings that need the teacher's weights or all of its logits → reason.
_UNREAD = {
    "teacher_model_name_or_path": "the server has chosen its model",
    **dict.fromkeys((*LOCAL_ONLY, "teacher_model_init_kwargs", "teacher_model_revision"), "no teacher is loaded"),
    "teachers": "a server has one teacher",
    "rollouts": "stored rollouts need no teacher",
    "reference_model_name_or_path": "ExOPD needs the teacher's logits over the whole vocabulary",
    "lambda_extrapolation": "ExOPD needs the teacher's logits over the whole vocabulary",
    "baseline": "a baseline needs the teacher's logits over the whole vocabulary",
    "samples_per_prefix": "the server scores the answer's own tokens only",
    "teacher_mixed_alpha": "the teacher's probabilities of every next token are needed while an answer is sampled",
    "temperature": "vLLM returns log-probabilities of a prompt at temperature 1",
}


@dataclass
class ServedArguments:
    """Flags of a teacher behind a server; part of `OPDConfig`."""

    teacher_server: str | None = field(
        default=None,
        metadata={
            "help": "URL of an OpenAI-compatible vLLM server with the teacher, in place of "
            "--teacher_model_name_or_path: vllm serve TEACHER --max-logprobs K. The loss is exact on the "
            "teacher_top_k tokens that it returns per position, and has one outcome for the rest."
        },
    )
    teacher_server_timeout: float = field(
        default=120.0, metadata={"help": "With teacher_server: seconds without data before a request is repeated."}
    )
    teacher_server_retries: int = field(
        default=5,
        metadata={
            "help": "With teacher_server: attempts after the first one, after waits of 0.5, 1, 2, … seconds. Then the "
            "run ends with an error and can be resumed."
        },
    )
    teacher_server_concurrency: int = field(
        default=8, metadata={"help": "With teacher_server: number of concurrent requests per process."}
    )

    @property
    def served(self) -> bool:
        """Whether the teacher is behind a server."""
        return self.teacher_server is not None

    def check_served(self) -> None:
        """Check the settings of this class; `effopd.distill.values` checks their ranges.

        Raises:
            ConfigError: a setting is not read, or needs more than a server returns.
        """
        defaults: dict[str, Any] = {f.name: f.default for f in fields(self)}  # of the whole config
        if not self.served:
            for name in ("teacher_server_timeout", "teacher_server_retries", "teacher_server_concurrency"):
                if getattr(self, name) != defaults[name]:
                    raise ConfigError(
                        f"{name}={getattr(self, name)} is read only with a served teacher. Leave it out, or set "
                        "--teacher_server."
                    )
            return
        self.teacher_server = server_url(str(self.teacher_server))
        for name, why in _UNREAD.items():
            value = getattr(self, name, None)
            if name in defaults and value not in (defaults[name], None):
                other = "leave out --teacher_server"
                if not name.startswith("teacher_model"):
                    other = "load the teacher with --teacher_model_name_or_path"
                raise ConfigError(
                    f"{name}={value!r} is not supported with --teacher_server: {why}. Leave out --{name}, or {other}."
                )
