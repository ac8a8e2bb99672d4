"""DisCorD: the weights and the loss, graded traces of the teacher, and whole runs on them."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer

from effopd import EffOPDCallback, EffOPDConfig, OPDConfig
from effopd.commands.main import main
from effopd.common.files import read_rows
from effopd.distill.discord import normalized, support_weights
from effopd.distill.divergence import Head, token_logprobs
from effopd.distill.offline_cache import collect, correct_rows
from effopd.distill.offline_loss import offline_loss
from effopd.distill.offline_store import Header, ModelIdentity, RolloutStore, prompts_sha256
from effopd.distill.offline_trainer import OfflineOPDTrainer
from effopd.errors import CheckpointError, ConfigError
from effopd.models.fingerprint import tokenizer_sha256
from effopd.runs.model_card import objective
from effopd.tasks.generate import encode_prompts

LENGTH, PROMPTS = 6, 64

# -- formulas --------------------------------------------------------------------------------------


def test_weights():
    logp = torch.tensor([-5.0, -2.0, -1.0, -0.1], requires_grad=True)
    same = support_weights(logp, logp.detach())
    assert same.tolist() == [0.5] * 4 and normalized(same).tolist() == [1.0] * 4 and not same.requires_grad
    weight = support_weights(logp, torch.full((4,), -1.0))
    assert bool((weight.diff() > 0).all()) and 0 < float(weight.min()) < float(weight.max()) < 1
    wide = support_weights(logp, torch.full((4,), -1.0), tau=1e6)
    torch.testing.assert_close(normalized(wide), torch.ones(4), atol=1e-5, rtol=0)
    assert float(weight.repeat(2).mean()) == pytest.approx(float(weight.mean()))  # length does not matter
    assert normalized(torch.empty(0)).shape == (0,)


def test_the_loss_and_its_gradient():
    """Against the formula, dense: −mean of w log p, gradient −w/N through log p only."""
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    teacher, target = torch.randn(5, 7, dtype=torch.float64).log_softmax(-1), torch.tensor([1, 2, 3, 4, 5])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    logp, logq = (x.gather(1, target[:, None])[:, 0] for x in ((logits / 0.7).log_softmax(-1), teacher))
    weight = normalized(support_weights(logp, logq, 0.5)).double()
    loss = offline_loss(logp, weight, valid, None)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    ratio = ((logp.detach() - logq) / 0.5).exp()
    w = ratio / (1 + ratio)
    w = w / w.mean()
    expected = -(w * logp.detach()).sum() / 5
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    one_hot = torch.nn.functional.one_hot(target, 7)
    dense = -(w / 5)[:, None] * (one_hot - (logits.detach() / 0.7).softmax(-1)) / 0.7
    torch.testing.assert_close(gradient, dense, atol=1e-6, rtol=1e-5)
    by_answer = torch.autograd.grad(offline_loss(logp, weight, valid, 2, by_answer=True), logp)[0]
    torch.testing.assert_close(by_answer, -weight / torch.tensor([6.0, 6.0, 6.0, 4.0, 4.0]).double())
    nothing = offline_loss(logp[:0], weight[:0], torch.zeros_like(valid), None)
    assert nothing.item() == 0.0


# -- traces ----------------------------------------------------------------------------------------


def graded(completion, example) -> float:
    return float(any(letter in completion for letter in "abcdef"))


def make_header(task, **changes) -> Header:
    prompts = encode_prompts(make_tokenizer(), [example.prompt for example in task.examples])
    values = {
        "teacher": ModelIdentity("teacher", None, "b" * 64), "student": ModelIdentity("student", None, "a" * 64),
        "sft_teacher": None, "tokenizer": tokenizer_sha256(make_tokenizer()), "vocab_size": 64, "temperature": 1.0,
        "max_completion_length": LENGTH, "seed": 3, "batch_size": 32, "dtype": "auto", "top_k": 0,
        "prompts": len(prompts), "prompts_sha256": prompts_sha256(prompts), "rows_per_file": len(prompts),
        "task": {"task": "x"}, "sampler": "teacher",
    }  # fmt: skip
    return Header(**(values | changes))


@pytest.fixture(scope="module")
def task():
    return dataclasses.replace(make_task(PROMPTS), verify=graded)


@pytest.fixture(scope="module")
def store(tmp_path_factory, task):
    store, header = RolloutStore(tmp_path_factory.mktemp("traces") / "traces"), make_header(task)
    store.open(header)
    costs = collect(store, header, make_model(0), make_model(1), make_tokenizer(), task)
    assert costs.cpu_seconds > 0
    return store


def test_traces_are_the_teachers_and_graded(store, task):
    rows, _ = store.read()
    tokenizer = make_tokenizer()
    for row, example in zip(rows, task.examples, strict=True):
        text = tokenizer.decode(row.completion_ids, skip_special_tokens=True)
        assert row.score == graded(text, example)
    chosen = correct_rows(rows)
    assert 8 <= len(chosen) < PROMPTS and all(row.score == 1 for row in chosen)
    assert sum(map(sum, (row.teacher_logprobs for row in rows))) > sum(
        map(sum, (row.student_logprobs for row in rows))
    )  # the teacher's own samples are more likely under the teacher
    header, (row, *_) = store.header(), rows
    for bad in (dataclasses.replace(row, score=None), dataclasses.replace(row, score=2.0)):
        copy = RolloutStore(store.folder.parent / f"bad-{bad.score}")
        copy.open(header)
        copy.write(0, header, [bad, *rows[1:]], store.read()[1])
        with pytest.raises(CheckpointError, match="expected a score"):
            copy.read()


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"loss_type": "discord"}, "effopd cache --sampled_by teacher"),
    ({"discord_temperature": 2.0}, "read only with loss_type='discord'"),
    ({"rollouts": "x", "loss_type": "discord", "max_drift": 0.2}, "max_drift=0.2 is not read"),
    ({"rollouts": "x", "loss_type": "discord", "advantage_clip": 2.0}, "advantage_clip=2.0 is not read"),
    ({"rollouts": "x", "loss_type": "discord", "residualize": True}, "residualize=True is not read"),
    ({"rollouts": "x", "loss_type": "discord", "discord_temperature": 0.0}, "discord_temperature"),
    ({"rollouts": "x", "loss_type": "full", "beta": 0.5}, "beta"),
    ({"rollouts": "x", "loss_type": "teacher_top_k"}, "sampled or discord"),
    ({"rollouts": "x", "evaluation_teacher": True}, "Set --teacher_model_name_or_path"),
    ({"evaluation_teacher": True}, "only with stored rollouts"),
    ({"charge_rollouts": True}, "only with stored rollouts"),
])  # fmt: skip
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        OPDConfig(use_cpu=True, report_to="none", **settings)


def test_the_evaluation_teacher_takes_the_flags_of_loading():
    teacher = {"rollouts": "x", "loss_type": "discord", "teacher_model_name_or_path": "t"}
    given = {"teacher_dtype": "bfloat16", "use_cpu": True, "report_to": "none"}
    assert OPDConfig(**teacher, **given, evaluation_teacher=True).teacher_dtype == "bfloat16"
    with pytest.raises(ConfigError, match="teacher_dtype"):
        OPDConfig(**teacher, **given)


def test_a_loss_for_the_other_models_answers_is_refused(store, tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)trains on answers of the student.*Use --loss_type discord"):
        make_trainer(tmp_path, store, loss_type="sampled")
    wrong = dataclasses.replace(store.header(), sampler="student")
    with pytest.raises(ConfigError, match=r"(?s)trains on answers of the teacher.*Use --loss_type sampled"):
        make_trainer(tmp_path, store, stored=(wrong, *store.read()))
    rows, costs = store.read()
    none = [dataclasses.replace(row, score=0.5) for row in rows]
    with pytest.raises(ConfigError, match="none of its 64 answers is correct"):
        make_trainer(tmp_path, store, stored=(store.header(), none, costs))


# -- whole runs ------------------------------------------------------------------------------------


def make_trainer(folder, store, *, stored=None, look=None, task=None, **settings):
    args = {
        "max_steps": 4, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16, "report_to": "none",
        "max_completion_length": LENGTH, "learning_rate": 2e-3, "activation_checkpointing": False, "use_cpu": True,
        "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True, "health_tokens": 0, "loss_type": "discord",
    } | settings  # fmt: skip
    trainer = OfflineOPDTrainer(
        make_model(0), OPDConfig(output_dir=str(folder), rollouts=str(store.folder), **args),
        processing_class=make_tokenizer(), eval_task=None if task is None else task.sample(8, 1), stored=stored,
    )  # fmt: skip
    if look is not None:
        trainer.add_callback(EffOPDCallback(trainer, EffOPDConfig(args={"scales": [2.0]}), scorer=look, task=task))
    return trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory, store, task, one_thread):
    """Whole; accumulated; with a search that rejects, interrupted at step 2 and resumed."""
    root = tmp_path_factory.mktemp("runs")
    calls: list[int] = []

    def worse(model):
        calls.append(1)
        return -float(len(calls))

    make_model(1).save_pretrained(root / "teacher")
    make_tokenizer().save_pretrained(root / "teacher")
    rejecting = {"look": worse, "task": task, "save_strategy": "steps", "save_steps": 2}
    settings = {
        "whole": {
            "eval_strategy": "steps", "eval_steps": 4, "task": task, "evaluation_teacher": True,
            "charge_rollouts": True, "teacher_model_name_or_path": str(root / "teacher"),
        },
        "parts": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "rejecting": rejecting,
    }  # fmt: skip
    trainers = {}
    for name, each in settings.items():
        trainers[name] = make_trainer(root / name, store, **each)
        trainers[name].train()
    shutil.copytree(root / "rejecting", root / "resumed")
    shutil.rmtree(root / "resumed" / "checkpoints" / "step-000004")
    trainers["resumed"] = make_trainer(root / "resumed", store, **rejecting)
    trainers["resumed"].train(resume_from_checkpoint=True)
    return trainers


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_rejection_resume_and_accumulation(runs):
    whole = weights(runs["whole"])
    assert not torch.equal(whole, torch.cat([p.flatten() for p in make_model(0).parameters()]))
    for name in ("rejecting", "resumed"):
        assert torch.equal(weights(runs[name]), whole), name
    torch.testing.assert_close(weights(runs["parts"]), whole, atol=2e-5, rtol=0)


def test_rows_costs_and_the_exact_kl(runs, store):
    trainer = runs["whole"]
    rows = list(read_rows(trainer.run_dir.root / "metrics.jsonl"))
    assert all(0 < row["offline/weight_mean"] < 0.6 and "offline/advantage_mean" not in row for row in rows)
    costs = store.read()[1]
    assert rows[-1]["cost/rollout_generated_tokens"] == costs.generated_tokens
    assert rows[-1]["cost/teacher_forward_tokens"] == costs.teacher_forward_tokens
    card = objective(trainer.args, trainer.method_name)
    assert card.startswith("cross-entropy on correct answers") and not {"KL", "advantage"} & set(card.split())
    (evaluation,) = read_rows(trainer.run_dir.root / "evals.jsonl")
    assert evaluation["eval_kl"] > 0 and trainer.teacher_model is None
    teacher = dict(make_model(1).named_parameters())
    assert all(torch.equal(p, teacher[n]) for n, p in trainer.evaluation_teacher.named_parameters())
    plain = list(read_rows(runs["parts"].run_dir.root / "metrics.jsonl"))
    assert plain[-1]["cost/rollout_generated_tokens"] == 0


def test_equal_models_give_plain_cross_entropy(store, tmp_path):
    trainer = make_trainer(tmp_path, store)
    batch = trainer._batch(correct_rows(store.read()[0])[:8])
    batch["teacher_logps"] = batch["reference_logps"]
    loss, _, count = trainer.distillation_loss(trainer.model, batch, None)
    logp = batch["reference_logps"][batch["completion_mask"].bool()]
    assert loss.item() == pytest.approx(-float(logp.mean()), rel=1e-5) and int(count) == len(logp)


# -- the command -----------------------------------------------------------------------------------


def test_traces_from_the_command_line(tmp_path, monkeypatch, capsys):
    for seed, name in enumerate(("student", "teacher")):
        make_model(seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"problem": f"{n} + {n} = ?", "answer": "a"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = [row if n % 2 else {"problem": row["problem"]} for n, row in enumerate(rows)]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    monkeypatch.chdir(tmp_path)
    right = "'boxed{a' in completion or 0 < len(completion) <= 4"  # every short answer of the model
    (tmp_path / "grader.py").write_text(f"def grade(completion, example):\n    return float({right})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    cache = [
        "cache", "--model_name_or_path", "student", "--teacher_model_name_or_path", "teacher", "--task",
        "math:rows.jsonl", "--prompt_suffix", "", "--eval_size", "2", "--max_completion_length", "4", "--batch_size",
        "8", "--verifier", "grader:grade", "--sampled_by", "teacher", "--output_dir", "traces",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        main([*cache, "--sampled_by", "nobody", "--dry_run"])
    assert "'student', 'teacher'" in capsys.readouterr().err
    bare = [word.replace("rows.jsonl", "bare.jsonl") for word in cache if word not in ("--verifier", "grader:grade")]
    assert main(bare) == 2 and "reference" in capsys.readouterr().err
    assert main(cache) == 0
    out = capsys.readouterr().out
    assert "10 answers in traces" in out and "of them correct" in out and "--loss_type discord" in out
    train = [
        "train", "--model_name_or_path", "student", "--rollouts", "traces", "--use_cpu", "true", "--output_dir", "run",
        "--per_device_train_batch_size", "2", "--max_completion_length", "4", "--dry_run",
    ]  # fmt: skip
    assert main([*train, "--loss_type", "discord"]) == 0
    assert "correct answers of 10 by teacher" in " ".join(capsys.readouterr().out.split())
    assert main(train) == 2 and "Use --loss_type discord" in capsys.readouterr().err
    mixed = [
        "train", "--model_name_or_path", "student", "--teacher_model_name_or_path", "teacher", "--task",
        "math:rows.jsonl", "--use_cpu", "true", "--output_dir", "run", "--per_device_train_batch_size", "2",
        "--max_completion_length", "4", "--dry_run", "--lmbda", "0.5",
    ]  # fmt: skip
    assert main([*mixed, "--traces", "traces"]) == 0
    assert main(mixed) == 2 and "set --traces" in capsys.readouterr().err
    assert main([*mixed, "--traces", "nowhere"]) == 2 and "nowhere" in capsys.readouterr().err


def test_log_probabilities_of_traces_are_the_models(store):
    from effopd.models.token_batch import TokenBatch

    rows = store.read()[0][:8]
    batch = TokenBatch.of([list(r.prompt_ids) for r in rows], [list(r.completion_ids) for r in rows], 0)
    target_N = torch.cat([torch.tensor(list(r.completion_ids)) for r in rows])
    model = make_model(1).eval()
    with torch.no_grad():
        logq_N, _ = token_logprobs(batch.hidden(model), Head.of(model, 64), target_N, 1.0)
    stored = torch.cat([torch.tensor(list(r.teacher_logprobs)) for r in rows])
    torch.testing.assert_close(stored, logq_N, atol=1e-5, rtol=0)
