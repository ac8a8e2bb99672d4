"""`OptimizerMixin`: the trainer's optimizer, and evaluation and saving at averaged weights.

Three sets of weights can differ: those that are trained, those that sample the rollouts, and those
that are evaluated and saved.

| optimizer | trained | rollouts | evaluated and saved |
|---|---|---|---|
| schedule-free | y | average x; y for a policy-gradient loss | average x |
| any, with `average_weights` | θ | θ | average |
| any other | θ | θ | θ |
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME

from effopd.common.zero import base_optimizer
from effopd.distill.optimizers.averages import WeightAverage, read_tensors, write_tensors
from effopd.distill.optimizers.build import build_optimizer, wrapped
from effopd.distill.trl_host.hooks import OPTIMIZER, HostHooks
from effopd.errors import CheckpointError, ConfigError
from effopd.extrapolate.weight_copies import evaluated, has_modes, kept

#: Trained weights in a checkpoint whose model file holds the evaluated ones.
TRAINED_FILE = "trained_weights.safetensors"


class AverageCallback(TrainerCallback):
    """Updates the trainer's weight average after every optimizer step, before any search."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._trainer.weight_average is not None:
            self._trainer.weight_average.update()


class OptimizerMixin(HostHooks):
    """The part of `RunMixin` that builds the optimizer and places the weights to evaluate.

    Attributes:
        weight_average: the average of `average_weights`; `None`: none, or training has not begun.
    """

    optimizer: Any
    weight_average: WeightAverage | None = None
    #: Whether the model has the evaluated weights for good.
    _settled = False

    def create_optimizer(self, model=None):
        """Build the optimizer of the settings, unless the trainer was given one, and the average of
        the weights; `optim` is the host's.
        """
        if self.optimizer is None:
            self._build_optimizer(model)
        self._open_average()
        return self.optimizer

    def _build_optimizer(self, model: Any) -> None:
        args: Any = self.args
        target = self.model if model is None else model
        if args.optimizer_class is None:
            super().create_optimizer(model)
        else:
            self._refuse_sharded(f"optimizer_class={args.optimizer_class!r}")
            self.optimizer = build_optimizer(args, target, set(self.get_decay_parameter_names(target)))
        self.optimizer = wrapped(self.optimizer, args)

    def _open_average(self) -> None:
        args: Any = self.args
        for given, name in (
            (args.k_step_lookahead, "k_step_lookahead"),
            (args.average_weights != "none", "average_weights"),
            (has_modes(self.optimizer), "a schedule-free optimizer"),
        ):
            if given:
                self._refuse_sharded(name)
        if args.average_weights != "none" and self.weight_average is None:
            self.weight_average = self._new_average()

    def _check_given_optimizer(self) -> None:
        """Check the settings against an optimizer that was passed to the trainer.

        Raises:
            ConfigError: a setting builds or wraps an optimizer, and would not be read.
        """
        for name in ("optimizer_class", "k_step_lookahead") if self.optimizer is not None else ():
            if value := getattr(self.args, name):
                raise ConfigError(
                    f"{name}={value!r} is not read, because the trainer was given an optimizer (optimizers=…). Leave "
                    "out one of the two."
                )

    def _new_average(self) -> WeightAverage:
        args = self.args
        if has_modes(self.optimizer):
            raise average_refused(args.average_weights, type(self.optimizer).__name__)
        return WeightAverage(
            self._trained(), bias_corrected=args.average_weights == "bema", decay=args.average_decay,
            power=args.average_power, bias_power=args.average_bias_power, lag=args.average_lag,
        )  # fmt: skip

    def _refuse_sharded(self, what: str) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                f"{what} needs whole weights on every process: expected one process or DDP, got "
                f"{'FSDP' if self.is_fsdp_enabled else 'DeepSpeed'}. Use --optim adamw_torch without averages, or "
                "launch with accelerate launch --multi_gpu."
            )

    def _trained(self) -> dict[str, Tensor]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: each for name, each in model.named_parameters() if each.requires_grad}

    # -- weights -----------------------------------------------------------------------------------

    def at_evaluated_weights(self) -> AbstractContextManager[None]:
        """Block in which the model has the weights to evaluate and to save.

        Afterwards the trained weights return bit for bit.
        """
        if self._settled or self.optimizer is None:
            return nullcontext()
        return evaluated(self.optimizer) if self.weight_average is None else self.weight_average.in_place()

    def at_sampling_weights(self) -> AbstractContextManager[None]:
        """Block in which the model has the weights that sample training rollouts."""
        on_policy = getattr(self.args, "loss_type", None) != "full"  # a policy gradient needs y ~ the trained policy
        if self._settled or self.optimizer is None or on_policy:
            return nullcontext()
        return evaluated(self.optimizer)

    def settle(self) -> None:
        """Leave the model at the weights to save, after training."""
        if not self._settled and self.optimizer is not None:
            if self.weight_average is not None:
                if self._ends_at_average:
                    self.weight_average.settle()
            elif has_modes(self.optimizer):
                self.optimizer.eval()
        self._settled = True

    def around_best_model(self, load):
        super().around_best_model(load)  # a checkpoint's model file holds the evaluated weights
        if has_modes(self.optimizer):
            with kept(self._trained().values()):
                self.optimizer.eval()
        self._settled = True

    # -- checkpoints -------------------------------------------------------------------------------

    @property
    def _differs(self) -> bool:
        """Whether the trained weights differ from those of a checkpoint's model file."""
        return self.weight_average is not None or (self.optimizer is not None and has_modes(self.optimizer))

    @property
    def _ends_at_average(self) -> bool:
        """Whether the final model has the evaluated weights, as a checkpoint's model file does."""
        return self.weight_average is None or self.args.save_average

    def save_trained(self, folder: Path) -> None:
        """Write the trained weights and the average into a checkpoint, on the rank that saves.

        With `save_only_model`, only trained weights that can become the final model are written.
        """
        state = not self.args.save_only_model
        if self._differs and self.args.should_save and (state or not self._ends_at_average):
            write_tensors(folder / TRAINED_FILE, self._trained(), {})
            if state and self.weight_average is not None:
                self.weight_average.save(folder)

    def around_load(self, part, checkpoint, load):
        super().around_load(part, checkpoint, load)
        if part == OPTIMIZER and checkpoint is not None and self._differs:
            self._load_trained(Path(checkpoint))

    def _load_trained(self, checkpoint: Path) -> None:
        if not (checkpoint / OPTIMIZER_NAME).is_file():  # the last step of a finished run, saved without state
            self._settled = True
            if not self._ends_at_average:
                self._set_trained(checkpoint)
            return
        if self.weight_average is not None:
            self.weight_average.load(checkpoint)
        else:
            base_optimizer(self.optimizer).train()
        self._set_trained(checkpoint)

    @torch.no_grad()
    def _set_trained(self, checkpoint: Path) -> None:
        if not (checkpoint / TRAINED_FILE).is_file():
            raise CheckpointError(
                f"{checkpoint} has no {TRAINED_FILE}: expected the trained weights, which its model file does not "
                "hold in a run with average_weights or a schedule-free optimizer. Resume from another checkpoint"
                + ("." if self._ends_at_average else ", or with --save_average true to end with its average.")
            )
        parameters = self._trained()
        tensors, _ = read_tensors(checkpoint / TRAINED_FILE, set(parameters))
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def average_refused(average: str, optimizer: str) -> ConfigError:
    """The error for two averages at once."""
    return ConfigError(
        f"average_weights={average!r}: {optimizer} evaluates an average of its own weights. Leave out one of the two."
    )
