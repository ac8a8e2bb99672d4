"""Private methods of TRL's trainers as named hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor
from transformers import PreTrainedModel, Trainer
from trl.trainer.utils import get_comet_experiment_url, get_config_model_id, get_trackio_space_url

from effopd.distill.trl_host.state import rollouts_in_use, use_rollouts

T = TypeVar("T")

#: Parts of a checkpoint, as `HostHooks.around_load` names them.
WEIGHTS, OPTIMIZER = "the weights", "the optimizer's or the schedule's state"
SCALER, RANDOM_STATE = "the gradient scaler", "the random state"

_Host: Any = Trainer if TYPE_CHECKING else object


class HostHooks(_Host):
    """Private methods of a TRL trainer as hooks.

    Mix it in right before the trainer, after the classes that implement hooks. An `around_…` hook
    receives the host's call, makes it and returns its result.
    """

    #: Model-card tags.
    card_tags: ClassVar[Sequence[str]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "card_tags" in vars(cls):
            cls._tag_names = list(cls.card_tags)

    # Facts for the model card.

    @property
    def method_name(self) -> str:
        """TRL's name for its method, for example GRPO."""
        return self._name

    @property
    def citation(self) -> str | None:
        """BibTeX of the method's paper."""
        return self._paper.get("citation")

    @staticmethod
    def model_id(model: PreTrainedModel) -> str:
        """Hub id or folder that the model was loaded from; empty if it was not loaded."""
        return get_config_model_id(model.config) or ""

    @staticmethod
    def tracker_urls() -> tuple[str | None, str | None]:
        """URLs of the run at Trackio and Comet."""
        return get_trackio_space_url(), get_comet_experiment_url()

    # Private attributes.

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer, also if the host was given a processor."""
        return self._tokenizer

    @property
    def reads_images(self) -> bool:
        """Whether the host treats its model as a vision-language model."""
        return getattr(self, "_is_vlm", False)

    # Sampling.

    def train_sampler(self, sampler: Any) -> Any:
        """Hook: the prompt sampler, made from the host's."""
        return sampler

    def _get_train_sampler(self, dataset=None):
        return self.train_sampler(super()._get_train_sampler(dataset))

    def around_rollouts(self, sample: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Hook: a batch of rollouts with masks and all other inputs of the loss."""
        return sample()

    def make_rollouts(self, rows: list[dict[str, Any]], sample: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Hook: the rollouts of these rows of the dataset, inside `around_rollouts`."""
        return sample()

    def _generate_and_score_completions(self, inputs):
        sample = partial(super()._generate_and_score_completions, inputs)
        return self.around_rollouts(partial(self.make_rollouts, inputs, sample))

    def around_turn(
        self, generate: Callable[[list[list[int]]], Any], prompt_ids: list[list[int]], *, multimodal: bool
    ) -> Any:
        """Hook: one answer per prompt; `generate` may be called several times, on parts of the
        prompts (token ids).
        """
        return generate(prompt_ids)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        host = super()._generate_single_turn

        def generate(prompts: list[list[int]]) -> Any:
            output = host(prompts, images, multimodal_fields, *args, **kwargs)
            self.answers_sampled(output[0] if isinstance(output, tuple) else output)  # or with log-probabilities
            return output

        return self.around_turn(generate, prompt_ids, multimodal=bool(multimodal_fields))

    def answers_sampled(self, answers: Sequence[Sequence[int]]) -> None:
        """Hook: the token ids that one call of `generate` sampled, per prompt."""

    # The loop.

    def around_state(self, initialize: Callable[[], T], checkpoint: str | None, max_steps: int) -> T:
        """Hook: the trainer's initial state, loaded from `checkpoint` if the run is resumed."""
        return initialize()

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial):
        host = super()._init_training_state
        call = partial(host, max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        return self.around_state(call, resume, max_steps)

    def around_epoch(self, run: Callable[[], None]) -> None:
        """Hook: an epoch of training."""
        run()

    def _run_epoch(self, *args, **kwargs):
        self.around_epoch(partial(super()._run_epoch, *args, **kwargs))

    def around_step_end(self, report: Callable[[], None]) -> None:
        """Hook: logging, evaluating and saving after a step, each if due."""
        report()

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self.around_step_end(partial(super()._maybe_log_save_evaluate, *args, **kwargs))

    # Checkpoints.

    def checkpoint_root(self) -> Path | None:
        """Hook: the folder into which checkpoints are written; `None`: the host's."""
        return None

    def _get_output_dir(self, trial):
        root = self.checkpoint_root()
        return super()._get_output_dir(trial) if root is None else str(root)

    def around_checkpoint(self, write: Callable[[], None]) -> None:
        """Hook: writing a checkpoint."""
        write()

    def _save_checkpoint(self, model, trial):
        self.around_checkpoint(partial(super()._save_checkpoint, model, trial))

    def around_best_metric(self, judge: Callable[[], bool]) -> bool:
        """Hook: whether the evaluation of this step is the best so far."""
        return judge()

    def _determine_best_metric(self, metrics, trial):
        return self.around_best_metric(partial(super()._determine_best_metric, metrics, trial))

    def around_best_model(self, load: Callable[[], None]) -> None:
        """Hook: restoring the best model at the end of training."""
        load()

    def _load_best_model(self):
        self.around_best_model(super()._load_best_model)

    def around_load(self, part: str, checkpoint: str | None, load: Callable[[], None]) -> None:
        """Hook: loading `WEIGHTS`, `OPTIMIZER`, `SCALER` or `RANDOM_STATE` from a checkpoint."""
        load()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        call = partial(super()._load_from_checkpoint, resume_from_checkpoint, model)
        self.around_load(WEIGHTS, resume_from_checkpoint, call)

    def _load_optimizer_and_scheduler(self, checkpoint):
        self.around_load(OPTIMIZER, checkpoint, partial(super()._load_optimizer_and_scheduler, checkpoint))

    def _load_scaler(self, checkpoint):
        self.around_load(SCALER, checkpoint, partial(super()._load_scaler, checkpoint))

    def _load_rng_state(self, checkpoint):
        self.around_load(RANDOM_STATE, checkpoint, partial(super()._load_rng_state, checkpoint))

    def check_loaded(self, missing: Sequence[str], unexpected: Sequence[str]) -> None:
        """Hook, replacing the host's warning: names of missing and unknown tensors."""

    def _issue_warnings_after_load(self, load_result):
        self.check_loaded(load_result.missing_keys, load_result.unexpected_keys)


class DistillationHooks(HostHooks):
    """`HostHooks` of `trl.DistillationTrainer`."""

    def distillation_loss(self, student: Any, inputs: dict[str, Any], num_items: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Hook: loss of a micro-batch, Σ student entropy and number of positions.

        Called inside the student's forward.
        """
        raise NotImplementedError

    def reuses_rollouts(self) -> bool:
        """Hook: whether this optimizer step trains on the rollouts of the last one."""
        return False

    def divided_rollouts(self, rollouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Hook: the micro-batches to keep of those just sampled, the first step's first."""
        return rollouts

    def rollouts_sampled(self, rollouts: Sequence[dict[str, Any]]) -> None:
        """Hook: the micro-batches of the optimizer steps to come, called before each of them."""

    def reused_rollouts(self, rollouts: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
        """Hook: a micro-batch of a step that samples none, given the last sampled ones."""
        return rollouts[index]

    def upcoming_rollouts(self, rollouts: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Hook: the kept micro-batches of the steps to come, the next step's first."""
        return rollouts

    def _prepare_inputs(self, generation_batch):
        position, held = rollouts_in_use(self)
        place = position % self.args.gradient_accumulation_steps
        if self.model.training and held is not None and self.reuses_rollouts():
            return self.reused_rollouts(held, place)
        inputs = super()._prepare_inputs(generation_batch)
        _, rollouts = rollouts_in_use(self)
        if self.model.training and rollouts is not None:
            if rollouts is not held:
                rollouts = self.divided_rollouts(rollouts)
                use_rollouts(self, position, rollouts)
                inputs = rollouts[place]
            self.rollouts_sampled(rollouts)
        return inputs

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        return self.distillation_loss(unwrapped_student, inputs, num_items_in_batch)


class PolicyHooks(HostHooks):
    """`HostHooks` of `trl.GRPOTrainer` and `trl.RLOOTrainer`."""

    def around_policy_loss(self, inputs: dict[str, Any], compute: Callable[[], Tensor]) -> Tensor:
        """Hook: the loss of a micro-batch."""
        return compute()

    def _compute_loss(self, model, inputs):
        return self.around_policy_loss(inputs, partial(super()._compute_loss, model, inputs))

    def around_log_probs(self, model: Any, mask_BL: Tensor, compute: Callable[[], T]) -> T:
        """Hook: a forward pass of the policy or of its reference over prompts and answers."""
        return compute()

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, *args, **kwargs):
        host = super()._get_per_token_logps_and_entropies
        compute = partial(host, model, input_ids, attention_mask, *args, **kwargs)
        return self.around_log_probs(model, attention_mask, compute)
