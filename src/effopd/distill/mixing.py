"""Mixing of on-policy rollouts and given answers: on-policy with probability λ per step (GKD).

    u(seed, step) < λ  →  the student's rollouts;  otherwise stored traces, or the dataset's answers

Both kinds of steps have the same loss, because a divergence per prefix is defined on any prefix.
The choice is a function of seed and step, so all processes agree and a resumed run repeats it. A
step whose rollouts a look-ahead scores is always on-policy.

Source: arXiv 2306.13649 (GKD), algorithm 1; `lmbda` is TRL's name of λ.

Shapes: B answers, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from effopd.distill.callback import EffOPDCallback
from effopd.distill.offline_cache import charge, correct_rows
from effopd.distill.offline_store import CollectCosts, RolloutStore
from effopd.distill.scoring import rollouts_per_step
from effopd.distill.trl_host.hooks import DistillationHooks
from effopd.distill.trl_host.state import log_answers, log_metrics
from effopd.errors import CompatibilityError, ConfigError
from effopd.models.fingerprint import tokenizer_sha256
from effopd.models.token_batch import TokenBatch
from effopd.runs.ledger import CostLedger
from effopd.tasks.generate import encode_prompts

#: Streams of random numbers: the choice of a step's kind, and of its answers.
_KIND, _ROWS = 1, 2


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
    """The dataset's own answer, column `completion`: text or one chat message, with an end token.

    Args:
        limit: maximum number of answer tokens; longer answers are cut, without an end token.
    """
    answer = row["completion"]
    text = answer if isinstance(answer, str) else answer[-1]["content"]
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Given(encode_prompts(tokenizer, [row["prompt"]], template)[0], ids[:limit])


class MixingMixin(DistillationHooks):
    """Steps on given answers for `OPDTrainer`; does nothing at λ = 1."""

    vocab_size: int
    ledger: CostLedger

    def _open_mixing(self) -> None:
        """Read the traces, or check the dataset's column; called once `vocab_size` is known.

        Raises:
            CheckpointError, CompatibilityError, ConfigError: see `read_traces`; or the dataset has
                no column `completion`; or the run has tools or images.
        """
        self._given_answers: list[Given] | None = None
        self._on_policy_now = True
        args = self.args
        if args.lmbda == 1:
            return
        if self.tools or self.reads_images:
            raise ConfigError(f"lmbda={args.lmbda:g} supports neither tools nor images. Use --lmbda 1.")
        if args.traces is None:
            columns = getattr(self.train_dataset, "column_names", None) or ()
            if "completion" not in columns:
                raise ConfigError(
                    f"lmbda={args.lmbda:g} needs answers for the steps that are not on-policy. Set --traces to a "
                    "folder that effopd cache --sampled_by teacher wrote, or train on a dataset with a column "
                    f"'completion' (got {', '.join(columns) or 'none'})."
                )
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
        if self.args.lmbda < 1 and self.model.training:
            log_metrics(self, {"rollouts/on_policy": float(self._on_policy_now)})
        return super().make_rollouts(rows, sample) if self._on_policy_now else self._given_batch(rows)

    def _is_on_policy(self, step: int) -> bool:
        return on_policy(self.args.lmbda, self.args.seed, step) or any(
            isinstance(each, EffOPDCallback) and each.scores_rollouts(step + 1)
            for each in self.callback_handler.callbacks
        )

    def sampled_tokens(self, rollouts) -> int:
        """Tokens sampled for a batch: none for given answers."""
        return super().sampled_tokens(rollouts) if self._on_policy_now else 0

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
