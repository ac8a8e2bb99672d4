"""Several teachers: loss, score and held-out KL of each row are those of its teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer
from helpers.tiny_run import make_trainer

from effopd import EffOPDConfig, OPDConfig, OPDTrainer
from effopd.common.files import read_rows
from effopd.distill.divergence import reverse_kl_of_completions
from effopd.distill.scoring import TrainedDivergence, token_batch
from effopd.distill.teachers.divergence import DivergenceByTeacher
from effopd.distill.teachers.manifest import live_sha256, read_manifest
from effopd.distill.teachers.settings import given_teachers
from effopd.distill.teachers.several import TeacherSet, check_task_labels, kl_sums_by_teacher
from effopd.errors import CheckpointError, ConfigError, TaskError
from effopd.extrapolate.live_weights import LiveWeights
from effopd.tasks.row_faults import ORIGIN

FAST = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no"}
#: Teachers of different widths: hidden states of one cannot be taken for those of the other.
WIDTH = {"math": 16, "code": 24}


def teachers():
    return {"math": make_model(1), "code": make_model(2, hidden=WIDTH["code"])}


def labeled(labels, size=64):
    """The letters task, with the label of each row in its metadata."""
    task = make_task(size)
    examples = [replace(e, metadata={"teacher": labels[i % len(labels)]}) for i, e in enumerate(task.examples)]
    return task.subset(examples)


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("settings", [{}, {"loss_type": "teacher_top_k", "teacher_top_k": 4}])
def test_rows_that_all_name_one_teacher_train_as_with_it_alone(tmp_path, settings):
    runs = []
    for name, teacher, task in (("one", make_model(1), make_task(64)), ("two", teachers(), labeled(["math"]))):
        trainer = make_trainer(tmp_path / name, teacher=teacher, task=task, **FAST, **settings)
        trainer.train()
        runs.append(trainer)
    assert equal(*map(weights, runs))
    rows = [list(read_rows(tmp_path / name / "metrics.jsonl")) for name in ("one", "two")]
    for one, two in zip(*rows, strict=True):
        for key in (key for key in one if key == "loss" or key.startswith("health/")):
            assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6, nan_ok=True), key


def rollouts(rows=6):
    """A batch as the host hands it to the loss: rows of unequal length, and their teachers."""
    torch.manual_seed(3)
    prompt = torch.randint(4, 40, (rows, 5))
    answer = torch.randint(4, 40, (rows, 6))
    mask = torch.ones(rows, 6, dtype=torch.long)
    mask[1, 4:], mask[4, 2:] = 0, 0
    return {
        "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": answer,
        "completion_mask": mask, "teacher_index": torch.tensor([1, 0, 1, 1, 0, 1])[:rows],
    }  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    made = make_trainer(tmp_path_factory.mktemp("run"), teacher=teachers(), task=labeled(["math", "code"]), **FAST)
    made.health = type(made.health)(0, 1.0)
    return made


def gradient(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("weighting", ["token", "answer"])
def test_the_gradient_is_that_of_the_mixture_computed_by_hand(trainer, weighting, monkeypatch):
    """Σ over rows of KL(student ‖ own teacher), from dense logits, over the items of the batch."""
    batch, pair = rollouts(), teachers()
    monkeypatch.setattr(trainer.args, "loss_weighting", weighting)
    monkeypatch.setattr(trainer.model, "training", False)
    items = int((batch["completion_mask"].sum(1) > 0).sum()) if weighting == "answer" else int(
        batch["completion_mask"].sum()
    )  # fmt: skip
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    total = 0.0
    for row, index in enumerate(batch["teacher_index"].tolist()):
        own = pair[sorted(pair)[index]].eval()
        logp, logq = (
            model(ids[row : row + 1], attention_mask=mask[row : row + 1]).logits[0, 4:-1, :].log_softmax(-1)
            for model in (trainer.model, own)
        )
        kl_T = (logp.exp() * (logp - logq.detach())).sum(-1) * batch["completion_mask"][row]
        total = total + (kl_T.sum() / batch["completion_mask"][row].sum() if weighting == "answer" else kl_T.sum())
    expected = gradient(trainer, total / items)
    for num_items in (torch.tensor(items), None):
        loss, _, count = trainer.distillation_loss(trainer.model, batch, num_items)
        assert float(loss.detach()) == pytest.approx(float(total.detach() / items), rel=1e-5) and int(count) == int(
            batch["completion_mask"].sum()
        )
        torch.testing.assert_close(gradient(trainer, loss), expected, rtol=1e-4, atol=1e-7)


def test_a_run_that_mixes_teachers_with_search_evaluation_and_health(tmp_path):
    task = labeled(["math", "code", "code"])
    settings = FAST | {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 1}
    settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    look = EffOPDConfig("line_search", score_rollouts=6)
    made = make_trainer(tmp_path, teacher=teachers(), task=task, effopd=look, **settings)
    made.train()
    rows = list(read_rows(tmp_path / "metrics.jsonl"))
    assert all(row["health/reverse_kl"] > 0 for row in rows)
    assert (tmp_path / "searches.jsonl").is_file()
    (row,) = read_rows(tmp_path / "evals.jsonl")
    assert row["eval_kl_math"] > 0 and row["eval_kl_code"] > 0
    low, high = sorted([row["eval_kl_math"], row["eval_kl_code"]])
    assert low <= row["eval_kl"] <= high
    entries = read_manifest(tmp_path / "checkpoints" / "step-000001")
    assert {each.label: each.sha256 for each in entries} == {k: live_sha256(v) for k, v in teachers().items()}
    others = {"math": make_model(1), "code": make_model(5)}
    again = make_trainer(tmp_path, teacher=others, task=task, effopd=look, **settings)
    with pytest.raises(CheckpointError, match="teacher 'code': weights"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-000001"))


def test_the_score_of_each_rollout_is_the_divergence_from_its_own_teacher(trainer, tmp_path):
    batch = token_batch(rollouts()).first(5)
    ours = DivergenceByTeacher(trainer)
    targets = ours.teacher_hidden([batch])
    (value_N,) = ours(trainer.model, [batch], targets)
    pair = teachers()
    expected = []
    for row, index in enumerate(rollouts()["teacher_index"][:5].tolist()):
        keep = batch.mask_BL[row].bool()
        ids = batch.ids_BL[row][keep].tolist()
        sums, _ = reverse_kl_of_completions(
            trainer.model.eval(), pair[sorted(pair)[index]].eval(), [ids[:5]], [ids[5:]], vocab_size=64, pad_token_id=0
        )
        expected += sums
    assert batch.sums(value_N) == pytest.approx(expected, rel=1e-4)


def test_the_slope_along_the_update_is_the_sum_over_teachers(trainer, tmp_path):
    """With both labels on the same model, value and slope are those of that model alone."""
    same = make_model(1)
    two = make_trainer(tmp_path / "two", teacher={"a": same, "b": make_model(1)}, task=labeled(["a", "b"]), **FAST)
    one = make_trainer(tmp_path / "one", teacher=same, **FAST)
    batch = token_batch(rollouts())
    found = []
    for made, divergence in ((two, DivergenceByTeacher(two)), (one, TrainedDivergence(one))):
        model = made.model.eval()
        moved = LiveWeights(model, "all")
        with torch.no_grad():
            for n, p in enumerate(model.parameters()):
                p.add_(1e-3 * ((n % 3) - 1))
        moved.begin()
        head, targets, hidden = divergence.moving_head(model, moved), divergence.teacher_hidden([batch]), {}
        for scale in (0.0, 1.0):
            moved.move_to(scale)
            keep = []
            divergence(model, [batch], targets, keep=keep)
            hidden[scale] = keep
        found.append(divergence.slope(head, targets, hidden))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_one_teacher_in_memory_gives_the_same_run(tmp_path):
    for label, model in teachers().items():
        model.save_pretrained(tmp_path / label)
    paths = [f"{label}={tmp_path / label}" for label in WIDTH]
    runs = []
    for memory in ("all", "one"):
        settings = FAST | {"max_steps": 1, "teachers": paths, "teachers_in_memory": memory}
        made = make_trainer(
            tmp_path / memory, teacher=OPDConfig(teachers=paths, report_to="none", use_cpu=True).teacher_sources,
            task=labeled(["math", "code"]), **settings,
        )  # fmt: skip
        made.train()
        runs.append(made)
    assert equal(*map(weights, runs))
    assert runs[0].teachers.loads == 2 and runs[1].teachers.loads > 2
    assert [len(made.teachers._loaded) for made in runs] == [2, 1]
    assert len(runs[1].accelerator._models) <= 2  # the student and one teacher


def test_held_out_sums_keep_the_order_of_the_rows_and_load_each_teacher_once(trainer):
    loads = []

    def load(source):
        loads.append(source)
        return make_model(1) if source == "x" else make_model(2, hidden=24)

    both = TeacherSet({"a": "x", "b": "y"}, "teacher", load, lambda model: None)
    prompts, answers = [[5, 6, 7], [8, 9], [5], [10, 11]], [[12, 13], [14], [15, 16, 17], [18, 19]]
    common = {"vocab_size": 64, "pad_token_id": 0}
    model = trainer.model.eval()
    sums = kl_sums_by_teacher(
        model, both, lambda each: each, [1, 0, 1, 0], prompts, answers, temperature=1.0, batch_size=2, horizon=1,
        **common,
    )  # fmt: skip
    assert loads == ["x", "y"]
    for row, seed in enumerate(["y", "x", "y", "x"]):
        twice, pair = [prompts[row]] * 2, [answers[row], answers[row][:1]]
        (expected, first), _ = reverse_kl_of_completions(model, load(seed).eval(), twice, pair, **common)
        assert sums[row].kl == pytest.approx(expected, rel=1e-4)
        assert sums[row].late == pytest.approx(expected - first, rel=1e-3, abs=1e-6)


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"teachers": ["math"]}, "LABEL=MODEL"),
        ({"teachers": ["a b=x"]}, "LABEL=MODEL"),
        ({"teachers": ["a="]}, "LABEL=MODEL"),
        ({"teachers": ["a=x", "a=y"]}, "twice"),
        ({"teachers": ["a=x"], "teacher_model_name_or_path": "y"}, "teacher_model_name_or_path"),
        ({"teachers": ["a=x"], "teacher_model_revision": "main"}, "teacher_model_revision"),
        ({"teachers": ["a=x"], "rollouts": "r"}, "teachers"),
        ({"teachers": ["a=x"], "lambda_extrapolation": 1.25, "reference_model_name_or_path": "r"}, "ExOPD"),
        ({"teachers": ["a=x"], "teachers_in_memory": "two"}, "teachers_in_memory"),
        ({"teachers": ["a=x"], "teacher_column": " "}, "teacher_column"),
        ({"teacher_column": "source", "teacher_model_name_or_path": "y"}, "teacher_column"),
        ({"teachers_in_memory": "one", "teacher_model_name_or_path": "y"}, "teachers_in_memory"),
        ({"teacher_column": "source", "rollouts": "r"}, "teacher_column"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        OPDConfig(report_to="none", use_cpu=True, **settings)


def test_teachers_as_a_list_as_text_and_as_a_mapping():
    for given in (["a=x", "b=y=z"], {"a": "x", "b": "y=z"}):
        assert OPDConfig(teachers=given, report_to="none", use_cpu=True).teacher_sources == {"a": "x", "b": "y=z"}


@pytest.mark.parametrize(("value", "said"), [("chess", "'chess'"), (None, "no teacher"), (True, "no teacher")])
def test_unknown_labels_are_refused_with_their_rows(value, said, tmp_path):
    task = labeled(["math", "code"], 16)
    examples = list(task.examples)
    for row in (3, 7):
        examples[row] = replace(examples[row], metadata={"teacher": value, ORIGIN: f"rows.jsonl row {row}"})
    with pytest.raises(TaskError, match=rf"rows\.jsonl row 3: {said}; rows\.jsonl row 7") as error:
        check_task_labels(task.subset(examples), ["math", "code"], "teacher")
    assert "teachers code, math" in str(error.value)
    with pytest.raises(TaskError, match=rf"row 3 of the training set: {said}"):
        make_trainer(tmp_path, teacher=teachers(), task=task.subset(examples), **FAST)


def test_labels_from_a_column_of_the_dataset_and_from_nested_fields():
    known = TeacherSet({"math": "x", "1": "y"}, "source.name", lambda source: source)
    assert known.index_of({"source": {"name": "math"}}) == 1
    assert known.index_of({"source": {"name": 1}}) == 0
    assert known.index_of({"metadata": json.dumps({"source": {"name": "math"}})}) == 1
    with pytest.raises(TaskError, match=r"source\.name"):
        known.index_of({"source": "math"})


def python_trainer(folder, teacher, rows=None, eval_rows=None, **settings):
    """A trainer whose teachers are an argument, without settings of the command line."""
    args = {"max_steps": 1, "per_device_train_batch_size": 8, "max_completion_length": 4, "learning_rate": 1e-3}
    args |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    data = make_task(16).to_dataset() if rows is None else rows
    config = OPDConfig(output_dir=str(folder), **args, **settings)
    return OPDTrainer(make_model(0), teacher, config, data, eval_rows, processing_class=make_tokenizer())


def test_teachers_given_in_python_are_routed_by_a_column_of_the_data_set(tmp_path, monkeypatch):
    rows = make_task(16).to_dataset().add_column("kind", ["math", "code"] * 8)
    with pytest.raises(TaskError, match="'kind' must name one of the teachers 2, code"):
        python_trainer(tmp_path / "unknown", {2: make_model(1), "code": make_model(2)}, rows, teacher_column="kind")
    unlabeled = {"other": make_task(8).to_dataset()}
    with pytest.raises(TaskError, match="row 0 of the evaluation set other: no teacher"):
        python_trainer(tmp_path / "eval", teachers(), rows, unlabeled, teacher_column="kind")
    trainer = python_trainer(tmp_path / "run", teachers(), rows, teacher_column="kind")
    used, real = [], trainer._frozen
    monkeypatch.setattr(trainer, "_frozen", lambda model, *rest: used.append(model) or real(model, *rest))
    trainer.train()
    assert {trainer.accelerator.unwrap_model(model).config.hidden_size for model in used} == set(WIDTH.values())
    assert [each.label for each in read_manifest(tmp_path / "run")] == ["code", "math"]


@pytest.mark.parametrize(
    ("teacher", "settings", "said"),
    [
        ({}, {}, "at least one teacher"),
        ({"a b": "x"}, {}, "the label 'a b'"),
        ({None: "x"}, {}, "the label None"),
        ({1: "x", "1": "y"}, {}, "'1' occurs twice"),
        (["x", "y"], {}, "a path or a model, got list"),
        ({"a": None}, {}, r"teacher_model\['a'\]: expected a path or a model, got NoneType"),
        ("x", {"teacher_column": "kind"}, "teacher_column='kind' is read only with several teachers"),
        ("x", {"teachers_in_memory": "one"}, "teachers_in_memory='one' is read only with several"),
        ("x", {"teachers": {"a": "y"}}, "teachers names a, but teacher_model is a single teacher"),
        ({"b": "x"}, {"teachers": {"a": "y"}}, "teachers names a, but teacher_model is for b"),
        ({"a": "x"}, {"teacher_column": " "}, "teacher_column"),
        ({"a": "x"}, {"teacher_model_revision": "main"}, "teacher_model_revision"),
        ({"a": "x"}, {"rollout_horizon": "prune", "prune_min_length": 1, "prune_start_length": 2}, "prune"),
        ({"a": "x"}, {"curriculum": "prompt_length", "curriculum_teachers": ["x", "y", "z"]}, "curriculum_teachers"),
    ],
)
def test_wrong_teachers_given_in_python_are_refused_before_anything_is_loaded(tmp_path, teacher, settings, said):
    with pytest.raises(ConfigError, match=said):
        python_trainer(tmp_path / "run", teacher, **settings)
    assert not (tmp_path / "run").exists()


def test_paths_and_numbers_become_text():
    assert given_teachers({1: Path("x"), "b": "y"}) == {"1": "x", "b": "y"}
    assert given_teachers(Path("x")) == "x"


def test_one_in_memory_needs_paths():
    with pytest.raises(ConfigError, match="paths"):
        TeacherSet({"a": make_model(1)}, "teacher", lambda source: source, lambda model: None)
