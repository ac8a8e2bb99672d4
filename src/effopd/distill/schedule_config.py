"""`ScheduleArguments`: flags of schedules that depend on the data or on the answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from effopd.distill.curriculum import COLUMN, MEASURES, ORDERS
from effopd.distill.teachers.settings import split_revision
from effopd.errors import ConfigError

#: Flags that only rollout_horizon='prune' reads.
PRUNE_FLAGS = (
    "prune_top_k", "prune_threshold", "prune_drop", "prune_base_weight", "prune_normalize", "prune_start_length",
    "prune_min_length", "prune_step", "prune_margin", "prune_hit_share", "prune_patience",
)  # fmt: skip
#: Number of stages without `curriculum_stages` and `curriculum_teachers`.
STAGES = 3


@dataclass
class ScheduleArguments:
    """Flags of Prune-OPD and of curricula (CLPD); mixed into `OPDConfig`."""

    curriculum: str = field(
        default="none",
        metadata={
            "help": "Difficulty by which prompts are divided into stages; the look-ahead takes a new anchor and "
            "schedule in each (CLPD, arXiv 2605.11260). 'prompt_length', 'answer_length': characters of prompt or "
            "reference answer; 'nll': the initial student's −log p(answer) per token; 'column:NAME': a number in "
            "the data."
        },
    )
    curriculum_stages: int | None = field(
        default=None,
        metadata={
            "help": "Number of stages, of equal numbers of prompts and steps. Default: the number of "
            f"curriculum_teachers, or {STAGES} without them."
        },
    )
    curriculum_order: str = field(
        default="easy_first",
        metadata={"help": "Order of the stages; 'shuffled' puts random prompts into each.", "choices": list(ORDERS)},
    )
    curriculum_teachers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Teacher of each stage (a folder, HUB_ID or HUB_ID@REVISION), in order of training, one in memory "
            "at a time; default: teacher_model_name_or_path. Evaluations use teacher_model_name_or_path in all "
            "stages, so that they can be compared."
        },
    )

    prune_top_k: int = field(
        default=16, metadata={"help": "Prune-OPD: size k of the student's and the teacher's sets of likeliest tokens."}
    )
    prune_threshold: float = field(
        default=0.7,
        metadata={"help": "Prune-OPD: share (0–1) of tokens in both sets below which a token is bad."},
    )
    prune_drop: float = field(
        default=0.01, metadata={"help": "Prune-OPD: loss of reliability per bad token; an answer starts with 1."}
    )
    prune_base_weight: float = field(
        default=0.5,
        metadata={"help": "Prune-OPD: w of the token weight reliability + w."},
    )
    prune_normalize: bool = field(
        default=True,
        metadata={
            "help": "Prune-OPD: divide the token weights by 1 + prune_base_weight, so that an answer without bad "
            "tokens has weight 1. false: the paper's weights, which are larger by that factor."
        },
    )
    prune_start_length: int = field(
        default=2048, metadata={"help": "Prune-OPD: maximum rollout length of the first step, in tokens."}
    )
    prune_min_length: int = field(
        default=1024,
        metadata={"help": "Prune-OPD: smallest rollout length, in tokens. The largest is max_completion_length."},
    )
    prune_step: int = field(default=100, metadata={"help": "Prune-OPD: change of the rollout length, in tokens."})
    prune_margin: int = field(
        default=100,
        metadata={
            "help": "Prune-OPD: number of tokens by which the reliable part of an answer can be shorter than the "
            "rollout length and still hit the limit."
        },
    )
    prune_hit_share: float = field(
        default=0.1, metadata={"help": "Prune-OPD: share of answers that must hit the limit for the length to grow."}
    )
    prune_patience: int = field(
        default=3, metadata={"help": "Prune-OPD: steps in a row with too few hits after which the length shrinks."}
    )

    @property
    def stages(self) -> int:
        """Number of stages of the curriculum."""
        return self.curriculum_stages or len(self.curriculum_teachers or ()) or STAGES

    @property
    def stage_teachers(self) -> dict[str, str]:
        """Stage, as "stage 1", …, → its teacher, as `split_revision` reads it; empty without
        `curriculum_teachers`.
        """
        return {f"stage {stage}": name for stage, name in enumerate(self.curriculum_teachers or (), start=1)}

    def _check_curriculum(self) -> None:
        host: Any = self
        named = self.curriculum.startswith(COLUMN) and self.curriculum != COLUMN
        if self.curriculum not in ("none", *MEASURES) and not named:
            raise ConfigError(
                f"curriculum={self.curriculum!r}: expected none, {', '.join(MEASURES)} or {COLUMN}NAME. Use one of "
                "these."
            )
        if self.curriculum_order not in ORDERS:
            raise ConfigError(
                f"curriculum_order={self.curriculum_order!r}: expected one of {', '.join(ORDERS)}. Use one of these."
            )
        if self.curriculum == "none":
            defaults = {"curriculum_stages": None, "curriculum_order": "easy_first", "curriculum_teachers": None}
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} is read only with a curriculum. Leave it out, or set "
                        "--curriculum."
                    )
            return
        teachers = self.curriculum_teachers
        for each in teachers or ():
            split_revision(each, "curriculum_teachers")
        if teachers is not None and len(teachers) != self.stages:
            raise ConfigError(
                f"curriculum_teachers names {len(teachers)} teachers for curriculum_stages={self.stages}: expected "
                "one per stage. Repeat a teacher that serves several stages, or leave --curriculum_stages out."
            )
        other = next((name for name in ("teachers", "teacher_server") if getattr(host, name)), None)
        if teachers is not None and other is not None:
            raise ConfigError(
                f"curriculum_teachers and {other} both name teachers: expected one of them. Leave one out; "
                f"--curriculum itself can be used with --{other}."
            )
        if teachers is not None and getattr(host, "deepspeed", None):
            raise ConfigError(
                "curriculum_teachers replaces the teacher during training, which DeepSpeed's wrapping does not allow. "
                "Use DDP or FSDP2, or one teacher."
            )

    def _check_prune(self) -> None:
        host: Any = self
        if host.rollout_horizon != "prune":
            return
        low, start, high = self.prune_min_length, self.prune_start_length, host.max_completion_length
        if not low <= start <= high or low == high:
            raise ConfigError(
                f"prune_start_length={start}: expected a length from prune_min_length={low} to "
                f"max_completion_length={high}, and the first below the last. The defaults are the paper's, for "
                "answers of up to 12288 tokens. Lower --prune_min_length and --prune_start_length (and --prune_step "
                "and --prune_margin in proportion), or raise --max_completion_length."
            )
        if other := next((name for name in ("teachers", "teacher_server") if getattr(host, name)), None):
            raise ConfigError(
                "rollout_horizon='prune' compares the student's likeliest tokens with those of one teacher in memory, "
                f"but {other} is set. Leave it out, or use another rollout_horizon."
            )
        if host.loss_type == "negative_advantage":
            raise ConfigError(
                "rollout_horizon='prune' compares the student's likeliest tokens with the teacher's, but "
                "loss_type='negative_advantage' has no teacher. Use another loss_type or rollout_horizon."
            )
