"""Optimizers by class name: built from the flags, moved by a jump as a whole, restored exactly."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from helpers.optimizers import Averaging, Secret, SecretList
from helpers.tiny_models import make_model
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import SchedulerType

from effopd import OPDConfig
from effopd.common.schedules import reads_settings, reads_warm_up
from effopd.distill.optimizers.build import SmallModel, build_optimizer, tried
from effopd.distill.optimizers.combined import CombinedOptimizer, KStepLookahead, hidden_matrices
from effopd.errors import ConfigError, MissingDependencyError
from effopd.extrapolate import weight_copies
from effopd.extrapolate.weight_copies import (
    Family,
    carried,
    clear_state,
    evaluated,
    known_copies,
    refuse_unknown_copies,
    unknown_copies,
)
from effopd.launch.optimizer_checks import check_copies, check_optimizer


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(weight_copies.FAMILIES, "helpers", Family(state=("z",), counters=("k",)))


def config(**settings) -> OPDConfig:
    return OPDConfig(output_dir="unused", use_cpu=True, report_to="none", **settings)


def built(name, learning_rate=0.1, **arguments):
    """An optimizer of a small model after two steps, and the model's weights."""
    args = config(optimizer_class=name, optimizer_args=arguments or None, learning_rate=learning_rate)
    optimizer = tried(args, lambda model: build_optimizer(args, model, set()))
    return optimizer, weight_copies.parameters_of(optimizer)


def shifted(parameters, by=1.0):
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(by)


def values(parameters):
    return [parameter.detach().clone() for parameter in parameters]


# -- copies of the weights -------------------------------------------------------------------------


def test_evaluated_weights_are_the_average_and_the_trained_ones_return():
    optimizer, parameters = built("helpers.optimizers:Averaging")
    trained = values(parameters)
    average = [y + (y - optimizer.state[p]["z"]) / 9 for y, p in zip(trained, parameters, strict=True)]
    with evaluated(optimizer):
        torch.testing.assert_close(values(parameters), average)
        assert not all(map(torch.equal, values(parameters), trained))
        with evaluated(optimizer):  # nested: no second switch
            torch.testing.assert_close(values(parameters), average)
    assert all(map(torch.equal, values(parameters), trained))
    assert optimizer.param_groups[0]["train_mode"]


def test_a_jump_moves_average_base_and_trained_weights():
    optimizer, parameters = built("helpers.optimizers:Averaging")
    trained, base = values(parameters), [optimizer.state[p]["z"].clone() for p in parameters]
    with evaluated(optimizer):
        average = values(parameters)
    with carried(optimizer):
        assert all(map(torch.equal, values(parameters), average))
        shifted(parameters)
    with evaluated(optimizer):
        torch.testing.assert_close(values(parameters), [each + 1 for each in average])
    torch.testing.assert_close([optimizer.state[p]["z"] for p in parameters], [each + 1 for each in base])
    torch.testing.assert_close(values(parameters), [each + 1 for each in trained])


def test_without_a_jump_everything_returns_bit_for_bit():
    optimizer, parameters = built("helpers.optimizers:Averaging")
    before, state = values(parameters), copy.deepcopy(optimizer.state_dict())
    with carried(optimizer):
        pass
    with pytest.raises(KeyError), carried(optimizer):
        shifted(parameters)
        raise KeyError
    assert all(map(torch.equal, values(parameters), before))
    assert str(optimizer.state_dict()) == str(state)


def test_cleared_state_starts_again_at_the_accepted_point():
    optimizer, parameters = built("helpers.optimizers:Averaging")
    with carried(optimizer):
        shifted(parameters)
        accepted = values(parameters)
        clear_state(optimizer)
    assert all(map(torch.equal, values(parameters), accepted))
    assert not any(optimizer.state.values()) and optimizer.param_groups[0]["k"] == 0


@pytest.mark.parametrize(("kind", "name"), [(Secret, "origin"), (SecretList, "shadow")])
def test_unknown_copies_are_refused(kind, name):
    optimizer, _ = built(f"helpers.optimizers:{kind.__name__}")
    assert unknown_copies(optimizer) == [name]
    with pytest.raises(ConfigError, match=name), carried(optimizer):
        raise AssertionError
    args = config(optimizer_class=f"helpers.optimizers:{kind.__name__}", learning_rate=0.1)
    check_optimizer(args)  # without a look-ahead it trains
    with pytest.raises(ConfigError, match=name):
        check_copies(args, lora=False)


@pytest.mark.parametrize("average", ["none", "ema"])
def test_copies_of_lora_factors_are_refused(average):
    name = "helpers.optimizers:Averaging" if average == "none" else None
    with pytest.raises(ConfigError, match="LoRA"):
        check_copies(config(optimizer_class=name, average_weights=average), lora=True)
    check_copies(config(optimizer_class="torch.optim:AdamW"), lora=True)


def test_torch_optimizers_keep_no_copies():
    for name in ("AdamW", "SGD", "Adam", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop", "Adafactor", "Muon"):
        args = config(optimizer_class=f"torch.optim:{name}", learning_rate=0.1)
        if name == "ASGD":  # its averaged `ax` follows the weights
            continue
        optimizer = tried(args, lambda model, args=args: build_optimizer(args, model, set()))
        refuse_unknown_copies(optimizer)
        assert known_copies(optimizer) == [], name


PACKAGES = [
    ("prodigyopt:Prodigy", ["p0"], {}), ("prodigyopt:Prodigy", ["p0"], {"slice_p": 5}),
    ("schedulefree:AdamWScheduleFree", ["z"], {}), ("schedulefree:SGDScheduleFree", ["z"], {}),
    ("schedulefree:RAdamScheduleFree", ["z"], {}), ("dadaptation:DAdaptAdam", [], {}),
    ("dadaptation:DAdaptSGD", ["x0", "z"], {}), ("dadaptation:DAdaptAdaGrad", ["x0"], {}),
    ("dadaptation:DAdaptLion", [], {}), ("dog:DoG", ["init_buffer"], {}), ("dog:LDoG", ["init_buffer"], {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "copies", "arguments"), PACKAGES)
def test_packages(name, copies, arguments):
    pytest.importorskip(name.partition(":")[0])
    optimizer, parameters = built(name, 1.0, **arguments)
    assert (known_copies(optimizer), unknown_copies(optimizer)) == (copies, [])

    def held():
        every = arguments.get("slice_p", 1)
        for group in optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                flat = parameter.detach().flatten()[::every]
                yield from (
                    optimizer.state[parameter][key].flatten() - flat
                    for key in copies
                    if key in optimizer.state[parameter]
                )
                yield from (group[key][i].flatten() - flat for key in copies if key in group)

    before = list(held())
    assert bool(before) == bool(copies)
    with carried(optimizer):
        shifted(parameters)
    torch.testing.assert_close(list(held()), before, atol=1e-4, rtol=1e-4)  # distances stay
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    with carried(optimizer):
        shifted(parameters)
        clear_state(optimizer)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    assert all(bool(each.isfinite().all()) for each in parameters)


@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("average", [False, True])  # the mode in which the search comes
def test_a_search_returns_to_the_mode_that_it_found(jump, average):
    pytest.importorskip("schedulefree")
    optimizer, parameters = built("schedulefree:AdamWScheduleFree", 0.1)
    trained = values(parameters)
    if average:
        optimizer.eval()
    with carried(optimizer) as held:
        if jump:
            shifted(parameters)
    assert held == 2 * sum(each.nbytes for each in parameters)  # the trained weights and the average
    assert all(group["train_mode"] != average for group in optimizer.param_groups)
    optimizer.train()
    expected = [each + 1.0 * jump for each in trained]
    if jump or average:  # the modes differ by rounding
        torch.testing.assert_close(values(parameters), expected)
    else:
        assert all(map(torch.equal, parameters, expected))
    with evaluated(optimizer):
        pass
    assert all(group["train_mode"] for group in optimizer.param_groups)


# -- combined optimizers ---------------------------------------------------------------------------


def stepped(optimizer, parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model, other = make_model(0), make_model(0)
    names = hidden_matrices(model)
    assert len(names) == 2 * 7 and all(".layers." in name for name in names)
    args = config(
        optimizer_class="torch.optim:Muon", learning_rate=0.02, weight_decay=0.1, adam_beta2=0.95,
        optimizer_args={"momentum": 0.9, "adamw_lr_ratio": 0.5},
    )  # fmt: skip
    optimizer = build_optimizer(args, model, names)
    muon = torch.optim.Muon(
        [p for n, p in other.named_parameters() if n in names], lr=0.02, weight_decay=0.1, momentum=0.9
    )
    adamw = torch.optim.AdamW(
        [p for n, p in other.named_parameters() if n not in names], lr=0.01, weight_decay=0.0, betas=(0.9, 0.95)
    )
    for seed in range(2):
        stepped(optimizer, model.parameters(), seed)
        stepped(muon, (p for n, p in other.named_parameters()), seed)
        adamw.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert len(optimizer.state) == len(list(model.parameters()))
    _resumes(optimizer, model, lambda twin: build_optimizer(args, twin, names))


def _resumes(optimizer, model, build):
    """A loaded optimizer takes the same steps."""
    twin = copy.deepcopy(model)
    loaded = build(twin)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(7, 11):
        stepped(optimizer, model.parameters(), seed)
        stepped(loaded, twin.parameters(), seed)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_k_step_lookahead_follows_its_formula():
    model, plain = SmallModel(), SmallModel()
    optimizer = KStepLookahead(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), k=3, alpha=0.5)
    fast = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    slow = values(plain.parameters())
    for step in range(1, 8):
        stepped(optimizer, model.parameters(), step)
        stepped(fast, plain.parameters(), step)
        if step % 3 == 0:
            slow = [a + 0.5 * (b.detach() - a) for a, b in zip(slow, plain.parameters(), strict=True)]
            with torch.no_grad():
                for parameter, value in zip(plain.parameters(), slow, strict=True):
                    parameter.copy_(value)
        torch.testing.assert_close(values(model.parameters()), values(plain.parameters()))
    assert known_copies(optimizer) == ["slow_weights"] and not unknown_copies(optimizer)
    _resumes(
        optimizer, model, lambda twin: KStepLookahead(torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), 3, 0.5)
    )
    with pytest.raises(ConfigError, match="average of its own"):
        KStepLookahead(Averaging(model.parameters()), 5, 0.5)


def test_lookahead_around_muon_resumes():
    args = config(optimizer_class="torch.optim:Muon", learning_rate=0.02)

    def build(model):
        return KStepLookahead(build_optimizer(args, model, set()), 2, 0.5)

    model = make_model(0)
    optimizer = build(model)
    assert isinstance(optimizer.optimizers[0], CombinedOptimizer)
    for seed in range(3):
        stepped(optimizer, model.parameters(), seed)
    _resumes(optimizer, model, build)


# -- flags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer_class": "Prodigy"}, "MODULE:CLASS"),
        ({"optimizer_class": "torch.optim:AdamX"}, "subclass of torch.optim.Optimizer.*AdamW"),
        ({"optimizer_class": "torch:Tensor"}, "subclass of torch.optim.Optimizer"),
        ({"optimizer_class": "helpers.optimizers:NoRate"}, "'lr'"),
        ({"optimizer_class": "torch.optim:AdamW", "optim": "sgd"}, "no effect with optimizer_class"),
        ({"optimizer_class": "torch.optim:AdamW", "optim_args": "a=1"}, "no effect with optimizer_class"),
        ({"optimizer_class": "torch.optim:AdamW", "optimizer_args": {"lr": 1}}, "--learning_rate"),
        ({"optimizer_class": "torch.optim:AdamW", "optimizer_args": {"weight_decay": 1}}, "--weight_decay"),
        ({"optimizer_class": "torch.optim:AdamW", "optimizer_args": {"d0": 1}}, "no argument 'd0'.*betas"),
        ({"optimizer_class": "torch.optim:AdamW", "optimizer_args": '{"betas": [0.9, 2]}'}, "beta"),
        ({"optimizer_class": "torch.optim:SGD", "adam_beta2": 0.9}, "adam_beta2"),
        ({"optimizer_class": "torch.optim:Rprop", "weight_decay": 0.1}, "no weight decay"),
        ({"optimizer_class": "torch.optim:Muon", "optimizer_args": {"adamw_lr_ratio": 0}}, "adamw_lr_ratio"),
        ({"optimizer_class": "torch.optim:LBFGS"}, "closure"),
        ({"optimizer_args": {"d0": 1}}, "read only with optimizer_class"),
        ({"k_step_lookahead": 1}, "k_step_lookahead"),
        ({"k_step_lookahead_alpha": 0.8}, "k_step_lookahead"),
        ({"average_decay": 0.9}, "average_weights"),
        ({"average_weights": "ema", "average_lag": 5}, "average_weights=bema"),
        ({"average_weights": "ema", "optimizer_class": "helpers.optimizers:Averaging"}, "average of its own"),
        ({"k_step_lookahead": 5, "optimizer_class": "helpers.optimizers:Averaging"}, "average of its own"),
    ],
)
def test_wrong_flags(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_optimizer(config(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"warmup_steps": 2},
            "--warmup_steps 2: the schedule 'constant' has no warm-up. Set --lr_scheduler_type constant_with_warmup, "
            "or leave it out.",
        ),
        ({"warmup_steps": 0.1}, "--warmup_steps 0.1: the schedule 'constant'"),
        ({"warmup_steps": 2, "optim": "schedule_free_radam"}, "--warmup_steps 2: the schedule 'constant'"),
        (
            {"warmup_steps": 2, "optimizer_class": "schedulefree:AdamWScheduleFree"},
            "AdamWScheduleFree warms up by itself. Set --optimizer_args '{\"warmup_steps\": 2}', or leave it out.",
        ),
        (
            {"warmup_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            "the schedule 'reduce_lr_on_plateau' has no warm-up",
        ),
        (
            {"lr_scheduler_kwargs": {"a": 1}},
            "--lr_scheduler_kwargs {\"a\": 1}: the schedule 'constant' has no settings. Set another "
            "--lr_scheduler_type, or leave it out.",
        ),
        (
            {"lr_scheduler_kwargs": {"a": 1}, "lr_scheduler_type": "constant_with_warmup"},
            "'constant_with_warmup' has no settings",
        ),
    ],
)
def test_a_warm_up_or_setting_that_the_schedule_drops_is_refused(settings, message):
    if "schedule" in str(settings.get("optim")) + str(settings.get("optimizer_class")):
        pytest.importorskip("schedulefree")
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_optimizer(config(**settings))


@pytest.mark.parametrize("name", [each.value for each in SchedulerType])
def test_which_schedules_warm_up_is_what_transformers_does(name):
    args = config(
        lr_scheduler_type=name, warmup_steps=4, eval_strategy="steps",
        lr_scheduler_kwargs={"num_decay_steps": 1} if name == "warmup_stable_decay" else {"min_lr": 0.0}
        if "min_lr" in name else None,
    )  # fmt: skip
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    get_scheduler(name, optimizer, args.get_warmup_steps(10), 10, args.lr_scheduler_kwargs)
    assert (optimizer.param_groups[0]["lr"] < 1) == reads_warm_up(args)
    if reads_warm_up(args):
        check_optimizer(args)
    try:
        get_scheduler(name, optimizer, 4, 10, {"no_such": 1})
        dropped = True
    except TypeError:
        dropped = False
    assert dropped != reads_settings(args)


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam"])
def test_which_schedule_free_optimizers_warm_up_is_what_transformers_does(optim):
    pytest.importorskip("schedulefree")
    args = config(optim=optim, warmup_steps=4)
    _, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    assert ("warmup_steps" in settings) == reads_warm_up(args)


@pytest.mark.parametrize(("name", "package"), [("dog_missing:DoG", "dog-missing"), ("no_such.part:Adam", "no-such")])
def test_a_missing_package_is_named(name, package):
    with pytest.raises(MissingDependencyError, match=f"pip install '{package}'"):
        check_optimizer(config(optimizer_class=name))


@pytest.mark.parametrize(("name", "package"), [("dog:DoG", "dog-optimizer"), ("prodigyopt:Prodigy", "prodigyopt")])
def test_known_packages_are_named(name, package, monkeypatch):
    def missing(module):
        raise ImportError(module)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(MissingDependencyError, match=f"pip install '{package}'"):
        check_optimizer(config(optimizer_class=name))


def test_adam_settings_reach_the_class_and_its_own_defaults_stay():
    args = config(optimizer_class="torch.optim:AdamW", adam_beta2=0.95, weight_decay=0.1, learning_rate=0.3)
    group, other = build_optimizer(args, nn.Linear(2, 2), {"weight"}).param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.9, 0.95), 1e-8)
    assert (group["weight_decay"], other["weight_decay"]) == (0.1, 0.0)
