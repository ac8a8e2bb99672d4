"""Reinforcement learning on a task with TRL's GRPO and RLOO, for comparisons and for teachers.

    sample n answers per prompt (TRL) → verify → advantage → loss → step → log → evaluate → save

Rows, evaluation, ledger, checkpoints and trajectory are those of `effopd train` (`RunMixin`). The
reward is 1 for a verified answer and 0 otherwise, so it measures accuracy; `overlong_cache` adds a
penalty. DAPO's dynamic sampling is left out because TRL does not have it: groups whose answers are
all right or all wrong stay in the batch with advantage 0 (`frac_reward_zero_std`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel
from trl import GRPOTrainer, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment

from effopd.distill.dataset import check_dataset
from effopd.distill.evaluate_student import evaluate_task
from effopd.distill.rollout_cycle import RolloutCycleCallback
from effopd.distill.run_dir_mixin import RunMixin
from effopd.distill.trl_host.hooks import PolicyHooks
from effopd.errors import TaskError
from effopd.runs.missing_answers import Counts
from effopd.tasks.base import Task, verdict_counts
from effopd.tasks.evaluate import CORRECT
from effopd.tasks.generate import encode_prompts
from effopd.tasks.reasoning import decode_marked, opened_by_ids

logger = logging.getLogger(__name__)

#: Batches of rewards without a gradient after which `RewardWatch` warns.
WATCHED_BATCHES = 3


class RewardWatch:
    """Logs once that the rewards of the first batches were equal for all answers to a prompt."""

    def __init__(self) -> None:
        self._tied: list[float] | None = []  # all rewards so far; `None`: no more to say
        self._batches = 0

    def see(self, prompts: Sequence[str], rewards: Sequence[float], *, quiet: bool = False) -> None:
        """Take the rewards of a batch, one per answer.

        Args:
            prompts: id of the prompt of each answer.
            quiet: say nothing from now on.
        """
        different = len(set(zip(prompts, rewards, strict=True))) > len(set(prompts))
        if self._tied is None or quiet or different:
            self._tied = None
            return
        self._tied += rewards
        self._batches += 1
        if self._batches == WATCHED_BATCHES:
            right, total = int(sum(self._tied)), len(self._tied)
            harder = "harder" if right > total / 2 else "easier"
            logger.warning(
                "No gradient from the reward in the first %d batches: the answers to each prompt are all right or all "
                "wrong (%d of %d are right). What can help: %s questions (--task_args), more answers per prompt "
                "(--num_generations), or a model that gets 5 to 60 %% right to start from.",
                WATCHED_BATCHES, right, total, harder,
            )  # fmt: skip
            self._tied = None


def correct_reward(task: Task, trainer: Any = None) -> Callable[..., list[float]]:
    """TRL reward function for a task: 1.0 if the verifier's score is 1, otherwise 0.0.

    Args:
        task: the rows, matched by column `id`, and their verifier.
        trainer: the TRL trainer that calls the function. Verifiers then get the same text as in an
            evaluation, reasoning marks included. `None`: they get TRL's text, which lacks marks
            that are special tokens and a mark at the end of the prompt.
    """
    by_id = {example.id: example for example in task.examples}

    @cache
    def opened(id: str) -> str:
        prompts = encode_prompts(trainer.text_tokenizer, [by_id[id].prompt], trainer.chat_template_kwargs)
        return opened_by_ids(trainer.text_tokenizer, prompts[0])

    rewards = RewardWatch()

    def correct(completions, id, completion_ids=None, log_metric=None, **_) -> list[float]:
        if trainer is None:
            texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        else:
            decoded = decode_marked(trainer.text_tokenizer, completion_ids)
            texts = [opened(i) + text for text, i in zip(decoded, id, strict=True)]
        gradings = task.grade_batch(texts, [by_id[i] for i in id])
        scores = [grading.score for grading in gradings]
        if log_metric is not None:
            for verdict, count in (verdict_counts(gradings) or {}).items():
                log_metric(f"verdicts/{verdict}", count / len(gradings))
        right = [float(score >= CORRECT) for score in scores]
        if trainer is not None and trainer.model.training and trainer.is_world_process_zero():
            cut = [len(ids) > 0 and ids[-1] not in trainer.eos_token_ids for ids in completion_ids]
            watch = trainer.answer_watch
            watch.see(task, Counts.of(task, texts, cut, scores), "equal rewards, so they give no gradient")
            rewards.see(id, right, quiet=watch.said)
        return right

    return correct


class TaskRLMixin(RunMixin, PolicyHooks):
    """A TRL reinforcement-learning trainer for a `Task`.

    Args:
        model: path or model.
        args: a `TaskGRPOConfig` or `TaskRLOOConfig`.
        train_task: prompts with answers.
        eval_task: held-out prompts with answers. Evaluations report `eval_accuracy` and
            `eval_accuracy_greedy` with 95 % intervals.

    Raises:
        TaskError: training examples cannot be graded.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: Any,
        train_task: Task,
        eval_task: Task | None = None,
        **kwargs: Any,
    ):
        if not train_task.verifiable:
            raise TaskError(
                f"task '{train_task.name}' cannot give a reward: expected an answer for every example. Fill in the "
                "`answer` column or use another task."
            )
        check_dataset(train_task.to_dataset(), args.generation_batch_size // args.num_generations)
        self._open_run(args, eval_task)
        self.task_name = train_task.name
        rewards = [correct_reward(train_task, self)]
        if args.overlong_cache:
            limit = args.max_completion_length
            rewards.append(get_soft_overlong_punishment(limit, max(1, round(args.overlong_cache * limit))))
        super().__init__(
            model=model,
            reward_funcs=rewards,
            args=args,
            train_dataset=train_task.to_dataset(),
            eval_dataset=eval_task.to_dataset() if eval_task is not None else None,
            **kwargs,
        )
        self._attach_run()
        self.add_callback(RolloutCycleCallback(self))

    def around_rollouts(self, sample):
        output = super().around_rollouts(sample)
        if self._samples_itself:
            mask_BT = output["completion_mask"] * output.get("tool_mask", 1)
            super().answers_sampled([mask_BT[mask_BT > 0]])
        return output

    def answers_sampled(self, answers):
        if not self._samples_itself:
            super().answers_sampled(answers)

    @property
    def _samples_itself(self) -> bool:
        """Whether the user's `rollout_func` samples; its `env_mask` tells which tokens."""
        return getattr(self, "rollout_func", None) is not None

    def around_log_probs(self, model, mask_BL, compute):
        category = "eval" if not self.model.training else "update" if torch.is_grad_enabled() else "rollout"
        if category == "rollout" and self._is_reference(model):
            category = "teacher"
        self.ledger.count(category, forward=int(mask_BL.sum()))
        with self.ledger.track(category) if category == "teacher" else nullcontext():
            return compute()

    def _is_reference(self, model: Any) -> bool:
        """Whether a model is the reference: a model of its own, or without the trained adapter."""
        if model is self.ref_model:
            return True
        layers = (each for each in model.modules() if isinstance(getattr(each, "disable_adapters", None), bool))
        adapted: Any = next(layers, None)  # PEFT switches all of them together
        return adapted is not None and (adapted.disable_adapters or "ref" in adapted.active_adapters)

    def _measure_task(self, task: Task) -> tuple[dict[str, float], int]:
        return evaluate_task(
            self.accelerator.unwrap_model(self.model),
            None,
            self.processing_class,
            task,
            self.args,
            vocab_size=0,
            autocast=self.accelerator.autocast,
            watch=self.answer_watch,
        )


class TaskGRPOTrainer(TaskRLMixin, GRPOTrainer):
    """GRPO and DAPO (arXiv 2402.03300, 2503.14476)."""

    card_tags: ClassVar = ["trl", "effopd", "grpo"]


class TaskRLOOTrainer(TaskRLMixin, RLOOTrainer):
    """RLOO (arXiv 2402.14740)."""

    card_tags: ClassVar = ["trl", "effopd", "rloo"]
