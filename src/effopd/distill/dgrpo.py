"""dGRPO: GRPO on verified answers, minus β times the exact reverse KL to a teacher.

    loss = GRPO(A_i = (r_i − mean r) / std r) + β_k · KL(π_θ ‖ π*)

Source: arXiv 2605.12227. The teacher takes the place of GRPO's reference model. The KL is exact
over the vocabulary at every token of the student's answers, and is averaged like the GRPO loss. It
reuses the hidden states of the policy's own forward pass. Left out: sharded students (FSDP2,
DeepSpeed ZeRO-3) and students with layers between backbone and output layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effopd.distill.divergence import Head, shared_vocab_size
from effopd.distill.evaluate_student import evaluate_trainer
from effopd.distill.rl import TaskGRPOTrainer
from effopd.distill.rl_config import TaskDGRPOConfig
from effopd.distill.scoring import token_batch
from effopd.distill.teachers.manifest import ONLY, ManifestCallback, entry_of
from effopd.distill.trl_host.kernels import divergence_kernel
from effopd.distill.trl_host.models import frozen, inside_forward
from effopd.distill.trl_host.state import log_metrics
from effopd.errors import CompatibilityError, ConfigError
from effopd.models.checks import check_models
from effopd.models.logit_path import completion_hidden_states, core_of, is_whole, logit_path
from effopd.tasks.base import Task
from effopd.tasks.generate import tokens_beyond


def teacher_weight(step: int, beta: float, decay: float = 0.0, smallest: float = 0.0) -> float:
    """β_k = max(smallest, β − decay · k) after k optimizer steps, never above β.

    Example:
        >>> [round(teacher_weight(k, 5e-3, 5e-5, 1e-3), 6) for k in (0, 20, 80, 200)]
        [0.005, 0.004, 0.001, 0.001]
    """
    return min(beta, max(smallest, beta - decay * step))


def averaged(
    kind: str, value_BT: Tensor, mask_BT: Tensor, *, longest: int, parts: float, items: Tensor | float
) -> Tensor:
    """Mean of per-token values [B, T] of a micro-batch, normalized like TRL's GRPO loss `kind`.

    Args:
        kind: TRL's `loss_type`.
        longest: `max_completion_length`, the divisor of `dr_grpo`.
        parts: micro-batches per optimizer step.
        items: tokens of the optimizer step per process, the divisor of `dapo`, `cispo` and `vespo`.
    """
    sums_B, lengths_B = (value_BT * mask_BT).sum(-1), mask_BT.sum(-1)
    if kind in ("grpo", "sapo"):
        return (sums_B / lengths_B.clamp(min=1)).mean() / parts
    if kind == "bnpo":
        return sums_B.sum() / lengths_B.sum().clamp(min=1) / parts
    if kind == "dr_grpo":
        return sums_B.sum() / (len(sums_B) * longest) / parts
    if kind == "luspo":
        return sums_B.mean() / parts
    return sums_B.sum() / items


class TaskDGRPOTrainer(TaskGRPOTrainer):
    """`TaskGRPOTrainer` with an exact KL to a teacher, weighted by `args.beta`.

    Accepts the arguments of `TaskGRPOTrainer`, and:

    Args:
        args: a `TaskDGRPOConfig`.
        teacher_model: path or model with the student's tokenizer; default: the model that `args`
            names. Evaluations also report `eval_kl` to it.

    Raises:
        CompatibilityError: the student lacks tokens of the teacher or has more, is sharded, or has
            layers between backbone and output layer.
        ConfigError: no teacher.
    """

    card_tags: ClassVar = ["trl", "effopd", "dgrpo", "on-policy-distillation"]

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: TaskDGRPOConfig,
        train_task: Task,
        eval_task: Task | None = None,
        *,
        teacher_model: str | PreTrainedModel | None = None,
        **kwargs: Any,
    ):
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        if teacher_model is None or (teacher_model is model and isinstance(model, PreTrainedModel)):
            raise ConfigError(
                "dGRPO needs a teacher other than the student object. Set --teacher_model_name_or_path, or pass "
                "teacher_model."
            )
        beta, args.beta = args.beta, 0.0  # the host would load the initial model as its reference
        try:
            super().__init__(model, args, train_task, eval_task, **kwargs)
        finally:
            args.beta = beta
        load: dict[str, Any] = {"dtype": "auto"} | dict(self.args.teacher_model_init_kwargs or {})
        self.teacher_model = frozen(self, teacher_model, load)
        student, teacher = map(self.accelerator.unwrap_model, (self.model, self.teacher_model))
        self.vocab_size = shared_vocab_size(student, teacher, len(self.text_tokenizer))
        check_models(student, {"teacher": self.teacher_model}, generates=not self.use_vllm)
        self._check_student(student)
        revision = load.get("revision")
        self.add_callback(
            ManifestCallback(self.run_dir.root, lambda: [entry_of(ONLY, teacher_model, teacher, revision)])
        )

    def _check_student(self, student: Any) -> None:
        if extra := tokens_beyond(student, self.vocab_size):
            raise CompatibilityError(
                f"the student has {len(extra)} vocabulary rows (from id {extra[0]}) that the teacher lacks: expected "
                f"none. Cut the student's embedding to {self.vocab_size} rows (resize_token_embeddings)."
            )
        if not is_whole(student) or logit_path(student).inner:
            what = "is sharded" if not is_whole(student) else "has layers between backbone and output layer"
            raise CompatibilityError(
                f"the student {what}, which dGRPO does not support: it reads the hidden states of the policy's "
                "forward pass. Train without sharding, with another model, or with `effopd train`."
            )

    def around_policy_loss(self, inputs, compute):
        if not self.model.training:
            return super().around_policy_loss(inputs, compute)
        with last_hidden_states(self.accelerator.unwrap_model(self.model)) as seen:
            loss = super().around_policy_loss(inputs, compute)
        kl_BT, mask_BT = self._teacher_kl(seen[-1], inputs), token_batch(inputs).scored_BT
        beta = teacher_weight(self.state.global_step, self.args.beta, self.args.beta_decay, self.args.beta_min)
        total = self.accelerator.gather(torch.stack([(kl_BT.detach() * mask_BT).sum(), mask_BT.sum()])[None]).sum(0)
        log_metrics(self, {"kl": float(total[0] / total[1].clamp(min=1))})
        parts = self.current_gradient_accumulation_steps
        items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        mean = averaged(
            self.args.loss_type, kl_BT, mask_BT, longest=self.max_completion_length, parts=parts,
            items=items * parts / self.args.steps_per_generation,
        )  # fmt: skip
        return loss + beta * mean

    def _teacher_kl(self, hidden_BLH: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """KL(π_θ ‖ π*) [B, T] in nats at the answer tokens, 0 elsewhere; differentiable in π_θ."""
        batch = token_batch(inputs)
        valid_BT, keep = batch.scored_BT, batch.scored_BT.shape[1]
        self.teacher_model.eval()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with self.ledger.track("teacher"), torch.no_grad(), self.accelerator.autocast():
            h_teacher_BTH = inside_forward(
                self.teacher_model, teacher, completion_hidden_states, teacher, batch.ids_BL, batch.mask_BL, keep
            )
        self.ledger.count("teacher", forward=batch.tokens)
        student = Head.of(self.accelerator.unwrap_model(self.model), self.vocab_size)
        h_student_NH = hidden_BLH[:, :-1][:, -keep:][valid_BT]
        with self.accelerator.autocast():
            kl_N, _ = divergence_kernel(
                h_student_NH, student, h_teacher_BTH[valid_BT].to(h_student_NH.device),
                Head.of(teacher, self.vocab_size).whole(), 1.0, self.temperature,
            )  # fmt: skip
        return torch.zeros(valid_BT.shape, device=kl_N.device, dtype=kl_N.dtype).masked_scatter(valid_BT, kl_N)

    def _measure_task(self, task: Task) -> tuple[dict[str, float], int]:
        return evaluate_trainer(self, task, self.teacher_model)


@contextmanager
def last_hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """In this block, the list grows by the backbone's last hidden states [B, L, H] per forward."""
    seen: list[Tensor] = []
    backbone: Any = core_of(model).base_model
    handle = backbone.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()
