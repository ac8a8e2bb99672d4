"""`OfflineOPDTrainer`: distillation on stored rollouts, without sampling and without a teacher.

    stored rows → student forward → clipped advantage → loss → optimizer step → drift → log

Lightning OPD (arXiv 2604.13010): `effopd cache` samples once from the student at the start of
training, π_ref, and stores the teacher's log-probabilities. DisCorD (2605.14071) trains on stored
answers of the teacher instead, with the loss of `discord.py`. With `residualize`, the teacher's
log-probabilities are those of `residuals.py`. Run directory, resume, evaluation and
look-ahead are those of `OPDTrainer`; without a teacher, an evaluation has the accuracy only.

Left out: new rollouts during training. When the student drifts, collect them with `effopd cache`
and start a new run from the current weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import DistillationTrainer

from effopd.common.distributed import rank
from effopd.common.isolation import evaluating
from effopd.distill.callback import EffOPDCallback
from effopd.distill.config import OPDConfig, require_config
from effopd.distill.dataset import check_dataset
from effopd.distill.discord import normalized, support_weights
from effopd.distill.divergence import Head, gathered, shared_vocab_size, token_logprobs
from effopd.distill.evaluate_student import evaluate_trainer
from effopd.distill.health import spread_subset
from effopd.distill.offline_cache import charge, correct_rows
from effopd.distill.offline_drift import DriftGuard, DriftMonitor
from effopd.distill.offline_loss import DriftSums, clipped_advantage, offline_loss, top_k_kl
from effopd.distill.offline_store import CollectCosts, Header, RolloutStore, StoredRollout
from effopd.distill.residuals import residualized
from effopd.distill.run_dir_mixin import RunMixin
from effopd.distill.scoring import rollouts_per_step, token_batch
from effopd.distill.teachers.loading import teacher_loading
from effopd.distill.trl_host.hooks import DistillationHooks
from effopd.distill.trl_host.models import frozen, loaded_whole
from effopd.distill.trl_host.state import log_metrics
from effopd.errors import CompatibilityError, ConfigError, NonFiniteLossError
from effopd.extrapolate.config import EffOPDConfig
from effopd.models.checks import check_models
from effopd.models.logit_path import completion_hidden_states
from effopd.models.token_batch import TokenBatch
from effopd.runs.console import say
from effopd.tasks.base import Task

#: Inputs of a forward pass and of the token weights.
_TOKENS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "teacher_logps")
#: Stored rollouts on which the look-ahead's candidates are checked for drift.
GUARDED = 64


class OfflineOPDTrainer(RunMixin, DistillationHooks, DistillationTrainer):
    """Offline distillation on the rollouts in `args.rollouts`.

    Logs per step: `offline/ratio_mean` and `offline/ratio_std` of π_θ(y)/π_ref(y),
    `offline/advantage_mean`, `offline/clipped_share`, and `offline/top_k_kl` if the rollouts have
    the teacher's top-K. With loss_type 'discord': the ratio, and `offline/weight_mean`, the mean
    token weight before its normalization.

    Args:
        model: the student that sampled the rollouts, as a path or a model. Traces fit any student
            with their tokenizer.
        args: an `OPDConfig` with `rollouts`.
        eval_task: held-out examples with answers, for the accuracy; `None`: no evaluation.
        stored: header, rows and collection costs, if they have been read already.

    Attributes:
        header: the rollouts' header.
        collect_costs: cost of collecting the rollouts; part of the run's ledger with
            `args.charge_rollouts`.
        evaluation_teacher: the teacher with `args.evaluation_teacher`, otherwise `None`.

    Raises:
        CheckpointError: the rollouts are missing, incomplete or damaged.
        ConfigError: `args` has no rollouts, another temperature, or a loss for answers of the other
            model; or no stored answer is correct; or there is one answer only to residualize.
        CompatibilityError: the student has fewer vocabulary rows than the rollouts.
    """

    card_tags: ClassVar = ["trl", "effopd", "offline-distillation"]

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: OPDConfig,
        *positional: Any,
        eval_task: Task | None = None,
        stored: tuple[Header, list[StoredRollout], CollectCosts] | None = None,
        **kwargs: Any,
    ):
        require_config(args, OPDConfig, type(self).__name__)
        if args.rollouts is None:
            raise ConfigError("OfflineOPDTrainer needs OPDConfig(rollouts=FOLDER); use OPDTrainer to sample rollouts.")
        if stored is None:
            store = RolloutStore(args.rollouts)
            header = store.header()
            stored = header, *store.read(header)
        self.header, rows, self.collect_costs = stored
        check_sampling(args, self.header)
        self._rows = trained_rows(args, rows)
        if args.residualize:
            self._rows, bias = residualized(self._rows)
            if rank() == 0:
                say(bias.text())
        self.teacher_name = self.header.teacher.name
        dataset = Dataset.from_dict({"prompt": [""] * len(self._rows), "rollout": list(range(len(self._rows)))})
        check_dataset(dataset, rollouts_per_step(args))
        self._open_run(args, eval_task)
        if args.charge_rollouts:
            charge(self.ledger, self.collect_costs, args.cost_clock)
        eval_dataset = None if eval_task is None else eval_task.to_dataset()
        with loaded_whole():
            super().__init__(model, None, args, dataset, eval_dataset, *positional, **kwargs)
        student = self.accelerator.unwrap_model(self.model)
        self.vocab_size = self.header.vocab_size
        if student.config.get_text_config().vocab_size < self.vocab_size:
            raise CompatibilityError(
                f"the student has {student.config.get_text_config().vocab_size} vocabulary rows, but the rollouts in "
                f"{args.rollouts} have {self.vocab_size}: expected the student that sampled them."
            )
        teacher = args.teacher_model_name_or_path if args.evaluation_teacher else None
        self.evaluation_teacher = None if teacher is None else self._frozen_teacher(student, teacher)
        check_models(student, {"teacher": self.evaluation_teacher}, generates=eval_task is not None)
        self._drift = DriftMonitor(args.max_drift if args.loss_type == "sampled" else None, args.rollouts)
        self._attach_run()

    def _frozen_teacher(self, student: PreTrainedModel, name: str) -> Any:
        init = teacher_loading(self.args, self.args.teacher_model_init_kwargs or {})
        teacher = frozen(self, name, init)
        shared = shared_vocab_size(student, self.accelerator.unwrap_model(teacher), len(self.text_tokenizer))
        self.vocab_size = min(self.vocab_size, shared)
        return teacher

    # -- look-ahead --------------------------------------------------------------------------------

    def add_callback(self, callback) -> None:
        """Add a callback; a look-ahead's candidates are checked for drift from then on.

        Traces are no samples of the student, so the mean ratio on them is not expected to be 1 and
        is not checked.
        """
        if isinstance(callback, EffOPDCallback):
            check_look_ahead(callback.config)
        if isinstance(callback, EffOPDCallback) and self.args.loss_type == "sampled":
            callback.scorer = DriftGuard(callback.scorer, self._drift_of, self.args.max_drift)
        super().add_callback(callback)

    @torch.no_grad()
    def _drift_of(self, model: Any) -> tuple[DriftSums, int]:
        """Drift on this process's share of `GUARDED` stored rollouts, and its forward tokens."""
        ranks, size = self.accelerator.num_processes, self.args.per_device_train_batch_size
        rows = self._rows[:: max(1, len(self._rows) // GUARDED)][:GUARDED]
        rows = rows[: max(len(rows) // ranks, 1) * ranks]  # equal shares: sharded forwards are collective
        rows = rows[self.accelerator.process_index :: ranks]
        batches = [self._batch(rows[first : first + size]) for first in range(0, len(rows), size)]

        def measure() -> DriftSums:
            sums = DriftSums()
            for batch in batches:
                inputs = token_batch(batch)
                valid = inputs.scored_BT
                logp_N, _ = token_logprobs(
                    inputs.hidden(model), Head.of(model, self.vocab_size), batch["completion_ids"][valid],
                    self.temperature,
                )  # fmt: skip
                sums += DriftSums.of(logp_N, batch["reference_logps"][valid])
            return sums

        with self.accelerator.autocast():
            return gathered(model, measure), sum(token_batch(batch).tokens for batch in batches)

    # -- stored rows -------------------------------------------------------------------------------

    def around_rollouts(self, sample):
        with self.ledger.track("rollout"):  # nothing is sampled: only the time counts
            return sample()

    def make_rollouts(self, rows, sample):
        """The stored rollouts of dataset rows, in place of sampled ones."""
        chosen = [self._rows[row["rollout"]] for row in rows]
        batch = self._batch(chosen)
        answers = batch["completion_mask"].sum(1)
        items = (answers > 0).sum() if self.args.loss_weighting == "answer" else answers.sum()
        batch["num_items_in_batch"] = self.accelerator.gather(items).sum()
        if self.args.loss_type == "discord" and rollouts_per_step(self.args) > self.args.per_device_train_batch_size:
            batch["token_weights"] = self._step_weights(batch)
        cut = [row.finish_reason == "length" for row in chosen]
        log_metrics(
            self,
            {
                "completions/mean_length": float(answers.float().mean()),
                "completions/clipped_ratio": sum(cut) / len(cut),
            },
        )
        return batch

    def _batch(self, rows: Sequence[StoredRollout]) -> dict[str, Tensor]:
        """Padded tensors of stored rollouts: TRL's ids and masks, and log-probabilities [B, T]."""
        whole = TokenBatch.of(
            [list(row.prompt_ids) for row in rows],
            [list(row.completion_ids) for row in rows],
            self.text_tokenizer.pad_token_id,
        )
        width, length, k = (
            whole.ids_BL.shape[1] - whole.scored_BT.shape[1],
            whole.scored_BT.shape[1],
            self.header.top_k,
        )
        batch = {
            "prompt_ids": whole.ids_BL[:, :width],
            "prompt_mask": whole.mask_BL[:, :width],
            "completion_ids": whole.ids_BL[:, width:],
            "completion_mask": whole.mask_BL[:, width:],
            "teacher_logps": _padded([row.teacher_logprobs for row in rows], length),
            "reference_logps": _padded([row.student_logprobs for row in rows], length),
        }
        if k:
            ids = _padded([row.teacher_topk_ids for row in rows], length * k).long()  # exact below 2^24
            batch["teacher_top_ids"] = ids.view(len(rows), length, k)
            top = _padded([row.teacher_topk_logprobs for row in rows], length * k)
            batch["teacher_top_logps"] = top.view(len(rows), length, k)
        return {name: value.to(self.accelerator.device) for name, value in batch.items()}

    @torch.no_grad()
    def _step_weights(self, batch: dict[str, Tensor]) -> Tensor:
        """DisCorD's weights [B, T] with mean 1 over the step's tokens, 0 at padding.

        Costs one more forward pass, because the mean needs the weights of all micro-batches.
        """
        size, model = self.args.per_device_train_batch_size, self.accelerator.unwrap_model(self.model)
        weights_BT = torch.zeros_like(batch["teacher_logps"])

        def measure() -> None:
            for first in range(0, len(weights_BT), size):
                part = {name: batch[name][first : first + size] for name in _TOKENS}
                inputs, valid = token_batch(part), token_batch(part).scored_BT
                logp_N, _ = token_logprobs(
                    inputs.hidden(model), Head.of(model, self.vocab_size), part["completion_ids"][valid],
                    self.temperature,
                )  # fmt: skip
                weight_N = support_weights(logp_N, part["teacher_logps"][valid], self.args.discord_temperature)
                weights_BT[first : first + size][valid] = weight_N
                self.ledger.count("rollout", forward=inputs.tokens)  # of the preparation: no backward pass follows

        with evaluating(model), self.accelerator.autocast():
            gathered(model, measure)
        sums = torch.stack([weights_BT.sum(), batch["completion_mask"].sum().to(weights_BT.dtype)])
        total, tokens = self.accelerator.gather(sums[None]).sum(0)
        return normalized(weights_BT, total / tokens)

    # -- loss --------------------------------------------------------------------------------------

    def distillation_loss(self, student, inputs, num_items):
        student = getattr(student, "_orig_mod", student)  # as in OPDTrainer
        with self.accelerator.autocast():
            return self._loss_of(student, inputs, num_items)

    def _loss_of(self, student, inputs, num_items):
        batch = token_batch(inputs)
        hidden_BTH = completion_hidden_states(
            student, batch.ids_BL, batch.mask_BL, batch.scored_BT.shape[1], multiple_of=self.pad_to_multiple_of
        )
        head = Head.of(student, self.vocab_size)
        valid, device = batch.scored_BT.to(head.weight.device), head.weight.device
        hidden_NH = hidden_BTH.to(device)[valid]
        logp_N, entropy_N = token_logprobs(
            hidden_NH, head, inputs["completion_ids"].to(device)[valid], self.temperature
        )
        teacher_N, reference_N = (inputs[name].to(device)[valid] for name in ("teacher_logps", "reference_logps"))
        by_answer = self.args.loss_weighting == "answer"
        if self.args.loss_type == "discord":
            weight_N = support_weights(logp_N, teacher_N, self.args.discord_temperature)
            given = inputs.get("token_weights")
            whole_N = normalized(weight_N) if given is None else given.to(device)[valid]
            loss = offline_loss(logp_N, whole_N, valid, num_items, by_answer)
            self._drift.add(DriftSums.of(logp_N, reference_N, weight_N=weight_N))
        else:
            clip = self.args.advantage_clip
            advantage_N = clipped_advantage(teacher_N, logp_N, clip)
            loss = offline_loss(logp_N, advantage_N, valid, num_items, by_answer)
            self._drift.add(DriftSums.of(logp_N, reference_N, teacher_N - logp_N.detach(), clip))
        self.ledger.count("update", forward=batch.tokens)
        if self.header.top_k and self.args.health_tokens:
            self._log_top_k(hidden_BTH.detach().to(device), head, inputs, valid)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteLossError(
                f"the loss of step {self.state.global_step + 1} is not finite. Nothing was updated in this step. "
                "Lower the learning rate and resume from the last checkpoint."
            )
        return loss, entropy_N.sum().detach(), valid.sum()

    @torch.no_grad()
    def _log_top_k(self, hidden_BTH: Tensor, head: Head, inputs: dict[str, Tensor], valid_BT: Tensor) -> None:
        """Log the mean of `top_k_kl` on at most `health_tokens` positions of a micro-batch."""
        index_N, _ = spread_subset(valid_BT, self.args.health_tokens)
        ids_NK, top_NK = (
            inputs[name].to(valid_BT.device).flatten(0, 1)[index_N]
            for name in ("teacher_top_ids", "teacher_top_logps")
        )
        value_N = top_k_kl(hidden_BTH.flatten(0, 1)[index_N], head, ids_NK, top_NK, self.temperature)
        log_metrics(self, {"offline/top_k_kl": float(value_N.mean())})

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch; logs the drift after the last one of an optimizer step."""
        output = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            log_metrics(self, self._drift.finish_step(self.state.global_step + 1))
        return output

    # -- evaluation --------------------------------------------------------------------------------

    def eval_metrics(self) -> list[str]:
        """Evaluation metrics; without an evaluation teacher, without those that need one."""
        names = super().eval_metrics()
        return names if self.args.evaluation_teacher else [n for n in names if n not in ("kl", "kl_se", "loss")]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluate `eval_task`.

        Raises:
            ConfigError: there is no `eval_task`, or a dataset is given, whose loss needs a teacher.
        """
        if self.eval_task is None or eval_dataset is not None:
            raise ConfigError("a run on stored rollouts has no teacher, so it evaluates an eval_task only.")
        return super().evaluate(None, ignore_keys, metric_key_prefix)

    def _measure_task(self, task: Task) -> tuple[dict[str, float], int]:
        return evaluate_trainer(self, task, self.evaluation_teacher)


def trained_rows(args: OPDConfig, rows: Sequence[StoredRollout]) -> list[StoredRollout]:
    """The stored rows that a run trains on: of traces, the correct ones.

    Raises:
        ConfigError: none is correct, or the run residualizes and there is one row only.
    """
    chosen = correct_rows(rows)
    if not chosen:
        raise ConfigError(
            f"--rollouts {args.rollouts}: none of its {len(rows)} answers is correct, and only correct answers of a "
            "teacher are trained on. Collect more, or use a better teacher."
        )
    if args.residualize and len(chosen) < 2:
        raise ConfigError(
            f"residualize=True measures the teacher's bias on other answers, but --rollouts {args.rollouts} has one "
            "answer only. Collect more, or leave out --residualize."
        )
    return chosen


def check_sampling(args: OPDConfig, header: Header) -> None:
    """Check that the run's loss, temperature and answer length fit the rollouts.

    Raises:
        ConfigError: they differ.
    """
    sampler = {"sampled": "student", "discord": "teacher"}[args.loss_type]
    if header.sampler != sampler:
        raise ConfigError(
            f"loss_type={args.loss_type!r} trains on answers of the {sampler}, but those in {args.rollouts} are the "
            f"{header.sampler}'s. Use --loss_type {'discord' if sampler == 'student' else 'sampled'}, or collect "
            f"answers with effopd cache --sampled_by {sampler}."
        )
    if args.temperature != header.temperature:
        raise ConfigError(
            f"temperature={args.temperature:g}: the rollouts in {args.rollouts} were sampled and scored at "
            f"temperature {header.temperature:g}. Set --temperature {header.temperature:g}."
        )
    if args.max_completion_length < header.max_completion_length:
        raise ConfigError(
            f"max_completion_length={args.max_completion_length}: the rollouts in {args.rollouts} have answers of up "
            f"to {header.max_completion_length} tokens. Set --max_completion_length {header.max_completion_length}."
        )


def check_look_ahead(config: EffOPDConfig) -> None:
    """Check that the look-ahead scores every jump by answers, because there is no teacher.

    Raises:
        ConfigError: it scores by a divergence from the teacher, or jumps without a score.
    """
    if config.enabled and (config.scorer != "accuracy" or config.rules.fit is not None):
        why = "scores by the divergence from a teacher" if config.scorer == "teacher_kl" else "jumps without a score"
        raise ConfigError(
            f"strategy={config.strategy!r} {why}, but --rollouts loads no teacher and checks every candidate for "
            "drift. Use a strategy that scores answers: --effopd.strategy effopd."
        )


def _padded(rows: Sequence[Sequence[float]], length: int) -> Tensor:
    """Rows as a float32 tensor [B, length], padded with 0 on the right."""
    out = torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(list(row), dtype=torch.float32)
    return out
