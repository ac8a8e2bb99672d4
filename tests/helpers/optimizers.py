"""Small optimizers that keep copies of the weights, in place of packages that are not installed."""

from __future__ import annotations

import torch


class Averaging(torch.optim.Optimizer):
    """Schedule-free SGD: base sequence z, average x, trained at y = x + 0.1 (z − x)."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": 0, "train_mode": False})

    def _switch(self, weight):
        for group in self.param_groups:
            for parameter in group["params"]:
                if "z" in self.state[parameter]:
                    parameter.lerp_(self.state[parameter]["z"], weight)

    @torch.no_grad()
    def eval(self):
        if self.param_groups[0]["train_mode"]:
            self._switch(1 - 1 / 0.9)
        self._mark(False)

    @torch.no_grad()
    def train(self):
        if not self.param_groups[0]["train_mode"]:
            self._switch(1 - 0.9)
        self._mark(True)

    def _mark(self, mode):
        for group in self.param_groups:
            group["train_mode"] = mode

    @torch.no_grad()
    def step(self, closure=None):
        assert self.param_groups[0]["train_mode"]
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                z = self.state[parameter].setdefault("z", parameter.detach().clone())
                parameter.lerp_(z, 1 - 1 / 0.9)  # x
                z.sub_(parameter.grad, alpha=group["lr"])
                parameter.lerp_(z, 1 / group["k"]).lerp_(z, 0.1)


class Secret(torch.optim.SGD):
    """SGD that keeps the initial weights where no one looks for them."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("origin", parameter.detach().clone())
        return super().step(closure)


class SecretList(torch.optim.SGD):
    """The same in an attribute."""

    def step(self, closure=None):
        if not hasattr(self, "shadow"):
            self.shadow = [parameter.detach().clone() for group in self.param_groups for parameter in group["params"]]
        return super().step(closure)


class NoRate(torch.optim.Optimizer):
    """An optimizer without a learning rate."""

    def __init__(self, params):
        super().__init__(params, {})
