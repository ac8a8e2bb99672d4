"""Weights of a run to compare, an interruption, and searches that reject every candidate."""

from __future__ import annotations

import torch
from torch import nn
from transformers import TrainerCallback

from effopd import EffOPDCallback, EffOPDConfig
from helpers.tiny_models import make_task


def parameters(trainer) -> dict[str, torch.Tensor]:
    """Copies of the trained model's parameters by name."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(a, b) -> bool:
    """Whether two results of `parameters` are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


class Interrupt(TrainerCallback):
    """Ctrl-C after a step."""

    def __init__(self, step: int):
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            raise KeyboardInterrupt


def with_rejecting_search(trainer):
    """The trainer, with searches that score W, then a worse candidate."""
    calls = []

    def scorer(model):
        calls.append(1)
        return -float(len(calls))

    config = EffOPDConfig(parameters="all", args={"scales": [2.0]})
    trainer.add_callback(EffOPDCallback(trainer, config, scorer=scorer, task=make_task(64)))
    return trainer


class Regression(nn.Module):
    """A linear model of four inputs with its squared error, for `transformers.Trainer`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}
