"""`ServedOPDTrainer`: on-policy distillation with the teacher behind a server, none in memory.

    sample → ask the server for the teacher's top k → loss on k + 1 outcomes → optimizer step

Left out: what needs the teacher's weights or all of its logits (ExOPD, baselines of the sampled
loss, several samples per prefix, images, temperatures other than 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from effopd.common.distributed import raise_on_all_ranks
from effopd.distill.config import OPDConfig, require_config
from effopd.distill.divergence import Answers, Head, Predictions, interior_factor, token_logprobs, weighted_mean
from effopd.distill.evaluate_student import evaluate_trainer
from effopd.distill.policy_gradient import importance
from effopd.distill.served.checks import open_teacher
from effopd.distill.served.measure import ServedHealthProbe
from effopd.distill.served.scoring import ServedDivergence
from effopd.distill.served.support import Support, divergence, outcomes, renormalized, tail_of
from effopd.distill.served.teacher import ServedTeacher
from effopd.distill.teachers.manifest import ONLY, TeacherEntry, planned_entries
from effopd.distill.teachers.several import Part
from effopd.distill.top_k import highest_entropy
from effopd.distill.trainer import OPDTrainer
from effopd.distill.trl_host.state import log_metrics
from effopd.errors import ConfigError
from effopd.models.token_batch import TokenBatch
from effopd.tasks.base import Task


class ServedOPDTrainer(OPDTrainer):
    """`OPDTrainer` whose teacher is behind `args.teacher_server`.

    `loss_type` 'full' is the divergence of the k + 1 outcomes (`effopd.distill.served.support`), a
    lower bound of the divergence over the vocabulary and equal to it for k = V. 'teacher_top_k' and
    'sampled' are exact, because they read only what the server returns. A micro-batch is asked for
    when its loss is computed; nothing of the server is part of a checkpoint.

    Logs per step: `served/tail_mass`, `served/student_tail_mass`, `served/tail_kl`,
    `served/received_bytes` and `served/retries`.

    Args:
        model: the student, as a path or a model.
        args: an `OPDConfig` with `teacher_server`.
        served: the teacher, if its server has been checked already.

    Attributes:
        served: the teacher.
        teacher_name: its name at the server.

    Raises:
        ConfigError: `args` has no `teacher_server`, or the server's sequences are too short.
        CompatibilityError: the server's tokenizer or vocabulary differs from the student's.
        TeacherServerError: the server gave no usable reply.
    """

    card_tags: ClassVar = ["trl", "effopd", "on-policy-distillation"]

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: OPDConfig,
        *positional: Any,
        served: ServedTeacher | None = None,
        **kwargs: Any,
    ):
        require_config(args, OPDConfig, type(self).__name__)
        if not args.served:
            raise ConfigError("ServedOPDTrainer needs OPDConfig(teacher_server=URL); OPDTrainer loads a teacher.")
        self._given = served
        super().__init__(model, None, args, *positional, **kwargs)

    def _named_teachers(self, teacher: Any, student: Any, args: OPDConfig) -> Any:
        return None

    def _open_teachers(self, source: Any, train_dataset: Any, eval_task: Task | None) -> int:
        rows = self.accelerator.unwrap_model(self.model).config.get_text_config().vocab_size
        self.teacher_model = None
        self.served = self._given if self._given is not None else open_teacher(self.args, self.text_tokenizer, rows)
        self.teacher_name = self.served.model
        self._seen = (self.served.client.received_bytes, self.served.client.retried)
        self.health = ServedHealthProbe(self.args.health_tokens, self.temperature)
        return self.served.vocab_size

    def _teacher_entries(self, source: Any) -> list[TeacherEntry]:
        return planned_entries({ONLY: self.served.model}, "auto", None)

    # -- loss --------------------------------------------------------------------------------------

    def _teacher_parts(self, batch: TokenBatch, multimodal: Mapping[str, Any]) -> list[Part]:
        if present := [name for name, value in multimodal.items() if value is not None]:
            raise ConfigError(
                f"--teacher_server scores text only, but the rollouts have {', '.join(present)}. Load the teacher "
                "with --teacher_model_name_or_path."
            )
        category = "teacher" if self.model.training else "eval"
        with self.ledger.track(category):
            support = raise_on_all_ranks(lambda: self.served.support(batch))
        self.ledger.count(category, forward=batch.tokens)
        return [Part(ONLY, None, support)]

    def _objective(self, student: Predictions, teacher: Any, reference: Any, answers: Answers, num_items: Any) -> Any:
        args, training = self.args, self.model.training
        by_answer = args.loss_weighting == "answer"
        if args.loss_type == "negative_advantage" and training:
            return super()._objective(student, teacher, reference, answers, num_items)
        head, mask_BT = student.head.whole(), answers.mask_BT
        if training and args.highest_entropy_share < 1 and bool((mask_BT != 0).any()):
            mask_BT = highest_entropy(
                student.hidden_BTH, head, answers.ids_BT, mask_BT, self.temperature, args.highest_entropy_share
            )
        valid = mask_BT != 0
        hidden_NH, targets_N, support = student.hidden_BTH[valid], answers.ids_BT[valid], teacher.where(valid)
        if args.loss_type == "sampled":
            engine = (
                answers.sampler_logps_BT[valid] if self.use_vllm and answers.sampler_logps_BT is not None else None
            )
            value_N, entropy_N = self._sampled(hidden_NH, head, targets_N, support, engine)
        else:
            at = outcomes(hidden_NH, head, support, targets_N, self.temperature)
            if args.loss_type == "teacher_top_k" and training:
                value_N = renormalized(at)
            else:
                value_N = divergence(at, self.beta) * (interior_factor(self.beta) if args.normalize_beta else 1.0)
            entropy_N, tail = at.entropy, tail_of(at, support, targets_N)
            if training and len(value_N):
                metrics = {
                    "served/tail_mass": tail.teacher, "served/student_tail_mass": tail.student,
                    "served/tail_kl": tail.kl,
                }  # fmt: skip
                if args.loss_type == "teacher_top_k":
                    metrics |= {"health/support_mass": 1 - tail.student, "health/outside_support": tail.outside}
                log_metrics(self, {name: float(value.float().mean()) for name, value in metrics.items()})
        return weighted_mean(value_N, valid, num_items, by_answer, answers.weight_BT), entropy_N.sum(), valid.sum()

    def _sampled(
        self, hidden_NH: Tensor, head: Head, targets_N: Tensor, support: Support, engine_N: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """−A log p(y) with A = log q(y) − log p(y), detached, and the entropy; both [N]."""
        logp_N, entropy_N = token_logprobs(hidden_NH, head, targets_N, self.temperature)
        advantage_N = support.sampled.to(logp_N) - logp_N.detach()
        if engine_N is not None:
            advantage_N = advantage_N * importance(logp_N, engine_N)
        return -advantage_N * logp_N, entropy_N

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch; logs the traffic after the last one of an optimizer step."""
        output = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            client, (received, retried) = self.served.client, self._seen
            self._seen = (client.received_bytes, client.retried)
            log_metrics(
                self,
                {
                    "served/received_bytes": client.received_bytes - received,
                    "served/retries": client.retried - retried,
                },
            )
        return output

    # -- look-ahead and evaluation -----------------------------------------------------------------

    def scored_divergence(self) -> ServedDivergence:
        """The divergence that the look-ahead's scorer `teacher_kl` measures."""
        return ServedDivergence(self)

    def _measure_task(self, task: Task) -> tuple[dict[str, float], int]:
        return evaluate_trainer(self, task, self.served)
