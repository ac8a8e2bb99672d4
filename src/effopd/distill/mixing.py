"""Training on prefixes that are not the student's alone: given answers (GKD), or a mixed sampler.

    lmbda                u(seed, step) < λ  →  the student's rollouts; otherwise stored traces, or
                         the dataset's answers
    teacher_mixed_alpha  each token of a rollout is drawn from α q + (1−α) p

All kinds of steps have the same loss, because a divergence per prefix is defined on any prefix. A
step whose rollouts a look-ahead scores is always on-policy, and so is every evaluation. The choice
of λ is a function of seed and step, so all processes agree and a resumed run repeats it.

Source: arXiv 2306.13649 (GKD), algorithm 1; `lmbda` is TRL's name of λ. 2306.08543 (MiniLLM).

Shapes: B answers, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from effopd.distill.callback import EffOPDCallback
from effopd.distill.mixed_sampler import TeacherMixing, mixing, teacher_tokens
from effopd.distill.offline_cache import charge, correct_rows
from effopd.distill.offline_store import CollectCosts, RolloutStore
from effopd.distill.scoring import rollouts_per_step
from effopd.distill.teachers.offload import in_use
from effopd.distill.trl_host.hooks import DistillationHooks
from effopd.distill.trl_host.state import log_answers, log_metrics
from effopd.errors import CompatibilityError, ConfigError, TaskError
from effopd.models.fingerprint import tokenizer_sha256
from effopd.models.logit_path import is_whole
from effopd.models.token_batch import TokenBatch
from effopd.runs.ledger import CostLedger
from effopd.tasks.generate import encode_prompts
from effopd.tasks.row_faults import kind_of

#: Streams of random numbers: the choice of a step's kind, and of its answers.
_KIND, _ROWS = 1, 2
#: Key of a micro-batch: α [B] of the sampler of each answer, for the loss on sampled tokens.
TEACHER_SHARE = "teacher_share"


def on_policy(lmbda: float, seed: int, step: int) -> bool:
    """Whether a step is on-policy: u < λ with u uniform in [0, 1), a function of (seed, step).

    Example:
        >>> [on_policy(0.5, 0, step) for step in range(6)]
        [True, False, False, True, False, True]
    """
    return lmbda >= 1 or float(np.random.default_rng([seed, step, _KIND]).random()) < lmbda


def chosen_rows(available: int, wanted: int, seed: int, step: int) -> list[int]:
    """`wanted` different indices below `available`, a function of (seed, step)."""
    return np.random.default_rng([seed, step, _ROWS]).choice(available, wanted, replace=False).tolist()


class Given(NamedTuple):
    """A prompt and its given answer, as token ids."""

    prompt_ids: list[int]
    completion_ids: list[int]


def read_traces(args: Any, tokenizer: Any) -> tuple[list[Given], CollectCosts]:
    """The correct answers in `args.traces`, or all if they are not graded, and their cost.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged.
        CompatibilityError: the answers were written with another tokenizer.
        ConfigError: there are fewer than a step takes, or they are longer than
            `max_completion_length`.
    """
    store = RolloutStore(args.traces)
    header = store.header()
    if tokenizer is not None and tokenizer_sha256(tokenizer) != header.tokenizer:
        raise CompatibilityError(
            f"--traces {args.traces} have another tokenizer than the student, so their token ids mean other tokens. "
            "Collect traces with effopd cache and this student."
        )
    if header.max_completion_length > args.max_completion_length:
        raise ConfigError(
            f"max_completion_length={args.max_completion_length}: the answers in --traces {args.traces} have up to "
            f"{header.max_completion_length} tokens. Set --max_completion_length {header.max_completion_length}."
        )
    rows, costs = store.read(header)
    rows = correct_rows(rows)
    if len(rows) < rollouts_per_step(args):
        raise ConfigError(
            f"a step takes {rollouts_per_step(args)} answers, but --traces {args.traces} has {len(rows)} correct "
            "ones. Lower --per_device_train_batch_size or --gradient_accumulation_steps, or collect more."
        )
    return [Given(list(row.prompt_ids), list(row.completion_ids)) for row in rows], costs


def given_answer(row: Mapping[str, Any], tokenizer: Any, limit: int, template: dict[str, Any] | None) -> Given:
    """The dataset's own answer, column `completion`: text or one chat message, with one end token.

    Args:
        limit: maximum number of answer tokens; longer answers are cut, without an end token.

    Raises:
        TaskError: the row has no such answer.
    """
    ids, end = tokenizer(answer_text(row["completion"]), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    ids = [*ids] if ids and ids[-1] == end else [*ids, end]
    return Given(encode_prompts(tokenizer, [row["prompt"]], template)[0], ids[:limit])


def answer_text(answer: Any, origin: str = "a row of train_dataset") -> str:
    """Text of a value of column `completion`.

    Raises:
        TaskError: it is neither text nor chat messages that end with text.
    """
    text = (
        answer[-1].get("content") if isinstance(answer, list) and answer and isinstance(answer[-1], dict) else answer
    )
    if not isinstance(text, str):
        raise TaskError(
            f"{origin}: expected text or chat messages that end with text in 'completion', got {kind_of(answer)}. "
            "Fill in the answer, or leave the row out: dataset.filter(lambda row: row['completion'])."
        )
    return text


class MixingMixin(DistillationHooks):
    """Steps on given answers or mixed rollouts for `OPDTrainer`; does nothing at λ = 1, α = 0."""

    teacher_model: Any
    vocab_size: int
    ledger: CostLedger

    def _open_mixing(self) -> None:
        """Check the run, and read the traces; called once `vocab_size` is known.

        Raises:
            CheckpointError, CompatibilityError, ConfigError: see `read_traces`; or the dataset has
                no column `completion`; or the run has tools or images; or the teacher that samples
                along is sharded.
            TaskError: a row has no answer in its column `completion`.
        """
        self._given_answers: list[Given] | None = None
        self._on_policy_now = True
        self._kind = (-1, True)  # a step, and whether it is on-policy
        args = self.args
        if not args.mixes:
            return
        name = "lmbda" if args.lmbda < 1 else "teacher_mixed_alpha"
        if self.tools or self.reads_images:
            raise ConfigError(f"{name}={getattr(args, name):g} supports neither tools nor images. Leave out --{name}.")
        if args.teacher_mixed_alpha:
            if not is_whole(self.accelerator.unwrap_model(self.teacher_model)):
                raise ConfigError(
                    f"teacher_mixed_alpha={args.teacher_mixed_alpha:g}: expected a teacher with all weights on every "
                    "process, got a sharded one. Load it whole, or leave out --teacher_mixed_alpha."
                )
            return
        if args.traces is None:
            columns = getattr(self.train_dataset, "column_names", None) or ()
            if "completion" not in columns:
                raise ConfigError(
                    f"lmbda={args.lmbda:g} needs answers for the steps that are not on-policy. Set --traces to a "
                    "folder that effopd cache --sampled_by teacher wrote, or train on a dataset with a column "
                    f"'completion' (got {', '.join(columns) or 'none'})."
                )
            if hasattr(self.train_dataset, "__len__"):
                for number, answer in enumerate(self.train_dataset["completion"]):
                    answer_text(answer, f"row {number} of train_dataset")
            return
        self._given_answers, costs = read_traces(args, self.text_tokenizer)
        if (largest := max(max(each.completion_ids) for each in self._given_answers)) >= self.vocab_size:
            raise CompatibilityError(
                f"--traces {args.traces} has token {largest}, but student and teacher share {self.vocab_size} tokens. "
                "Collect traces with effopd cache and these models."
            )
        if args.charge_rollouts:
            charge(self.ledger, costs, args.cost_clock)

    def make_rollouts(self, rows, sample):
        self._on_policy_now = not self.model.training or self._is_on_policy(self.state.global_step)
        if self._given_now:
            return self._given_batch(rows)
        output = super().make_rollouts(rows, sample)
        if self._mixed_now and self.args.on_sampled_tokens:
            ids_BT = output["completion_ids"]
            output[TEACHER_SHARE] = torch.full((len(ids_BT),), self.args.teacher_mixed_alpha, device=ids_BT.device)
        return output

    @property
    def _given_now(self) -> bool:
        return not self._on_policy_now and self.args.lmbda < 1

    @property
    def _mixed_now(self) -> bool:
        return not self._on_policy_now and self.args.teacher_mixed_alpha > 0

    def _is_on_policy(self, step: int) -> bool:
        """Whether a step is on-policy; it stays so if a jump drops its rollouts."""
        args = self.args
        if self._kind[0] != step:
            chosen = on_policy(args.lmbda, args.seed, step) and not args.teacher_mixed_alpha
            scored = any(
                isinstance(each, EffOPDCallback) and each.scores_rollouts(step + 1)
                for each in self.callback_handler.callbacks
            )
            self._kind = (step, chosen or scored)
            if args.mixes:
                log_metrics(self, {"rollouts/on_policy": float(chosen or scored)})
        return self._kind[1]

    def decoding_models(self) -> list[Any]:
        """The student, and the teacher if it samples along."""
        teacher = [self.accelerator.unwrap_model(self.teacher_model)] if self._mixed_now else []
        return super().decoding_models() + teacher

    def around_turn(self, generate, prompt_ids, *, multimodal):
        if not self._mixed_now:
            return super().around_turn(generate, prompt_ids, multimodal=multimodal)
        student, teacher = map(self.accelerator.unwrap_model, (self.model, self.teacher_model))
        teacher.eval()

        def mixed(prompts: list[list[int]]) -> Any:
            processor = TeacherMixing(
                teacher, list(map(len, prompts)), self.args.teacher_mixed_alpha, self.temperature, self.vocab_size,
                lambda: self.ledger.track("teacher"),
            )  # fmt: skip
            with mixing(student, processor):
                answers = generate(prompts)
            self.ledger.count("teacher", forward=teacher_tokens(prompts, answers))
            return answers

        with in_use(teacher):
            return super().around_turn(mixed, prompt_ids, multimodal=multimodal)

    def _given_batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Padded ids and masks of this process's given answers, cut at the present horizon."""
        limit = self.max_completion_length  # the horizon of this step
        if self._given_answers is None:
            template = self.args.chat_template_kwargs
            given = [given_answer(row, self.text_tokenizer, limit, template) for row in rows]
        else:
            ranks, here = self.accelerator.num_processes, self.accelerator.process_index
            chosen = chosen_rows(len(self._given_answers), len(rows) * ranks, self.args.seed, self.state.global_step)
            given = [self._given_answers[i] for i in chosen[here * len(rows) : (here + 1) * len(rows)]]
        batch = TokenBatch.of(
            [each.prompt_ids for each in given], [each.completion_ids[:limit] for each in given],
            self.text_tokenizer.pad_token_id,
        )  # fmt: skip
        width, device = batch.ids_BL.shape[1] - batch.scored_BT.shape[1], self.accelerator.device
        output = {
            "prompt_ids": batch.ids_BL[:, :width], "prompt_mask": batch.mask_BL[:, :width],
            "completion_ids": batch.ids_BL[:, width:], "completion_mask": batch.mask_BL[:, width:],
        }  # fmt: skip
        output = {name: value.to(device) for name, value in output.items()}
        output["num_items_in_batch"] = self.accelerator.gather(output["completion_mask"].sum()).sum()
        log_metrics(self, {"completions/mean_length": sum(batch.lengths) / len(given)})
        log_answers(self, [each.prompt_ids for each in given], [each.completion_ids[:limit] for each in given])
        return output
