"""No float64 where there is none: evaluations and look-aheads on a device like Apple's GPUs."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers.tiny_run import make_trainer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from effopd import EffOPDConfig
from effopd.common import float64 as precision
from effopd.common.files import read_rows
from effopd.errors import CompatibilityError
from effopd.extrapolate import rank_one
from effopd.extrapolate.observations import Observations

VALIDATED = {"validation_size": 8}
FITTED = {"every": 1, "until": 4}
RUNS = {
    "evaluation": (None, {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}),
    "line_search": (EffOPDConfig("line_search"), {}),
    "effopd": (EffOPDConfig("effopd", **VALIDATED), {}),
    "random_direction": (EffOPDConfig("random_direction", **VALIDATED), {}),
    "relex": (EffOPDConfig("relex", args=FITTED), {}),
    "alpha_opd": (EffOPDConfig("alpha_opd", args=FITTED | {"target": 0.9}, **VALIDATED), {}),
}


class NoFloat64(TorchDispatchMode):
    """Every tensor is on a device without float64, unless it is one that `Tensor.cpu` gave, made
    from one, or a literal.
    """

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        host = any(map(is_on_host, inputs)) or operator is torch.ops.aten.lift_fresh.default
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                if host:
                    tensor.on_host = True
                elif tensor.dtype == torch.float64:
                    raise TypeError(f"{operator} makes a float64 tensor on a device that has no float64")
        return out


def is_on_host(tensor):
    return getattr(tensor, "on_host", False)


@contextmanager
def device_without_float64():
    """The CPU stands in for it; what `Tensor.cpu` gives is on the host."""

    def to_host(tensor):
        copy = tensor.clone()
        copy.on_host = True
        return copy

    def leading_directions(delta, **kwargs):
        assert is_on_host(delta)
        with (
            _disable_current_modes()
        ):  # it makes its tensors on `delta.device`, which is the CPU's name in either case
            return decompose(delta, **kwargs)

    decompose = rank_one.leading_directions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_one, "leading_directions", leading_directions)
        patch.setattr(torch.Tensor, "cpu", to_host)
        patch.setattr(precision, "has_float64", lambda device: False)
        with NoFloat64():
            yield


def rows(folder, name):
    """Rows without what is measured by a clock."""

    def timeless(value):
        if isinstance(value, list):
            return [timeless(item) for item in value]
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if not k.endswith(("seconds", "runtime"))}
        return value

    return [timeless(row) for row in read_rows(folder / name)]


@pytest.mark.slow
@pytest.mark.parametrize("what", RUNS)
def test_runs_need_no_float64_on_the_device(tmp_path, what):
    config, settings = RUNS[what]

    def train(name):
        common = {"max_steps": 5, "save_strategy": "no", "eval_strategy": "no"}
        trainer = make_trainer(tmp_path / name, effopd=config, **common | settings)
        trainer.train()
        return trainer.model.state_dict()

    expected = train("with")
    with device_without_float64():
        found = train("without")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    file = "evals.jsonl" if config is None else "searches.jsonl"
    assert rows(tmp_path / "without", file) == rows(tmp_path / "with", file) != []
    with NoFloat64(), pytest.raises((TypeError, CompatibilityError), match="no float64"):  # so the stand-in notices
        train("caught")


def test_which_devices_have_it():
    assert precision.has_float64("cpu") and precision.has_float64(torch.device("cuda:1"))
    assert not precision.has_float64("mps") and not precision.has_float64(torch.device("mps:0"))
    tensor = torch.ones(2)
    assert precision.for_float64(tensor) is tensor


def test_observations_keep_float64_scalars_off_a_device_without_it(monkeypatch):
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: moved.append(tensor.dtype) or tensor)
    kept = {"weight": {"u": torch.ones(3), "s1_norm": torch.ones(2, dtype=torch.float64)}}
    Observations().add(2, kept, None, "mps")
    assert moved == [torch.float32]
