"""OPDTrainer: objective, equality with TRL, costs, evaluation, run directory."""

from __future__ import annotations

import json

import pytest
from helpers.tiny_models import make_model, make_task, make_tokenizer
from helpers.tiny_run import make_trainer
from helpers.traces import parameters, same
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from effopd import EffOPDConfig, OPDConfig, OPDTrainer
from effopd.common.files import read_rows
from effopd.distill.teachers.manifest import ManifestCallback
from effopd.errors import CompatibilityError, ConfigError
from effopd.runs.ledger import CATEGORIES
from effopd.runs.run_dir import in_trajectory
from effopd.runs.writer import RunDirCallback
from effopd.tasks.prompts import prompt_ids

pytestmark = pytest.mark.slow


FAST = {"max_steps": 3, "save_strategy": "no", "eval_strategy": "no"}


def test_defaults_are_trl_bit_for_bit(tmp_path):
    """Loss `full` without any of our options trains exactly like the host."""
    ours = make_trainer(tmp_path / "ours", **FAST)
    ours.train()
    shared = {
        "max_steps": 3, "per_device_train_batch_size": 8, "max_completion_length": 6, "learning_rate": 2e-3,
        "report_to": "none", "activation_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "bf16": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    theirs = DistillationTrainer(
        make_model(0), make_model(1), DistillationConfig(output_dir=str(tmp_path / "trl"), **shared),
        train_dataset=make_task(64).to_dataset(), processing_class=make_tokenizer(),
    )  # fmt: skip
    theirs.train()
    assert same(parameters(ours), parameters(theirs))


def test_measuring_does_not_disturb_training(tmp_path):
    """Evaluation, health metrics and trajectory change nothing in the weights."""
    plain = make_trainer(tmp_path / "a", **FAST, health_tokens=0)
    plain.train()
    settings = FAST | {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "trajectory": "powers_of_two"}
    weights = {0: dict(make_model(0).named_parameters())}
    measured = make_trainer(tmp_path / "b", **settings)

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights[state.global_step] = {name: p.detach().clone() for name, p in parameters(measured).items()}

    measured.add_callback(Record())
    measured.train()
    assert same(parameters(plain), parameters(measured))
    assert sorted(weights) == [0, 1, 2, 3] and not same(weights[1], weights[2])
    for step, expected in weights.items():
        assert same(load_file(tmp_path / "b" / "trajectory" / f"step-{step:06d}" / "model.safetensors"), expected)


@pytest.mark.parametrize(
    ("rule", "kept"), [("none", []), ("powers_of_two", [0, 1, 2, 4, 8, 10]), ("4", [0, 4, 8, 10]), ("1", range(11))]
)
def test_which_steps_a_trajectory_keeps(rule, kept):
    assert [step for step in range(11) if in_trajectory(rule, step, 10)] == list(kept)
    assert OPDConfig(trajectory=int(rule) if rule.isdecimal() else rule).trajectory == rule


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_a_teacher_equal_to_the_student_gives_zero_loss(tmp_path, loss):
    trainer = make_trainer(tmp_path, teacher=make_model(0), loss_type=loss, **(FAST | {"max_steps": 1}))
    trainer.train()
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert abs(row["loss"]) < 1e-6
    assert row["health/overlap_ratio"] == 1.0 and abs(row["health/reverse_kl"]) < 1e-6


def test_sampled_loss_learns(tmp_path):
    trainer = make_trainer(
        tmp_path, loss_type="sampled", max_steps=40, learning_rate=1e-2, save_strategy="no", eval_steps=40,
        eval_on_start=True, max_completion_length=4, num_train_epochs=20,
    )  # fmt: skip
    trainer.train()
    first, last = (row["eval_kl"] for row in read_rows(tmp_path / "evals.jsonl"))
    assert last < 0.8 * first


def test_gradient_accumulation_is_equivalent(tmp_path):
    """4 × 2 and 1 × 8 prompts a step: the same rollouts, gradients equal up to summation order."""
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path / str(size), **FAST | {"max_steps": 1}, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        (row,) = read_rows(tmp_path / str(size) / "metrics.jsonl")
        runs.append(row)
    assert runs[0]["loss"] == pytest.approx(runs[1]["loss"], rel=1e-5)
    assert runs[0]["grad_norm"] == pytest.approx(runs[1]["grad_norm"], rel=1e-4)
    assert runs[0]["cost/rollout_generated_tokens"] == runs[1]["cost/rollout_generated_tokens"] > 0


def test_teacher_is_frozen_and_padding_rows_are_tolerated(tmp_path):
    teacher = make_model(1, vocab_size=80)
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    trainer = make_trainer(tmp_path, teacher=teacher, **FAST)
    trainer.train()
    assert trainer.vocab_size == 64
    assert same(before, dict(teacher.named_parameters()))
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())


def test_rows_and_costs(tmp_path):
    trainer = make_trainer(tmp_path, **FAST | {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True})
    trainer.train()
    metrics, evals = list(read_rows(tmp_path / "metrics.jsonl")), list(read_rows(tmp_path / "evals.jsonl"))
    assert [row["step"] for row in metrics] == [1, 2, 3] and [row["step"] for row in evals] == [0, 2, 3]
    last = metrics[-1]
    parts = [last[f"cost/{c}_seconds"] for c in CATEGORIES]
    assert last["cost/net_seconds"] == pytest.approx(sum(parts) - last["cost/eval_seconds"])
    assert all(last[f"cost/{c}_seconds"] > 0 for c in ("rollout", "teacher", "update", "eval", "other"))
    assert last["cost/search_seconds"] == 0
    lengths = sum(8 * row["completions/mean_length"] for row in metrics)
    assert last["cost/rollout_generated_tokens"] == pytest.approx(lengths)
    assert last["cost/net_generated_tokens"] == last["cost/rollout_generated_tokens"]
    for name in ("health/reverse_kl", "health/overlap_ratio", "health/teacher_entropy", "loss", "grad_norm"):
        assert isinstance(last[name], float)
    assert last["health/reverse_kl"] == pytest.approx(last["loss"], rel=1e-4)  # all 48 tokens fit into the subset
    assert any(row.get("cost/net_seconds") and "health/reverse_kl" in row for row in trainer.state.log_history)
    row = evals[-1]
    assert row["eval_accuracy_low"] <= row["eval_accuracy"] <= row["eval_accuracy_high"]
    assert row["eval_loss"] == row["eval_kl"] > 0 and row["eval_kl_se"] > 0
    assert {"eval_accuracy_greedy", "eval_response_length", "eval_truncated_share", "cost/net_seconds"} <= row.keys()


def test_evaluation_is_repeatable_and_seeded(tmp_path):
    trainer = make_trainer(tmp_path, **FAST | {"eval_strategy": "steps", "eval_steps": 2})
    first, second = trainer.evaluate(), trainer.evaluate()
    first.pop("eval_runtime"), second.pop("eval_runtime")
    assert first == second
    assert trainer.model.training
    trainer.eval_task, trainer.ledger.forward_tokens["eval"] = trainer.eval_task.sample(1, 0), 0
    alone = trainer.evaluate()
    assert alone["eval_kl"] > 0 and "eval_kl_se" not in alone  # one answer has no standard error
    prompt = len(prompt_ids(make_tokenizer(), trainer.eval_task.examples[0].prompt))
    forwarded = 2 * (prompt + alone["eval_response_length"])  # of student and teacher
    assert trainer.ledger.forward_tokens["eval"] == forwarded


def test_a_compiled_run_measures_and_looks_ahead_like_a_plain_one(tmp_path):
    def run(name, **compiled):
        settings = FAST | {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True} | compiled
        trainer = make_trainer(tmp_path / name, effopd=EffOPDConfig("line_search"), **settings)
        trainer.train()
        return trainer, [list(read_rows(tmp_path / name / f"{kind}.jsonl")) for kind in ("evals", "searches")]

    (plain, (evals, searches)), (compiled, (evals_again, searches_again)) = (
        run("plain"),
        run("compiled", torch_compile=True, torch_compile_backend="eager"),
    )
    assert hasattr(compiled.teacher_model, "_orig_mod") and not hasattr(plain.teacher_model, "_orig_mod")
    for measure in ("eval_kl", "eval_accuracy", "eval_accuracy_greedy"):
        assert [row[measure] for row in evals] == pytest.approx([row[measure] for row in evals_again], rel=1e-4)
    scales = [[row["accepted_scale"] for row in rows] for rows in (searches, searches_again)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-3) and any(scales[0])


def test_best_model_and_rotation(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=8, eval_steps=2, save_steps=2, save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model="eval_kl", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    kept = [path.name for path in trainer.run_dir.checkpoints()]
    best = trainer.state.best_model_checkpoint
    assert best.endswith(f"step-{trainer.state.best_global_step:06d}") and best.split("/")[-1] in kept
    assert len(kept) <= 2
    saved = json.loads((trainer.run_dir.checkpoints()[-1] / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == best
    assert same(load_file(f"{best}/model.safetensors"), parameters(trainer))


@pytest.mark.parametrize(
    ("scripted", "kept"),
    [
        ({1: 1.0, 2: 0.5, 3: 0.1, 4: 1.0, 5: 1.0, 6: 1.0}, 2),
        ({1: 0.1, 2: 0.9, 3: 0.2, 4: 0.5, 5: 0.3, 6: 0.8}, 4),  # the best of those that can be gone back to
    ],
)
def test_the_best_step_is_the_best_of_those_that_were_saved(tmp_path, monkeypatch, scripted, kept):
    trainer = make_trainer(
        tmp_path, max_steps=6, eval_steps=1, save_steps=2, save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model="eval_kl", greater_is_better=False,
    )  # fmt: skip
    monkeypatch.setattr(trainer, "_measure_task", lambda task: ({"kl": scripted[trainer.state.global_step]}, 0))
    trainer.train()
    assert trainer.state.best_global_step == kept and trainer.kept == (kept, "eval_kl", scripted[kept])
    assert [path.name for path in trainer.run_dir.checkpoints()] == [f"step-{kept:06d}", "step-000006"]
    for checkpoint in trainer.run_dir.checkpoints():
        saved = json.loads((checkpoint / "trainer_state.json").read_text())
        assert saved["best_model_checkpoint"] == str(trainer.run_dir.checkpoint(kept))
    assert same(load_file(trainer.run_dir.checkpoint(kept) / "model.safetensors"), parameters(trainer))


def test_without_eval_task_evaluation_is_trls(tmp_path):
    args = OPDConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8, max_completion_length=4, use_cpu=True,
        report_to="none", disable_tqdm=True, eval_strategy="steps", eval_steps=1, save_strategy="no",
    )  # fmt: skip
    data = make_task(16).to_dataset()
    trainer = OPDTrainer(
        make_model(0), make_model(1), args, train_dataset=data, eval_dataset=data, processing_class=make_tokenizer()
    )
    trainer.train()
    (row,) = read_rows(tmp_path / "evals.jsonl")
    assert row["eval_loss"] > 0 and "eval_accuracy" not in row


@pytest.mark.parametrize("loss_type", ["full", "sampled"])
def test_trls_evaluation_leaves_training_as_it_was(tmp_path, loss_type):
    """Evaluations sample with random numbers of their own, the same at every step."""
    data, ends = make_task(16).to_dataset(), []
    for strategy in ("no", "steps"):
        args = OPDConfig(
            output_dir=str(tmp_path / strategy), max_steps=2, per_device_train_batch_size=8, max_completion_length=4,
            use_cpu=True, report_to="none", disable_tqdm=True, eval_strategy=strategy, eval_steps=1,
            save_strategy="no", learning_rate=1e-2, loss_type=loss_type,
        )  # fmt: skip
        trainer = OPDTrainer(
            make_model(0), make_model(1), args, train_dataset=data, eval_dataset=data,
            processing_class=make_tokenizer(),
        )  # fmt: skip
        trainer.train()
        ends.append(parameters(trainer))
    assert same(*ends)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_lora_students_train_and_evaluate(tmp_path):
    from peft import LoraConfig

    args = OPDConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8, max_completion_length=4, use_cpu=True,
        report_to="none", disable_tqdm=True, eval_strategy="steps", eval_steps=2, save_strategy="no",
        learning_rate=1e-2, eval_on_start=True,
    )  # fmt: skip
    task = make_task(16)
    trainer = OPDTrainer(
        make_model(0), make_model(1), args, train_dataset=task.to_dataset(), processing_class=make_tokenizer(),
        eval_task=task, peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    trainer.train()
    first, last = (row["eval_kl"] for row in read_rows(tmp_path / "evals.jsonl"))
    reference = make_trainer(tmp_path / "b", **FAST)
    assert first != last and first == pytest.approx(reference.evaluate()["eval_kl"], rel=0.2)


def test_refusals(tmp_path):
    student = make_model(0)
    with pytest.raises(ConfigError, match="the student object itself"):
        OPDTrainer(student, student, OPDConfig(output_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="got none"):
        OPDTrainer(student, None, OPDConfig(output_dir=str(tmp_path)))
    with pytest.raises(CompatibilityError, match="the teacher has 40 vocabulary rows"):
        make_trainer(tmp_path, teacher=make_model(1, vocab_size=40), **FAST)


@pytest.mark.parametrize(
    "bad",
    [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.1}, {"beta": 0.5}],
)
def test_the_sampled_loss_refuses_filtered_samplers(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        OPDConfig(loss_type="sampled", **bad)
    OPDConfig(loss_type="full", **bad)


def test_the_sampled_loss_needs_log_probs_at_its_own_temperature():
    server = {"loss_type": "sampled", "use_vllm": True, "vllm_mode": "server"}
    OPDConfig(**server)
    OPDConfig(**server | {"vllm_mode": "colocate"}, temperature=0.7)
    with pytest.raises(ConfigError, match=r"temperature=0\.7"):
        OPDConfig(**server, temperature=0.7)


@pytest.mark.parametrize(
    "bad",
    [
        {"loss_type": "x"},
        {"trajectory": "x"},
        {"trajectory": "0"},
        {"trajectory": "2.5"},
        {"health_tokens": -1},
        {"loss_weighting": "x"},
        {"max_completion_length": 0},
        {"push_to_hub": True},
    ],
)
def test_bad_settings_name_the_field(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        OPDConfig(**bad)


def test_set_up_is_not_charged(tmp_path, monkeypatch):
    """The clock stands still except in what callbacks do when training begins."""
    now = [0.0]

    class Slow(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            now[0] += 100

    trainer = make_trainer(tmp_path, max_steps=1)
    monkeypatch.setattr(trainer.ledger, "_clock", lambda: now[0])
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RunDirCallback | ManifestCallback):
            begin = callback.on_train_begin

            def slow(*arguments, begin=begin, **keywords):
                now[0] += 100
                begin(*arguments, **keywords)

            monkeypatch.setattr(callback, "on_train_begin", slow)
    trainer.add_callback(Slow())
    trainer.train()
    assert now[0] == 300 and sum(trainer.ledger.seconds.values()) == 0
