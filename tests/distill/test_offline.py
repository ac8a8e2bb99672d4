"""Offline distillation: the stored rollouts, the objective, drift, refusals, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer
from helpers.tiny_run import make_trainer as online_trainer
from trl import ModelConfig

from effopd import EffOPDConfig, OPDConfig
from effopd.commands.main import main
from effopd.common.files import read_rows
from effopd.distill.callback import EffOPDCallback
from effopd.distill.divergence import Head, token_logprobs
from effopd.distill.offline_cache import collect, top_logprobs
from effopd.distill.offline_drift import DriftGuard, DriftMonitor
from effopd.distill.offline_loss import DriftSums, clipped_advantage, offline_loss, top_k_kl
from effopd.distill.offline_store import HEADER_FILE, CollectCosts, Header, ModelIdentity, RolloutStore, prompts_sha256
from effopd.distill.offline_trainer import OfflineOPDTrainer, check_look_ahead, trained_rows
from effopd.distill.residuals import residualized
from effopd.errors import CheckpointError, CompatibilityError, ConfigError
from effopd.extrapolate.search import Score, first_failure_search
from effopd.launch.offline import stored_rollouts, warn_of_teachers
from effopd.models.fingerprint import tokenizer_sha256, weights_sha256
from effopd.models.token_batch import TokenBatch
from effopd.runs.model_card import objective
from effopd.tasks.generate import encode_prompts

LENGTH, TOP, ROWS = 6, 4, 16


def make_header(task, **changes) -> Header:
    prompts = encode_prompts(make_tokenizer(), [example.prompt for example in task.examples])
    values = {
        "teacher": ModelIdentity("teacher", None, "b" * 64), "student": ModelIdentity("student", None, "a" * 64),
        "sft_teacher": None, "tokenizer": tokenizer_sha256(make_tokenizer()), "vocab_size": 64, "temperature": 1.0,
        "max_completion_length": LENGTH, "seed": 3, "batch_size": 8, "dtype": "auto", "top_k": TOP,
        "prompts": len(prompts), "prompts_sha256": prompts_sha256(prompts), "rows_per_file": 8, "task": {"task": "x"},
    }  # fmt: skip
    return Header(**(values | changes))


def fill(folder, task, header, teacher=None, student=None) -> RolloutStore:
    store = RolloutStore(folder)
    store.open(header)
    models = student or make_model(0), teacher or make_model(1)
    collect(store, header, *models, make_tokenizer(), task)
    return store


@pytest.fixture(scope="module")
def task():
    return make_task(ROWS)


@pytest.fixture(scope="module")
def store(tmp_path_factory, task):
    return fill(tmp_path_factory.mktemp("offline") / "rollouts", task, make_header(task))


@pytest.fixture
def copy(store, tmp_path):
    shutil.copytree(store.folder, tmp_path / "copy")
    return RolloutStore(tmp_path / "copy")


# -- what is stored --------------------------------------------------------------------------------


def test_stored_log_probabilities_are_the_models(store):
    rows, costs = store.read()
    batch = TokenBatch.of([r.prompt_ids for r in rows], [r.completion_ids for r in rows], 0)
    target_N = torch.cat([torch.tensor(r.completion_ids) for r in rows])
    for seed, name in ((0, "student_logprobs"), (1, "teacher_logprobs")):
        model = make_model(seed).eval()
        with torch.no_grad():
            logp_N, _ = token_logprobs(batch.hidden(model), Head.of(model, 64), target_N, 1.0)
        stored = torch.cat([torch.tensor(getattr(r, name)) for r in rows])
        torch.testing.assert_close(stored, logp_N, atol=1e-5, rtol=0)
    for row in rows:
        ended = row.completion_ids[-1] == 2
        assert row.finish_reason == ("stop" if ended else "length")
        assert ended or len(row.completion_ids) == LENGTH
        assert len(row.teacher_topk_ids) == TOP * len(row.completion_ids)
    assert costs.generated_tokens == sum(len(row.completion_ids) for row in rows)
    assert costs.teacher_forward_tokens == costs.student_forward_tokens == batch.tokens


def test_an_interrupted_collection_continues_alike(copy, store, task):
    copy.part(1).unlink()
    header = copy.header()
    assert copy.open(header) == header.rows_per_file
    with pytest.raises(CheckpointError, match=r"incomplete: rollouts-00001\.parquet is missing, 1 of 2"):
        copy.read()
    collect(copy, header, make_model(0), make_model(1), make_tokenizer(), task)
    assert copy.read()[0] == store.read()[0]


@pytest.mark.parametrize("left", [0, 4, 200, -1])
def test_a_file_that_a_power_failure_cut_is_sampled_again(copy, store, task, left, caplog):
    part, header = copy.part(0), copy.header()
    part.write_bytes(part.read_bytes()[:left])
    others = [(copy.part(i), copy.part(i).stat().st_mtime_ns) for i in range(1, header.files)]
    with pytest.raises(CheckpointError, match=r"rollouts-00000\.parquet is damaged .*, 1 of 2 files"):
        copy.read()
    assert copy.open(header) == header.prompts - header.rows_per_file
    assert f"{part} is empty or cut short" in caplog.text
    collect(copy, header, make_model(0), make_model(1), make_tokenizer(), task)
    assert copy.read()[0] == store.read()[0]
    assert [path.stat().st_mtime_ns for path, _ in others] == [then for _, then in others]  # only this one


def test_a_header_that_differs_is_refused(copy, task, tmp_path):
    for change in ({"seed": 4}, {"temperature": 0.5}, {"teacher": ModelIdentity("other", None, "c" * 64)}):
        with pytest.raises(CheckpointError, match=f"other settings: {next(iter(change))}"):
            copy.open(make_header(task, **change))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(CheckpointError, match="new or empty folder"):
        RolloutStore(tmp_path / "other").open(make_header(task))


def test_damaged_rollouts_are_refused(copy, task, tmp_path):
    with pytest.raises(CheckpointError, match=r"--rollouts .*nowhere is not a folder"):
        RolloutStore(tmp_path / "nowhere").header()
    part, header, good = copy.part(1), copy.header(), copy.part(1).read_bytes()
    part.write_bytes(good[:200])
    with pytest.raises(CheckpointError, match="is damaged"):
        copy.read()
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(good))
    pyarrow.parquet.write_table(table.drop_columns("teacher_logprobs"), part)
    with pytest.raises(CheckpointError, match="is damaged"):
        copy.read()
    for name, value, message in (
        ("teacher_logprobs", [[0.0]] * 8, "log-probabilities of teacher"),
        ("completion_ids", [[64] * len(r) for r in table["completion_ids"].to_pylist()], "token ids from 0 to 63"),
        ("student_logprobs", [[math.nan] * len(r) for r in table["student_logprobs"].to_pylist()], "finite log-prob"),
        ("finish_reason", ["why"] * 8, "finish_reason stop or length"),
        ("prompt_ids", [[1]] * 8, "the prompts are not those"),
    ):
        at = table.schema.get_field_index(name)
        column = pyarrow.array(value, table.schema.field(at).type)
        pyarrow.parquet.write_table(table.set_column(at, table.schema.field(at), column), part)
        with pytest.raises(CheckpointError, match=message):
            copy.read()
    copy.write(1, dataclasses.replace(header, seed=9), [], CollectCosts())
    with pytest.raises(CheckpointError, match=r"other rollouts than header\.json: seed 3 → 9"):
        copy.read()
    for text in ("{", "{}", json.dumps({"format": 2}), json.dumps(json.loads(header.to_json()) | {"teacher": None})):
        (copy.folder / HEADER_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=r"header|format"):
            copy.header()


def test_fingerprints(tmp_path):
    model = make_model(0)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    make_model(1).save_pretrained(tmp_path / "other")
    whole, shards, other = (weights_sha256(tmp_path / name) for name in ("whole", "shards", "other"))
    assert whole == shards != other


# -- the objective ---------------------------------------------------------------------------------


def test_the_advantage_is_clipped_and_detached():
    logp = torch.tensor([-1.0, -1.0, -20.0, -20.0, -1.0], requires_grad=True)
    teacher = torch.tensor([-11.0, -11.5, -10.0, -1.0, -0.5])
    advantage = clipped_advantage(teacher, logp, 10.0)
    assert advantage.tolist() == [-10.0, -10.0, 10.0, 10.0, 0.5] and not advantage.requires_grad
    valid = torch.tensor([[True, True, True], [True, True, False]])
    loss = offline_loss(logp, advantage, valid, None)
    assert torch.equal(torch.autograd.grad(loss, logp)[0], -advantage / 5)
    by_answer = torch.autograd.grad(offline_loss(logp, advantage, valid, 2, by_answer=True), logp)[0]
    torch.testing.assert_close(by_answer, -advantage / torch.tensor([6.0, 6.0, 6.0, 4.0, 4.0]))
    nothing = offline_loss(logp[:0], advantage[:0], torch.zeros_like(valid), None)
    assert nothing.item() == 0.0


def test_the_first_gradient_is_the_online_one(store, task, tmp_path):
    """At the weights that sampled, offline and online gradients are equal; at q = p they are 0."""
    offline = make_trainer(tmp_path / "offline", store, task)
    online = online_trainer(tmp_path / "online", loss_type="sampled", student=offline.model, task=task)
    batch = offline._batch(store.read()[0][:8])  # a batch of the collection: equal shapes
    own = batch | {"teacher_logps": batch["reference_logps"]}

    def gradient(trainer, inputs):
        trainer.model.zero_grad()
        trainer.model.train()
        trainer.distillation_loss(trainer.model, inputs, None)[0].backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    expected = gradient(online, batch)
    assert torch.equal(gradient(offline, batch), expected)
    assert float(gradient(offline, own).abs().max()) < 1e-5 * float(expected.abs().max())


def test_top_k_divergence():
    torch.manual_seed(0)
    models = make_model(0), make_model(1)
    hidden = torch.randn(5, 16), torch.randn(5, 16)
    student, teacher = (Head.of(model, 64) for model in models)
    logp, logq = (h.logits(x, 0.7).log_softmax(-1) for h, x in zip((student, teacher), hidden, strict=True))
    ids, top = top_logprobs(hidden[1], teacher, 64, 0.7)
    exact = (logp.exp() * (logp - logq)).sum(-1)
    torch.testing.assert_close(top_k_kl(hidden[0], student, ids, top, 0.7), exact, atol=1e-5, rtol=1e-5)
    assert ids.shape == top.shape == (5, 64) and bool((top.diff() <= 0).all())
    ids, top = top_logprobs(hidden[1], teacher, 3, 0.7)
    part_p, part_q = (each.gather(1, ids).log_softmax(-1) for each in (logp, logq))
    expected = (part_p.exp() * (part_p - part_q)).sum(-1)
    torch.testing.assert_close(top_k_kl(hidden[0], student, ids, top, 0.7), expected, atol=1e-5, rtol=1e-5)
    assert float(top_k_kl(hidden[1], teacher, ids, top, 0.7).abs().max()) < 1e-6


# -- drift -----------------------------------------------------------------------------------------


def test_drift_statistics(caplog):
    logp, reference = torch.log(torch.tensor([0.2, 0.9])), torch.log(torch.tensor([0.4, 0.6]))
    sums = DriftSums.of(logp, reference, torch.tensor([12.0, -1.0]), 10.0)
    assert sums.metrics() == pytest.approx({
        "offline/ratio_mean": 1.0, "offline/ratio_std": 0.5, "offline/advantage_mean": 4.5,
        "offline/clipped_share": 0.5,
    })  # fmt: skip
    assert DriftSums().metrics() == {} and not DriftSums().inside(0.5) and not DriftSums(1, math.nan).inside(0.5)
    monitor = DriftMonitor(0.1, "folder")
    with caplog.at_level(logging.WARNING):
        for step, ratio in enumerate((1.1, 0.9, 1.2, 1.3, 1.0, 0.8)):  # two excursions
            monitor.add(DriftSums(2.0, 2 * ratio, 2 * ratio**2))
            assert monitor.finish_step(step)["offline/ratio_mean"] == pytest.approx(ratio)
    assert [record.args[0] for record in caplog.records] == [2, 5]


def test_the_guard_refuses_candidates_only():
    ratios = {0.0: 0.5, 2.0: 1.05, 4.0: 1.15}
    guard = DriftGuard(
        lambda model: Score(model),
        lambda model: (DriftSums(1.0, ratios[model], ratios[model] ** 2), 7),
        0.1,
    )
    result = first_failure_search(lambda scale: guard(scale, scale), (2, 4, 6))
    assert result.accepted_scale == 2.0
    assert [trial.verdict for trial in result.trials] == ["start", "accepted", "non-finite"]
    assert result.forward_tokens == 14


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [
    {"loss_type": "other"}, {"top_p": 0.9}, {"rollout_horizon": "topd"}, {"beta": 0.5},
    {"lambda_extrapolation": 1.25}, {"generation_kwargs": {"num_beams": 2}}, {"teacher_model_revision": "x"},
    {"log_completions": True},
], ids=lambda setting: next(iter(setting)))  # fmt: skip
def test_settings_without_effect_are_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        OPDConfig(rollouts="somewhere", use_cpu=True, report_to="none", **setting)


def test_offline_settings():
    assert OPDConfig(rollouts="x", use_cpu=True).loss_type == "sampled" and OPDConfig(use_cpu=True).loss_type == "full"
    for setting in ({"advantage_clip": 5.0}, {"max_drift": 0.2}, {"residualize": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(setting))}=.* only with stored rollouts"):
            OPDConfig(use_cpu=True, **setting)
    for strategy in ("line_search", "fixed", "relex"):
        with pytest.raises(ConfigError, match="loads no teacher"):
            check_look_ahead(EffOPDConfig(strategy))
    check_look_ahead(EffOPDConfig("effopd"))
    check_look_ahead(EffOPDConfig("none"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        make_model(seed).save_pretrained(root / name)
    return root


def test_rollouts_of_other_models_are_refused(folders, task, tmp_path, store, caplog):
    shas = {name: weights_sha256(folders / name) for name in ("student", "teacher")}
    identities = {name: ModelIdentity(name, None, sha) for name, sha in shas.items()}
    header = make_header(task, **identities)
    rollouts = RolloutStore(tmp_path / "r")
    rollouts.open(header)
    rows, costs = store.read()
    for index in range(2):
        rollouts.write(index, header, rows[8 * index : 8 * index + 8], costs)

    def check(student="student", teacher=None, tokenizer=None, batch=8):
        opd = OPDConfig(
            rollouts=str(rollouts.folder), use_cpu=True, per_device_train_batch_size=batch,
            teacher_model_name_or_path=teacher and str(folders / teacher),
        )  # fmt: skip
        model = ModelConfig(str(folders / student))
        return stored_rollouts(model, opd, tokenizer or make_tokenizer(), network=False)

    assert len(check().rows) == ROWS and len(check(teacher="teacher").rows) == ROWS
    with pytest.raises(CompatibilityError, match="other weights than the student that sampled"):
        check(student="teacher")
    with pytest.raises(CompatibilityError, match="not the teacher that scored"):
        check(teacher="student")
    with pytest.raises(ConfigError, match="a step takes 17 rollouts"):
        check(batch=17)
    other = make_tokenizer()
    other.add_tokens(["<new>"])
    with pytest.raises(CompatibilityError, match="another tokenizer"):
        check(tokenizer=other)
    with caplog.at_level(logging.WARNING):
        warn_of_teachers(dataclasses.replace(header, sft_teacher=ModelIdentity("copy", None, shas["teacher"])))
        assert not caplog.records
        warn_of_teachers(dataclasses.replace(header, sft_teacher=ModelIdentity("other", None, "")))
    assert "is not the model that wrote" in caplog.text


def test_a_run_that_residualizes_is_not_warned_of_another_teacher(folders, task, tmp_path, store, caplog):
    sha = weights_sha256(folders / "student")
    student, other = ModelIdentity("student", None, sha), ModelIdentity("other", None, "c" * 64)
    header = make_header(task, student=student, sft_teacher=other)
    rollouts = RolloutStore(tmp_path / "r")
    rollouts.open(header)
    rows, costs = store.read()
    for index in range(2):
        rollouts.write(index, header, rows[8 * index : 8 * index + 8], costs)
    for residualize in (True, False):
        opd = OPDConfig(rollouts=str(rollouts.folder), use_cpu=True, residualize=residualize)
        with caplog.at_level(logging.WARNING):
            stored = stored_rollouts(ModelConfig(str(folders / "student")), opd, make_tokenizer(), network=False)
        assert stored.rows == rows
        assert ("or train with --residualize true" in caplog.text) is not residualize


# -- whole runs ------------------------------------------------------------------------------------


def make_trainer(folder, store, task, look=False, **settings):
    args = {
        "max_steps": 4, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "report_to": "none",
        "max_completion_length": LENGTH, "learning_rate": 2e-3, "activation_checkpointing": False, "use_cpu": True,
        "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True, "health_tokens": 16,
    } | settings  # fmt: skip
    trainer = OfflineOPDTrainer(
        make_model(0), OPDConfig(output_dir=str(folder), rollouts=str(store.folder), **args),
        processing_class=make_tokenizer(), eval_task=task.sample(8, 1),
    )  # fmt: skip
    if look:
        trainer.add_callback(EffOPDCallback(trainer, EffOPDConfig(validation_size=8), task=task))
    return trainer


def test_only_a_run_that_residualizes_changes_the_teachers_log_probabilities(store, task, tmp_path, capsys):
    """b is a function of the whole store; every other input of a step is the stored one."""
    rows, _ = store.read()
    off = make_trainer(tmp_path / "off", store, task)
    assert off._rows == rows and "bias of the teacher" not in capsys.readouterr().out
    on = make_trainer(tmp_path / "on", store, task, residualize=True)
    expected, bias = residualized(rows)
    assert on._rows == expected and bias.text() in capsys.readouterr().out
    plain, changed = off._batch(off._rows[:8]), on._batch(on._rows[:8])
    assert [name for name, value in plain.items() if not torch.equal(value, changed[name])] == ["teacher_logps"]
    assert float((plain["teacher_logps"] - changed["teacher_logps"]).abs().max()) > 0.1
    assert ["mean bias" in objective(each.args, "opd") for each in (off, on)] == [False, True]
    with pytest.raises(ConfigError, match=r"residualize=True.*one answer only"):
        trained_rows(on.args, rows[:1])
    assert trained_rows(off.args, rows[:1]) == rows[:1]


@pytest.fixture(scope="module", params=[False, True], ids=["as stored", "residualized"])
def runs(request, tmp_path_factory, store, task, one_thread):
    """Plain; with a look-ahead that refuses every jump; the same, resumed at step 2."""
    root = tmp_path_factory.mktemp("runs")
    residualize = {"residualize": request.param}
    strict = {"look": True, "max_drift": 1e-9, "save_strategy": "steps", "save_steps": 2} | residualize
    settings = {"plain": {"eval_strategy": "steps", "eval_steps": 4} | residualize, "strict": strict}
    trainers = {}
    for name, each in settings.items():  # one after another: a trainer seeds the random numbers when it is built
        trainers[name] = make_trainer(root / name, store, task, **each)
        trainers[name].train()
    shutil.copytree(root / "strict", root / "resumed")
    shutil.rmtree(root / "resumed" / "checkpoints" / "step-000004")
    trainers["resumed"] = make_trainer(root / "resumed", store, task, **strict)
    trainers["resumed"].train(resume_from_checkpoint=True)
    return trainers


def test_a_refused_jump_and_a_resume_change_nothing(runs):
    """Every jump is refused, so the look-ahead restores bit for bit; a resume continues alike."""
    weights = {name: dict(trainer.model.named_parameters()) for name, trainer in runs.items()}
    start = dict(make_model(0).named_parameters())
    assert any(not torch.equal(start[name], p) for name, p in weights["plain"].items())
    for other in ("strict", "resumed"):
        apart = {name: (p - weights[other][name]).abs().max().item() for name, p in weights["plain"].items()}
        assert not any(apart.values()), (other, apart)
    searches = list(read_rows(runs["strict"].run_dir.root / "searches.jsonl"))
    assert [row["step"] for row in searches] == [1, 2, 4]
    assert all(row["accepted_scale"] == 0.0 and row["trials"][1]["verdict"] == "non-finite" for row in searches)


def test_rows_and_costs_of_a_run(runs):
    trainer = runs["plain"]
    rows = list(read_rows(trainer.run_dir.root / "metrics.jsonl"))
    assert trainer.teacher_model is None
    assert rows[0]["offline/ratio_mean"] == pytest.approx(1.0, abs=1e-5)  # on-policy at the first step
    assert rows[0]["offline/ratio_std"] < 1e-4 < rows[-1]["offline/ratio_std"]
    assert all(row["offline/top_k_kl"] > 0 for row in rows)
    assert rows[-1]["cost/rollout_generated_tokens"] == rows[-1]["cost/teacher_forward_tokens"] == 0
    (evaluation,) = read_rows(trainer.run_dir.root / "evals.jsonl")
    assert "accuracy" in " ".join(evaluation) and "eval_kl" not in evaluation and "kl" not in evaluation
    with pytest.raises(ConfigError, match="no teacher"):
        trainer.evaluate(trainer.train_dataset)


def test_the_trainer_checks_the_header(store, task, tmp_path):
    for setting in ({"temperature": 0.5}, {"max_completion_length": LENGTH - 1}):
        with pytest.raises(ConfigError, match=f"{next(iter(setting))}=.*Set --{next(iter(setting))}"):
            make_trainer(tmp_path / "run", store, task, **setting)


# -- the commands ----------------------------------------------------------------------------------


@pytest.fixture
def command(folders, tmp_path, monkeypatch):
    """Flags of `effopd cache` for the tiny pair and eight rows of a file."""
    for name in ("student", "teacher"):
        make_tokenizer().save_pretrained(folders / name)
    rows = [{"problem": f"{n} + {n} = ?", "answer": str(2 * n)} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return [
        "cache", "--model_name_or_path", str(folders / "student"), "--teacher_model_name_or_path",
        str(folders / "teacher"), "--task", "math:rows.jsonl", "--prompt_suffix", "", "--eval_size", "2",
        "--max_completion_length", "4", "--batch_size", "4", "--rows_per_file", "4", "--output_dir", "rollouts",
    ]  # fmt: skip


def test_cache_and_train_from_the_command_line(command, folders, tmp_path, capsys):
    def run(*argv):
        status = main(argv)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, said.out, said.err

    status, out, _ = run(*command, "--dry_run")
    assert status == 0 and "6 of math:rows.jsonl, in 2 file(s)" in out and not (tmp_path / "rollouts").exists()
    for flag, value, message in (
        ("--teacher_model_name_or_path", "./nope", "no such folder"), ("--temperature", "0", "must be above 0"),
        ("--top_k_logprobs", "1", "at least 2"), ("--max_completion_length", "0", "at least 1"),
        ("--output_dir", "rows.jsonl", "new or empty folder"), ("--rows_per_file", "0", "at least 1"),
    ):  # fmt: skip
        for dry in ([], ["--dry_run"]):
            status, _, err = run(*command, flag, value, *dry)
            assert status == 2 and message in err
    assert run(*command)[0] == 0
    status, out, _ = run(*command)  # everything is there
    assert status == 0 and "sampled 0 tokens" in out and "2 already written" in out
    (tmp_path / "rollouts").rename(tmp_path / "my rollouts")
    status, out, _ = run(*command, "--output_dir", "my rollouts")
    assert status == 0 and "--rollouts 'my rollouts' --temperature" in out
    (tmp_path / "my rollouts").rename(tmp_path / "rollouts")
    status, _, err = run(*command, "--seed", "5", "--dry_run")
    assert status == 2 and "other settings: seed 0 → 5" in err
    train = [
        "train", "--model_name_or_path", str(folders / "student"), "--rollouts", "rollouts", "--use_cpu", "true",
        "--per_device_train_batch_size", "3", "--max_completion_length", "4", "--output_dir", "run", "--dry_run",
    ]  # fmt: skip
    status, out, _ = run(*train)
    assert status == 0 and "none in memory" in out and "math:rows.jsonl" in out and "bias" not in out
    status, out, _ = run(*train, "--residualize", "true")
    assert status == 0 and "bias of the teacher: mean |b|" in out
    for extra, message in (
        (["--loss_type", "full"], "loss_type='full' needs a live teacher"),
        (["--rollouts", "nope"], "--rollouts nope is not a folder"),
        (["--effopd.strategy", "line_search"], "loads no teacher"),
        (["--temperature", "0.5"], "Set --temperature 1"),
        (["--model_name_or_path", str(folders / "teacher")], "other weights than the student"),
        (["--metric_for_best_model", "kl", "--eval_strategy", "steps", "--load_best_model_at_end", "true"], "kl"),
    ):
        status, _, err = run(*train, *extra)
        assert status == 2 and message in err
    (tmp_path / "rollouts" / "rollouts-00001.parquet").unlink()
    status, _, err = run(*train)
    assert status == 2 and "is incomplete" in err
