"""Averages of the weights: their formulas, and runs that evaluate them and resume exactly."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer
from helpers.tiny_run import make_trainer
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from trl.trainer.callbacks import BEMACallback

from effopd import EffOPDConfig, OPDConfig, OPDTrainer
from effopd.distill.optimizers.averages import AVERAGE_FILE, WeightAverage
from effopd.distill.optimizers.mixin import TRAINED_FILE
from effopd.distill.optimizers.settings import saved_copies
from effopd.errors import CheckpointError, ConfigError
from effopd.extrapolate import weight_copies
from effopd.extrapolate.weight_copies import Family


class Line(nn.Module):
    """A model as TRL's callback copies it."""

    def __init__(self, config=None):
        super().__init__()
        self.config, self.weight = config, nn.Parameter(torch.arange(4.0))


def walk(model, average, steps=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            model.weight.add_(torch.randn(4, generator=generator))
        average.update()
        yield


def test_ema_is_its_sum():
    model = Line()
    average = WeightAverage({"weight": model.weight}, decay=0.75)
    mean = model.weight.detach().clone()
    for _ in walk(model, average):
        mean = 0.75 * mean + 0.25 * model.weight.detach()
        torch.testing.assert_close(average.value("weight"), mean)


def test_bema_equals_trls():
    model = Line()
    average = WeightAverage({"weight": model.weight}, bias_corrected=True, decay=0.999)
    theirs = BEMACallback(update_freq=1, min_ema_multiplier=1 - 0.999)
    theirs.on_train_begin(None, None, None, model)
    for step, _ in enumerate(walk(model, average), start=1):
        theirs.on_step_end(None, SimpleNamespace(global_step=step), None, model)
        torch.testing.assert_close(average.value("weight"), theirs.running_model.weight.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("bias_corrected", [False, True])
def test_in_place_translated_and_saved(tmp_path, bias_corrected):
    model = Line()
    average = WeightAverage({"weight": model.weight}, bias_corrected=bias_corrected)
    list(walk(model, average))
    trained, mean = model.weight.detach().clone(), average.value("weight").clone()
    with average.in_place(), average.in_place():
        torch.testing.assert_close(model.weight.detach(), mean)
    assert torch.equal(model.weight, trained)

    average.save(tmp_path)
    other = WeightAverage({"weight": model.weight}, bias_corrected=bias_corrected)
    other.load(tmp_path)
    assert torch.equal(other.value("weight"), average.value("weight")) and other.step == average.step
    with pytest.raises(CheckpointError):
        WeightAverage({"bias": model.weight}, bias_corrected=bias_corrected).load(tmp_path)

    change = torch.ones(4)
    with torch.no_grad():
        model.weight.add_(change)
    average.translate(model.weight, change)
    torch.testing.assert_close(average.value("weight"), mean + 1)


def test_the_best_model_is_an_average():
    settings = {
        "output_dir": "unused", "average_weights": "ema", "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2,
        "use_cpu": True, "report_to": "none",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"save_average=False with load_best_model_at_end=True: .*Leave one out"):
        OPDConfig(**settings, save_average=False, load_best_model_at_end=True)
    OPDConfig(**settings, load_best_model_at_end=True)
    OPDConfig(**settings, save_average=False)


# -- runs ------------------------------------------------------------------------------------------

RUNS = {
    "schedule-free": {
        "optimizer_class": "helpers.optimizers:Averaging", "learning_rate": 0.05,
        "effopd": EffOPDConfig("line_search", score_rollouts=8, reset_moments=False),
    },
    "bema": {"average_weights": "bema"},
}  # fmt: skip


class Watch(TrainerCallback):
    """Weights of each step: trained, sampled from, evaluated."""

    def __init__(self, trainer):
        self.trained, self.sampled, self.measured = [], [], []
        self.trainer = trainer
        measure, turn = trainer._measure_task, trainer.around_turn

        def measured(task):
            self.measured.append(self.now())
            return measure(task)

        def sampled(generate, prompts, *, multimodal):
            self.sampled.append(self.now())
            return turn(generate, prompts, multimodal=multimodal)

        trainer._measure_task, trainer.around_turn = measured, sampled
        trainer.add_callback(self)

    def now(self):
        return torch.cat([each.detach().flatten().clone() for each in self.trainer.model.parameters()])

    def on_step_end(self, args, state, control, **kwargs):
        self.trained.append(self.now())


def run(root, *, resume=None, **settings):
    torch.manual_seed(0)
    defaults = {"eval_steps": 1, "max_steps": 3, "save_total_limit": None, "health_tokens": 0, "eval_greedy": False}
    trainer = make_trainer(root, **(defaults | settings))
    watch = Watch(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


@pytest.fixture(scope="module", params=list(RUNS))
def whole(request, tmp_path_factory):
    """A run with evaluations and checkpoints, the same run without them, and a resumed one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(weight_copies.FAMILIES, "helpers", Family(state=("z",), counters=("k",)))
        root, settings = tmp_path_factory.mktemp(request.param), RUNS[request.param]
        watched = run(root / "a", **settings)
        quiet = run(root / "b", **settings, eval_strategy="no", save_strategy="no")
        resumed = run(root / "a2", **settings, resume=str(root / "a/checkpoints/step-000002"))
        yield request.param, root, watched, quiet, resumed


@pytest.mark.slow
def test_evaluating_and_saving_leaves_training_as_it_was(whole):
    _, _, (_, watched), (_, quiet), _ = whole
    assert all(map(torch.equal, watched.trained, quiet.trained))


@pytest.mark.slow
def test_a_resumed_run_is_the_same(whole):
    _, _, (trainer, watched), _, (again, resumed) = whole
    assert all(map(torch.equal, watched.trained[2:], resumed.trained))
    assert all(map(torch.equal, watched.measured[2:], resumed.measured[-2:]))
    assert all(map(torch.equal, trainer.model.parameters(), again.model.parameters()))


@pytest.mark.slow
def test_evaluations_rollouts_and_files_have_the_average(whole):
    name, root, (trainer, watched), _, _ = whole
    measured = watched.measured[-3:]
    assert not any(map(torch.equal, measured[1:], watched.trained[1:]))  # after step 1, x = y = z
    sampled = watched.sampled[-2:]  # for steps 2 and 3: the weights after steps 1 and 2
    assert all(map(torch.equal, sampled, measured if name == "schedule-free" else watched.trained))
    final = torch.cat([each.detach().flatten() for each in trainer.model.parameters()])
    assert torch.equal(final, measured[-1])
    checkpoint = root / "a/checkpoints/step-000002"
    files = load_file(checkpoint / "model.safetensors"), load_file(checkpoint / TRAINED_FILE)
    for file, weights in zip(files, (measured[1], watched.trained[1]), strict=True):
        assert torch.equal(torch.cat([file[n].flatten() for n, _ in trainer.model.named_parameters()]), weights)
    if name == "schedule-free":
        look_ahead = next(each for each in trainer.callback_handler.callbacks if hasattr(each, "look_ahead"))
        assert any(record.accepted_scale for record in look_ahead.look_ahead.history)


# -- a finished run that is resumed ----------------------------------------------------------------

SHORT = {"max_steps": 2, "eval_strategy": "no"}


@pytest.mark.slow
@pytest.mark.parametrize("only_model", [False, True])
@pytest.mark.parametrize(
    "settings",
    [RUNS["schedule-free"] | {"effopd": None}, RUNS["bema"], RUNS["bema"] | {"save_average": False}],
    ids=["schedule-free", "bema", "bema, not saved"],
)
def test_a_finished_run_resumes_to_its_final_model(tmp_path, monkeypatch, settings, only_model):
    monkeypatch.setitem(weight_copies.FAMILIES, "helpers", Family(state=("z",), counters=("k",)))
    settings = SHORT | settings | {"save_only_model": only_model}
    trainer, watch = run(tmp_path / "a", **settings)
    held = [tmp_path / "a/checkpoints/step-000002" / name for name in (TRAINED_FILE, AVERAGE_FILE)]
    copies = sum(each.numel() for file in held if file.exists() for each in load_file(file).values())
    if "average_weights" in settings:
        assert copies == saved_copies(trainer.args) * watch.now().numel()
    ends_as_trained = torch.equal(watch.now(), watch.trained[-1])
    assert ends_as_trained == (not settings.get("save_average", True))
    for state in ("optimizer.pt", "nothing more"):  # with all that the checkpoint has, and without the optimizer's
        again, resumed = run(tmp_path / "a", **settings, resume=True)
        assert all(map(torch.equal, trainer.model.parameters(), again.model.parameters()))
        assert not resumed.trained
        (tmp_path / "a/checkpoints/step-000002" / state).unlink(missing_ok=True)


@pytest.mark.slow
def test_a_checkpoint_with_the_average_alone_is_refused(tmp_path):
    settings = SHORT | RUNS["bema"] | {"save_only_model": True}
    run(tmp_path / "a", **settings)
    assert not (tmp_path / "a/checkpoints/step-000002" / TRAINED_FILE).exists()
    with pytest.raises(CheckpointError, match=r"step-000002 has no trained_weights.*--save_average true"):
        run(tmp_path / "a", **settings, save_average=False, resume=True)


def test_a_trainer_that_was_given_an_optimizer_averages_too(tmp_path):
    trainer = given_optimizer(tmp_path, average_weights="ema")
    optimizer = trainer.create_optimizer()
    average = trainer.weight_average
    assert isinstance(optimizer, torch.optim.SGD) and isinstance(average, WeightAverage)
    assert trainer.create_optimizer() is optimizer and trainer.weight_average is average  # as in a second `train`


@pytest.mark.parametrize("setting", [{"k_step_lookahead": 2}, {"optimizer_class": "torch.optim:NAdam"}])
def test_settings_that_a_given_optimizer_would_ignore_are_refused(tmp_path, setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}=.* is not read, because the trainer was given"):
        given_optimizer(tmp_path, **setting)


def given_optimizer(folder, **settings):
    model = make_model(0)
    args = OPDConfig(output_dir=str(folder), report_to="none", use_cpu=True, eval_strategy="no", **settings)
    return OPDTrainer(
        model, make_model(1), args, make_task(16).to_dataset(), processing_class=make_tokenizer(),
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
    )  # fmt: skip
