"""`teacher_kl`: how good a candidate is, without answers and without generating anything.

Training has just sampled this step's rollouts from W and has not learned from them yet, so they are held out from the
displacement that is being judged, and exactly on-policy for W. A candidate is scored by the divergence from the teacher
that is trained, exact over the vocabulary (the trainer's `beta`: 1, the default, is the reverse KL), on them: one student
forward of a few rollouts; the teacher's hidden states are computed once a search. For a candidate the rollouts are
slightly off-policy: its divergence is that at the positions W visits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import DistillationTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from effopd.common.distributed import all_gather_or_raise, rank, world_size
from effopd.common.float64 import for_float64
from effopd.distill.divergence import MULTIMODAL_KEYS, Head, gathered, shared_vocab_size
from effopd.distill.trl_host import Patches
from effopd.errors import CompatibilityError, ConfigError
from effopd.extrapolate.search import Score
from effopd.models.checks import check_models
from effopd.models.logit_path import completion_hidden_states, core_of, is_whole, logit_path

logger = logging.getLogger(__name__)

#: Of a share of a step's rollouts no fewer and no more than these are scored.
FEWEST, MOST = 8, 32

_NAMES = ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask", "tool_mask")


def rollouts_a_step(args: Any) -> int:
    """Rollouts that all processes together sample for an optimizer step."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def wanted_rollouts(args: Any, rollouts: float) -> int:
    """How many rollouts a search would like to score, over all processes; a step may have fewer, and then all are scored.

    Args:
        args: an `OPDConfig` or `trl.DistillationConfig`.
        rollouts: `EffOPDConfig.score_rollouts`; below 1: this share of the step's, at least 8 and at most 32. A quarter, the
            default, makes a search of some eight scores cost less than the step it belongs to.
    """
    return int(rollouts) if rollouts >= 1 else min(max(int(rollouts_a_step(args) * rollouts), FEWEST), MOST)


def check_rollouts(args: Any, rollouts: float) -> None:
    """A run's settings let `teacher_kl` score; no model is needed to tell.

    Args:
        args: an `OPDConfig` or `trl.DistillationConfig`.
        rollouts: how many are to be scored, over all processes; below 1: as `wanted_rollouts` says.

    Raises:
        ConfigError: fewer than two rollouts a step, or another target than the teacher (ExOPD).
    """
    if getattr(args, "lambda_extrapolation", 1) != 1:
        raise ConfigError(
            f"the look-ahead's scorer 'teacher_kl' measures the divergence from the teacher, but lambda_extrapolation="
            f"{args.lambda_extrapolation} trains towards another target. Score by answers, as "
            "strategy 'effopd' does (--effopd.validation_size), or use lambda_extrapolation=1."
        )
    scored = min(rollouts_a_step(args), wanted_rollouts(args, rollouts))
    if scored < 2:
        raise ConfigError(
            "the scorer 'teacher_kl' tells a gain from noise by comparing rollouts, so it needs at least 2 a step; this run, on "
            f"{args.world_size} process(es), samples {rollouts_a_step(args)} and scores {scored}. Raise "
            "--per_device_train_batch_size, --gradient_accumulation_steps or --effopd.score_rollouts."
        )


def _check_host(trainer: Any, models: Mapping[str, Any]) -> None:
    """TRL's own loss reads a soft cap under one name only, and the backbone's hidden states whatever follows them."""
    if type(trainer)._get_last_hidden_state is not DistillationTrainer._get_last_hidden_state or not all(
        map(is_whole, models.values())
    ):
        return
    for role, model in models.items():
        path, config = logit_path(model), core_of(model).config.get_text_config()
        layers = path.inner and getattr(config, "logits_scaling", None) is None
        if layers or path.softcap != getattr(config, "final_logit_softcapping", None):
            what = "layers between backbone and output layer" if layers else f"a soft cap of {path.softcap:g}"
            raise CompatibilityError(
                f"the {role}, {type(core_of(model)).__name__}, has {what}, which the loss of {type(trainer).__name__} leaves out: it "
                "would train towards another distribution than is scored. Use OPDTrainer, which has it."
            )


class RolloutScorer:
    """−D(π_W+sD, π*), nats per token, on the first rollouts of the present step.

    D is what the trainer minimises: the reverse KL(π ‖ π*) at its default β = 1, the forward KL(π* ‖ π) at β = 0, between
    them (1−β) KL(π ‖ m) + β KL(π* ‖ m) with m = (1−β) π + β π*.

    Several processes score a share each of their own rollouts; all of them get the whole score.

    Args:
        trainer: an `OPDTrainer`, or any `trl.DistillationTrainer`; the scorer uses its forward and its teacher.
        rollouts: how many rollouts are scored, over all processes; below 1: as `wanted_rollouts` says.

    Attributes:
        looked_at: the global step at which `watch` last looked.
        reads: settings of `EffOPDConfig` that this scorer is built from.

    Raises:
        ConfigError: fewer than two rollouts a step; the trainer does not distil, has no teacher of its own, or learns another target than the teacher (ExOPD).
        CompatibilityError: a model has fewer vocabulary rows than the tokenizer has tokens, or logits whose divergence cannot be
            computed, here or in the loss of the host.
    """

    reads = ("score_rollouts",)

    def __init__(self, trainer: Any, rollouts: float = 0.25):
        if not isinstance(trainer, DistillationTrainer) or trainer.teacher_model is None:
            raise ConfigError(
                f"the scorer 'teacher_kl' measures the divergence from the teacher on fresh rollouts: expected an OPDTrainer or a "
                f"trl.DistillationTrainer with a teacher model, got {type(trainer).__name__}. Use one of them, or pass scorer=…."
            )
        check_rollouts(trainer.args, rollouts)
        sampled, wanted, processes = (
            rollouts_a_step(trainer.args),
            wanted_rollouts(trainer.args, rollouts),
            world_size(),
        )
        if sampled < wanted and rank() == 0:
            logger.warning(
                "The look-ahead's scorer 'teacher_kl' would like %d rollouts a step (--effopd.score_rollouts) but a step samples %d "
                "(--per_device_train_batch_size %d × --gradient_accumulation_steps %d × %d process(es)): it scores all of them, so "
                "its decisions are noisier. Raise one of the two, or lower --effopd.score_rollouts.",
                wanted, sampled, trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps, processes,
            )  # fmt: skip
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        student, teacher = map(trainer.accelerator.unwrap_model, (trainer.model, trainer.teacher_model))
        self._vocab_size = shared_vocab_size(student, teacher, len(tokenizer))
        check_models(student, {"teacher": teacher}, generates=False)
        _check_host(trainer, {"student": student, "teacher": teacher})
        self._trainer, self._rollouts = trainer, -(-wanted // processes)
        self._batches: list[dict[str, Tensor]] = []
        self._teacher: list[Tensor] | None = None
        self.looked_at = -1

    def watch(self, patches: Patches, look: Callable[[], object], wanted: Callable[[], bool]) -> None:
        """Have `look` called once a step, when the step's rollouts are there and none of them has been trained on.

        The host has no event for that, so its `_prepare_inputs` is wrapped. If `look` throws the rollouts away, because they are
        those of other weights now, they are sampled anew.

        Args:
            patches: of the trainer; undoing them ends the watch.
            look: what to call.
            wanted: asked first; while it says no, nothing is called.
        """
        trainer, self.looked_at = self._trainer, -1
        self.drop()

        def around(prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def prepared(generation_batch: Any) -> Any:
                inputs = prepare(generation_batch)
                if trainer.model.training and trainer.state.global_step != self.looked_at and wanted():
                    self.looked_at = trainer.state.global_step
                    self.take(trainer._buffered_inputs)
                    try:
                        look()
                    finally:
                        self.drop()
                    if trainer._buffered_inputs is None:
                        inputs = prepare(generation_batch)
                return inputs

            return prepared

        patches.replace("_prepare_inputs", around)

    def take(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """The rollouts of a new step: the trainer's micro-batches, before any of them is trained on. They are scored in
        pieces of that size, so beside a forward of a micro-batch a search holds no more than the teacher's last hidden states."""
        self._batches, self._teacher, left = [], None, self._rollouts
        for batch in batches:
            if seen := [key for key in MULTIMODAL_KEYS if batch.get(key) is not None]:
                raise ConfigError(
                    f"the scorer 'teacher_kl' reads text only, but the rollouts come with {', '.join(seen)}: without them the "
                    "score would be that of other prompts. Score by answers (--effopd.validation_size), as strategy 'effopd' does."
                )
            rows = {name: value[:left] for name, value in batch.items() if name in _NAMES}
            left -= len(rows["completion_ids"])
            valid = rows["completion_mask"] * rows["tool_mask"] if "tool_mask" in rows else rows["completion_mask"]
            self._batches.append(
                {
                    "ids": torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1),
                    "attention": torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1),
                    "valid": valid.bool(),  # what tools wrote is read, but not scored
                }
            )
            if left <= 0:
                break

    def drop(self) -> None:
        """Let go of them."""
        self._batches, self._teacher = [], None

    def __call__(self, model: Any) -> Score:
        assert self._batches, "the trainer hands out rollouts before it searches"
        start, forwards = time.perf_counter(), 2 if self._teacher is None else 1
        parts = all_gather_or_raise(lambda: self._part(model))
        sums, lengths = [value for part in parts for value in part[0]], [n for part in parts for n in part[1]]
        tokens = sum(part[2] for part in parts)
        mean_length = max(1, sum(lengths)) / len(lengths)
        return Score(
            mean=-sum(sums) / max(1, sum(lengths)),
            per_example=tuple(
                -value / mean_length for value in sums
            ),  # their mean is `mean`, so that paired tests are about it
            seconds=time.perf_counter() - start,
            forward_tokens=forwards * tokens,
        )

    def _part(self, model: Any) -> tuple[list[float], list[int], int]:
        """This rank's rollouts: the summed divergence and the number of scored tokens of each, and the tokens of a forward."""
        trainer = self._trainer
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        with trainer.accelerator.autocast(), torch.no_grad():
            if self._teacher is None:
                self._teacher = [self._hidden(teacher, batch) for batch in self._batches]
            pieces = gathered(model, lambda: self._divergence(model, teacher))
        lengths = [batch["valid"].sum(1).tolist() for batch in self._batches]
        sums = [
            float(value_T.sum())
            for piece, rows in zip(pieces, lengths, strict=True)
            for value_T in for_float64(piece).double().split(rows)
        ]
        return (
            sums,
            [n for rows in lengths for n in rows],
            sum(int(batch["attention"].sum()) for batch in self._batches),
        )

    def _divergence(self, model: Any, teacher: Any) -> list[Tensor]:
        """D(student, teacher) [N], in nats, at the N scored positions of each piece."""
        assert self._teacher is not None
        pieces = []
        for batch, other_NH in zip(self._batches, self._teacher, strict=True):
            own_NH = self._hidden(model, batch)
            # after the forward: before it, the head of a sharded student is not whole yet
            student, target = (Head.of(m, self._vocab_size) for m in (model, teacher))
            value_N, _ = ChunkedDivergenceFunction.apply(
                own_NH, student.weight, student.bias, other_NH.to(own_NH.device), target.weight, target.bias,
                self._trainer.beta, self._trainer.temperature, student.scale, student.softcap, target.scale, target.softcap,
            )  # fmt: skip
            pieces.append(value_N)
        return pieces

    def _hidden(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Last hidden states [N, H] at the scored positions of a piece, rollout by rollout."""
        hidden = completion_hidden_states(model, batch["ids"], batch["attention"], batch["valid"].shape[1])
        return hidden[batch["valid"].to(hidden.device)]
