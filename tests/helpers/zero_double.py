"""Doubles of DeepSpeed's ZeRO optimizers: the parts that `effopd.common.zero` uses, laid out as
DeepSpeed lays them out, for one rank at a time and without processes.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import torch

from effopd.common import zero as zero_module
from effopd.extrapolate import live_weights


def fake_deepspeed(monkeypatch) -> None:
    """Install the functions of `deepspeed.utils`, which call the optimizer of their parameter."""
    utils = ModuleType("deepspeed.utils")
    utils.safe_get_local_fp32_param = lambda p: p._z3_optimizer.get_local_fp32_param(p)
    utils.safe_get_local_optimizer_state = lambda p, key: p._z3_optimizer.get_local_fp32_param(p, key)
    utils.safe_get_local_grad = lambda p: p._z3_optimizer.get_local_fp32_grad_for_param(p)
    package = ModuleType("deepspeed")
    package.utils = utils
    monkeypatch.setitem(sys.modules, "deepspeed", package)
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)


def as_rank(monkeypatch, rank: int, ranks: int) -> None:
    """Let `effopd.common.zero` and the live weights think that this is a rank of several."""
    monkeypatch.setattr(zero_module, "rank", lambda: rank)
    for module in (zero_module, live_weights):
        monkeypatch.setattr(module, "world_size", lambda: ranks)
    monkeypatch.setattr(zero_module.dist, "get_world_size", lambda group=None: ranks if group is None else group)


class ZeroDouble:
    """ZeRO 1 or 2 (`stage` < 3) or ZeRO 3 of one rank.

    Args:
        model: this rank's model.
        rank, ranks: which of how many.
        shared: flat fp32 masters of all ranks, from another rank's double; `None`: from the model.
    """

    def __init__(self, model, stage: int, rank: int, ranks: int, shared: torch.Tensor | None = None):
        self.parameters = list(model.parameters())
        self.rank, self.ranks, self.empties, self.gathers = rank, ranks, 0, 0
        self.whole = [p.detach().float().flatten() for p in self.parameters]
        self.starts = [sum(w.numel() for w in self.whole[:i]) for i in range(len(self.whole))]
        total = sum(w.numel() for w in self.whole)
        (self._lay_out3 if stage == 3 else self._lay_out)(-(-total // ranks), shared)
        self.optimizer = torch.optim.AdamW([torch.nn.Parameter(self.partition)], lr=0.1)
        self.optimizer.param_groups[0]["params"][0].data = self.partition

    @property
    def flat(self) -> torch.Tensor:
        return self.optimizer.param_groups[0]["params"][0]

    def take(self, gradients: list[torch.Tensor]) -> None:
        """Adam's step on this rank's part of whole gradients."""
        self.gradient = torch.zeros_like(self.partition)
        self.gradients = [g.flatten() for g in gradients]
        for index, (first, last, place) in enumerate(self.places):
            self.gradient[place : place + last - first] = self.gradients[index][first:last]
        self.step()

    def step(self) -> None:
        self.flat.grad = self.gradient.clone()
        self.optimizer.step()
        self.flat.grad = None

    # -- stages 1 and 2: one range of all parameters per rank

    def _lay_out(self, each: int, shared) -> None:
        self.shared = torch.cat([*self.whole, torch.zeros(each * self.ranks)])[: each * self.ranks]
        self.shared = self.shared if shared is None else shared
        low, high = each * self.rank, each * (self.rank + 1)
        self.partition = self.shared[low:high]
        self.bit16_groups, self.places, index = [self.parameters], [], 0
        for parameter, start in zip(self.parameters, self.starts, strict=True):
            first, last = max(low - start, 0), min(high - start, parameter.numel())
            parameter._dp_group, parameter._hp_mapping = None, None
            self.places.append((first, max(last, first), max(start + first - low, 0)))
            if first < last:
                address = SimpleNamespace(start=first, numel=last - first)
                parameter._hp_mapping = _Fragment(self, address, start + first - low)
                parameter._index_in_param_group, index = index, index + 1
            else:
                self.places[-1] = (0, 0, 0)

    def update_lp_params(self) -> None:
        with torch.no_grad():
            for parameter, start in zip(self.parameters, self.starts, strict=True):
                parameter.copy_(self.shared[start : start + parameter.numel()].view_as(parameter))

    # -- stage 3: a part of every parameter per rank, padded

    def _lay_out3(self, _each: int, _shared) -> None:
        self.fp16_groups, self.places, parts, place = [self.parameters], [], [], 0
        self.persistent_parameters = [self]
        for index, (parameter, whole) in enumerate(zip(self.parameters, self.whole, strict=True)):
            size = -(-whole.numel() // self.ranks)
            first, last = min(self.rank * size, whole.numel()), min((self.rank + 1) * size, whole.numel())
            part = torch.full([size], torch.nan)  # DeepSpeed does not initialize padding
            part[: last - first] = whole[first:last]
            parameter.ds_id, parameter.ds_shape, parameter.ds_process_group = index, parameter.shape, None
            parameter.ds_tensor, parameter._z3_optimizer = part.to(parameter.dtype), self
            self.places.append((first, last, place))
            parts.append(part)
            place += size
            parameter.data = torch.empty(0, dtype=parameter.dtype)
        self.partition = torch.cat(parts)

    def _part3(self, parameter, flat: torch.Tensor) -> torch.Tensor:
        return flat.narrow(0, self.places[parameter.ds_id][2], parameter.ds_tensor.numel())

    def get_local_fp32_param(self, parameter, key: str | None = None) -> torch.Tensor:
        return self._part3(parameter, self.flat if key is None else self.optimizer.state[self.flat][key])

    def get_local_fp32_grad_for_param(self, parameter) -> torch.Tensor:
        return self._part3(parameter, self.gradient)

    def empty_partition_cache(self) -> None:
        self.empties += 1

    def all_gather(self, _parameters) -> None:
        self.gathers += 1


class _Fragment:
    def __init__(self, zero: ZeroDouble, address, place: int):
        self.zero, self.lp_fragment_address, self.place = zero, address, place

    def get_hp_fragment(self, key: str | None = None) -> torch.Tensor:
        flat = self.zero.flat if key is None else self.zero.optimizer.state[self.zero.flat][key]
        return flat.narrow(0, self.place, self.lp_fragment_address.numel)

    def get_lp_grad_fragment(self, index: int) -> torch.Tensor:
        held = [(i, place) for i, place in enumerate(self.zero.places) if place[0] < place[1]]
        first, last, _ = held[index][1]
        return self.zero.gradients[held[index][0]][first:last]
