"""A teacher behind a server: the loss on its top k, protocol, faults, checks, and whole runs."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import pytest
import torch
from helpers.teacher_server import TeacherServer
from helpers.tiny_models import make_model, make_task, make_tokenizer
from helpers.tiny_run import make_trainer
from safetensors.torch import load_file
from transformers import AutoTokenizer

from effopd import EffOPDCallback, EffOPDConfig, OPDConfig
from effopd.commands.main import main
from effopd.common.files import read_rows
from effopd.distill.divergence import Head, divergences, reverse_kl_of_completions
from effopd.distill.served.checks import open_teacher
from effopd.distill.served.client import TeacherClient, UnusableReplyError, server_url
from effopd.distill.served.measure import kl_of_completions
from effopd.distill.served.protocol import read_completions
from effopd.distill.served.scoring import SupportRay
from effopd.distill.served.support import Outcomes, Support, divergence, outcomes, renormalized, tail_of
from effopd.distill.served.teacher import ServedTeacher, scored_support
from effopd.distill.served.trainer import ServedOPDTrainer
from effopd.distill.token_rows import support_kl
from effopd.errors import CompatibilityError, ConfigError, TeacherServerError
from effopd.models.ray import MovingHead, RayKL
from effopd.models.token_batch import TokenBatch

V, H, N = 12, 5, 40


def support_of(logq_NV, top_k, targets_N) -> Support:
    values, ids = logq_NV.topk(top_k)
    return Support(ids, values, logq_NV.gather(1, targets_N[:, None])[:, 0])


@pytest.fixture(scope="module")
def setting():
    """Student head and hidden states, the teacher's log-probabilities, the student's tokens."""
    torch.manual_seed(0)
    head = Head(torch.randn(V, H), torch.randn(V), 1.0, None)
    hidden_NH = torch.randn(N, H)
    logq_NV = (2 * torch.randn(N, V)).log_softmax(-1)
    logp_NV = head.logits(hidden_NH).log_softmax(-1)
    return head, hidden_NH, logq_NV, logp_NV, logp_NV.exp().multinomial(1)[:, 0]


# -- the loss --------------------------------------------------------------------------------------


def full(logp, logq, beta):
    p, q = logp.exp(), logq.exp()
    if beta in (0, 1):
        return (p * (logp - logq)).sum(-1) if beta else (q * (logq - logp)).sum(-1)
    m = ((1 - beta) * p + beta * q).log()
    return ((1 - beta) * p * (logp - m) + beta * q * (logq - m)).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_loss_is_the_divergence_of_k_plus_one_outcomes_and_a_lower_bound(setting, beta):
    head, hidden, logq, logp, y = setting
    exact = full(logp, logq, beta)
    at = outcomes(hidden, head, support_of(logq, V, y), y)
    torch.testing.assert_close(divergence(at, beta), exact, rtol=1e-5, atol=1e-6)
    before = torch.zeros(N)
    for k in (2, 5, 9, V):
        value = divergence(outcomes(hidden, head, support_of(logq, k, y), y), beta)
        assert (value >= before - 1e-5).all() and (value <= exact + 1e-5).all()  # finer outcomes, larger divergence
        before = value


def test_the_gradient_is_that_of_the_dense_formula(setting):
    head, hidden, logq, _, y = setting
    for k in (4, V):
        h = hidden.clone().requires_grad_()
        support = support_of(logq, k, y)
        divergence(outcomes(h, head, support, y), 1.0).sum().backward()
        d = hidden.clone().double().requires_grad_()
        logp = (d @ head.weight.double().T + head.bias.double()).log_softmax(-1)
        p, q = logp.exp().gather(1, support.ids), support.logq.double().exp()
        dense = (p * (p.log() - q.log())).sum()
        if k < V:
            dense = dense + ((1 - p.sum(1)) * ((1 - p.sum(1)) / (1 - q.sum(1))).log()).sum()
        dense.backward()
        torch.testing.assert_close(h.grad.double(), d.grad, rtol=1e-3, atol=1e-5)


def test_sampled_tokens_estimate_the_bias(setting):
    """Σ_y p(y) tail_kl(y) is D − D_S, exactly."""
    head, hidden, logq, logp, _ = setting
    gap, teacher_mass = torch.zeros(N), 1 - logq.exp().topk(4).values.sum(1)
    for token in range(V):
        y = torch.full((N,), token)
        support = support_of(logq, 4, y)
        at = outcomes(hidden, head, support, y)
        tail = tail_of(at, support, y)
        gap += logp[:, token].exp() * tail.kl
        torch.testing.assert_close(tail.teacher, teacher_mass, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(divergence(at, 1.0) + gap, full(logp, logq, 1.0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        renormalized(at), support_kl(logp.gather(1, support.ids), support.logq), rtol=1e-4, atol=1e-5
    )


def test_the_slope_along_a_ray_is_the_derivative_of_the_loss(setting):
    head, hidden, logq, _, y = setting
    torch.manual_seed(1)
    moved, step = hidden + 0.1 * torch.randn(N, H), 0.1 * torch.randn(V, H)
    moving, teacher = MovingHead(head, step), Head(torch.eye(V), None, 1.0, None)

    def value(s, support):
        there = Head(head.weight + s * step, head.bias, 1.0, None)
        return float(divergence(outcomes(hidden + s * (moved - hidden), there, support, y), 1.0).double().sum())

    for k in (4, V):
        ray = SupportRay(moving, support_of(logq, k, y), hidden, y, 1.0)
        ray.add(0.0, hidden), ray.add(1.0, moved)
        at = ray.derivatives(0.0)
        numeric = (value(0.01, support_of(logq, k, y)) - value(-0.01, support_of(logq, k, y))) / 0.02
        assert float(at.slope.sum()) == pytest.approx(numeric, rel=2e-2)
        assert float(at.kl.sum()) == pytest.approx(value(0.0, support_of(logq, k, y)), rel=1e-4)
    local = RayKL(moving, teacher, logq)
    local.add(0.0, hidden), local.add(1.0, moved)
    torch.testing.assert_close(local.derivatives(0.0).slope, at.slope, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(local.derivatives(0.0).gauss_newton, at.gauss_newton, rtol=1e-3, atol=1e-5)


def test_a_tail_below_the_resolution_of_float32_is_finite():
    logs = torch.tensor([[0.0, -30.0]])
    at = outcomes(
        torch.zeros(1, 2), Head(torch.zeros(3, 2), torch.tensor([20.0, 0, 0]), 1.0, None),
        Support(torch.tensor([[0, 1]]), logs, logs[:, 0]), torch.tensor([0]),
    )  # fmt: skip
    assert isinstance(at, Outcomes) and bool(torch.isfinite(divergence(at, 1.0)).all())


# -- the protocol ----------------------------------------------------------------------------------


def reply_of(*rows):
    return {"choices": [{"prompt_logprobs": [None, *rows]}]}


def entries(**values):
    return {name[1:]: {"logprob": value, "rank": 1} for name, value in values.items()}


def test_a_reply_is_sorted_cut_to_k_and_to_the_vocabulary():
    row = entries(t7=-1.5, t2=-0.7, t9=-2.0)
    (scored,) = read_completions(reply_of(row), [[1, 9]], [1], 2, 100)
    assert scored.ids.tolist() == [[2, 7]] and scored.sampled.tolist() == [-2.0]
    (scored,) = read_completions(reply_of(row), [[1, 9]], [1], 3, 9)  # 9 is a row that the student lacks
    kept = math.log1p(-math.exp(-2.0))
    assert scored.ids[0, :2].tolist() == [2, 7] and scored.logq[0, 2] == -math.inf
    assert scored.logq[0, :2].tolist() == pytest.approx([-0.7 - kept, -1.5 - kept])


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "expected prompt_logprobs of 2 tokens"),
        ([None], "no log-probabilities at position 1"),
        ([entries(t7=-1.5, t2=-0.7)], "token 9 at position 1 is missing"),
        ([entries(t9=-1.5)], "1 log-probabilities at position 1, expected 2"),
        ([entries(t9=math.nan, t2=-0.7)], "log-probability nan"),
        ([entries(t9=0.5, t2=-0.7)], "log-probability 0.5"),
        ([entries(t9=-0.1, t2=-0.1)], "sum to 1.810"),
    ],
)
def test_unusable_replies(rows, why):
    with pytest.raises(UnusableReplyError, match=why):
        read_completions(reply_of(*rows), [[1, 9]], [1], 2, 100)


@pytest.mark.parametrize("url", ["nonsense", "ftp://host", "http://", "http://host:port"])
def test_urls(url):
    with pytest.raises(ConfigError, match=r"--teacher_server: expected a URL"):
        server_url(url)
    assert server_url("https://host:1/x/v1/") == "https://host:1/x"


# -- the server ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tokenizer):
    with TeacherServer(make_model(1), tokenizer) as running:
        yield running


@pytest.fixture
def teacher(server):
    server.faults.clear()
    client = TeacherClient(server.url, timeout=60, retries=2, wait=0.01)
    return ServedTeacher(client, "tiny-teacher", vocab_size=64, top_k=64, workers=2)


def batch_of(rows=3):
    torch.manual_seed(2)
    prompts = [torch.randint(3, 40, (3 + i,)).tolist() for i in range(rows)]
    return TokenBatch.of(prompts, [torch.randint(3, 40, (5 - i,)).tolist() for i in range(rows)], 0)


@pytest.mark.parametrize("fault", ["slow", "500", "429", "cut", "nan", "missing", "short", "few", "empty", "mass"])
def test_a_fault_is_repeated(server, teacher, fault):
    server.faults.append(fault)
    teacher.client._timeout = 2.0 if fault == "slow" else 60.0
    support, tokens = scored_support(teacher, batch_of())
    expected = batch_of().hidden(server.model)
    logq = Head.of(server.model, 64).logits(expected.detach()).log_softmax(-1)
    torch.testing.assert_close(support.logq, logq.sort(descending=True).values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(support.sampled, logq.gather(1, tokens[:, None])[:, 0], rtol=1e-4, atol=1e-5)
    retried = teacher.client.retried
    assert (retried >= 1 if fault == "slow" else retried == 1) and teacher.client.received_bytes > 0


def test_a_fault_that_persists_and_a_server_that_is_gone(server, teacher):
    server.faults.append("down")
    with pytest.raises(TeacherServerError, match=r"no usable reply in 3 attempt.*500 the engine is dead"):
        teacher.support(batch_of())
    server.faults.clear()
    server.faults.extend(["nan"] * 6)
    with pytest.raises(TeacherServerError, match="log-probability nan"):
        teacher.support(batch_of(1))
    server.faults.clear()
    with pytest.raises(TeacherServerError, match=r"Refused"):
        TeacherClient("http://127.0.0.1:9", retries=0).call("/v1/models")


def test_divergences_with_k_of_v_are_the_local_ones(server, teacher, student):
    batch = batch_of()
    (exact,) = divergences(student, server.model, [batch], vocab_size=64, beta=1.0, temperature=1.0)
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch.ids_BL, batch.mask_BL, strict=True)]
    prompts, answers = [row[: 3 + i] for i, row in enumerate(rows)], [row[3 + i :] for i, row in enumerate(rows)]
    sums, _ = reverse_kl_of_completions(student, server.model, prompts, answers, vocab_size=64, pad_token_id=0)
    given = {"pad_token_id": 0, "temperature": 1.0, "batch_size": 2, "horizon": 1}
    ours = kl_of_completions(student, teacher, prompts, answers, **given)
    assert [each.kl for each in ours] == pytest.approx(sums, rel=1e-5)
    first = kl_of_completions(student, teacher, prompts, [answer[:1] for answer in answers], **given)
    late = [each.kl - start.kl for each, start in zip(ours, first, strict=True)]
    assert [each.late for each in ours] == pytest.approx(late, rel=1e-3, abs=1e-6)
    assert sum(sums) == pytest.approx(float(exact.sum()), rel=1e-5)
    assert [each.tail_mass for each in ours] == [0.0] * 3


# -- checks ----------------------------------------------------------------------------------------


def settings(url, folder="unused", **more):
    defaults = {
        "max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 16, "max_completion_length": 4,
        "learning_rate": 2e-3, "report_to": "none", "activation_checkpointing": False, "save_strategy": "no",
        "eval_strategy": "no", "disable_tqdm": True, "use_cpu": True, "teacher_top_k": 64,
        "teacher_server_retries": 0, "teacher_server_concurrency": 2,
    }  # fmt: skip
    return OPDConfig(output_dir=str(folder), teacher_server=url, **(defaults | more))


def test_a_server_that_fits_is_opened(server, tokenizer):
    server.faults.clear()
    teacher = open_teacher(settings(server.url, teacher_top_k=500), tokenizer, 64, prompt=20)
    assert (teacher.model, teacher.vocab_size, teacher.top_k) == ("tiny-teacher", 64, 64)


def test_another_tokenizer_a_smaller_vocabulary_a_limit_and_a_length_are_refused(server, tokenizer, monkeypatch):
    server.faults.clear()
    args = settings(server.url)
    with pytest.raises(ConfigError, match=r"accepts 128 tokens.*take 135.*--max-model-len 135"):
        open_teacher(args, tokenizer, 64, prompt=130)
    monkeypatch.setattr(server, "vocab_size", 50)  # fewer rows than the student's 64, enough for every token
    assert open_teacher(args, tokenizer, 64).vocab_size == len(tokenizer) < 50
    monkeypatch.setattr(server, "vocab_size", 40)
    with pytest.raises(CompatibilityError, match="fewer vocabulary rows"):
        open_teacher(args, tokenizer, 64)
    monkeypatch.setattr(server, "vocab_size", 64)
    monkeypatch.setattr(server, "max_logprobs", 20)
    with pytest.raises(CompatibilityError, match=r"does not give 64 log-probabilities.*--max-logprobs 64"):
        open_teacher(args, tokenizer, 64)
    other = make_tokenizer()
    monkeypatch.setattr(
        server, "tokenizer", lambda *a, **k: {"input_ids": [i + 1 for i in other(*a, **k)["input_ids"]]}
    )
    with pytest.raises(CompatibilityError, match=r"tokenizer of its model 'tiny-teacher' differs"):
        open_teacher(args, tokenizer, 64)


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0.7}, {"teacher_model_name_or_path": "x"}, {"teacher_model_revision": "x"},
        {"loss_type": "sampled", "baseline": "value"}, {"loss_type": "sampled", "samples_per_prefix": 2},
        {"lambda_extrapolation": 1.25, "reference_model_name_or_path": "x"}, {"rollouts": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_need_more_than_a_server_returns(more):
    with pytest.raises(ConfigError, match=r"not supported with --teacher_server"):
        settings("http://host", **more)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher_dtype", "bfloat16"), ("teacher_load_in_8bit", True), ("teacher_load_in_4bit", True),
        ("teacher_offload", True), ("teacher_shard", True), ("teachers", ["a=x", "b=y"]),
    ],
)  # fmt: skip
def test_flags_of_a_teacher_in_memory_are_refused(name, value):
    args = settings("http://host")
    assert name in {field.name for field in dataclasses.fields(args)}
    setattr(args, name, value)
    with pytest.raises(ConfigError, match=rf"{name}=.* is not supported with --teacher_server"):
        args.check_served()


def test_flags_of_a_server_need_one():
    with pytest.raises(ConfigError, match="read only with a served teacher"):
        OPDConfig(teacher_server_timeout=3.0, use_cpu=True)


# -- whole runs ------------------------------------------------------------------------------------

ROOM = {"max_steps": 3, "per_device_train_batch_size": 8, "teacher_top_k": 64}
SEARCH = {"score_rollouts": 4, "gate": "better"}


def served_run(url, folder, search=None, **more):
    task = make_task(64)
    trainer = ServedOPDTrainer(
        make_model(0), settings(url, folder, **more), train_dataset=task.to_dataset(),
        processing_class=make_tokenizer(), eval_task=task.sample(12, 1),
    )  # fmt: skip
    if search is not None:
        trainer.add_callback(EffOPDCallback(trainer, EffOPDConfig(search, **SEARCH), task=task))
    return trainer


EVALUATED = {"eval_strategy": "steps", "eval_steps": 3, "eval_greedy": False}


@pytest.fixture(scope="module")
def pair(server, tmp_path_factory):
    """The same run with the teacher in memory and behind the server, K = V."""
    server.faults.clear()
    root = tmp_path_factory.mktemp("served")
    common = {"max_completion_length": 4, "save_strategy": "no", **EVALUATED}
    local = make_trainer(
        root / "local", effopd=EffOPDConfig("newton_search", **SEARCH), max_steps=3, learning_rate=2e-3,
        teacher=make_model(1), **common,
    )  # fmt: skip
    local.train()
    before = len(server.scored)
    ours = served_run(server.url, root / "served", "newton_search", **(ROOM | EVALUATED))
    ours.train()
    return root, sum(server.scored[before:])


def rows_of(root, name):
    return list(read_rows(root / "local" / name)), list(read_rows(root / "served" / name))


def test_with_k_of_v_a_run_has_the_local_losses_and_scales(pair):
    root, _ = pair
    for local, ours in zip(*rows_of(root, "metrics.jsonl"), strict=True):
        for name in ("loss", "entropy", *(name for name in local if name.startswith("health/reverse"))):
            assert ours[name] == pytest.approx(local[name], abs=1e-5), name
        tokens = [name for name in local if name.endswith("_tokens")]
        assert tokens and {name: ours[name] for name in tokens} == {name: local[name] for name in tokens}
        assert ours["served/tail_mass"] == 0.0 and ours["served/received_bytes"] > 0
    local, ours = rows_of(root, "searches.jsonl")
    assert [len(row["trials"]) for row in local] == [len(row["trials"]) for row in ours]
    scales = [row["accepted_scale"] for row in local]
    assert any(scales) and [row["accepted_scale"] for row in ours] == pytest.approx(scales, rel=1e-3)
    (local,), (ours,) = rows_of(root, "evals.jsonl")
    assert ours["eval_kl"] == pytest.approx(local["eval_kl"], abs=1e-5) and ours["eval_tail_mass"] == 0.0


def test_a_search_asks_for_nothing_that_its_step_does_not_ask_for(pair):
    """3 steps of 8 rollouts, 12 held-out answers, and the probe of the checks; 2 searches."""
    _, sequences = pair
    assert sequences == 3 * 8 + 12 + 1


@pytest.mark.parametrize("loss", ["full", "sampled", "teacher_top_k"])
def test_k_of_8_trains_with_every_loss(server, tmp_path, loss):
    server.faults.clear()
    more = {"beta": 0.5, "normalize_beta": True} if loss == "full" else {}
    trainer = served_run(server.url, tmp_path, loss_type=loss, **(ROOM | {"teacher_top_k": 8, "max_steps": 1} | more))
    trainer.train()
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert math.isfinite(row["loss"]) and math.isfinite(row["health/reverse_kl"])
    assert "health/overlap_ratio" not in row and "health/teacher_entropy" not in row
    assert loss == "sampled" or 0 < row["served/tail_mass"] < 1


def test_a_run_that_lost_its_server_resumes_as_if_it_had_not(server, tmp_path):
    """The server dies in step 3, after the checkpoint of step 2; the run ends with an error."""
    server.faults.clear()
    more = ROOM | {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "teacher_top_k": 16}
    served_run(server.url, tmp_path / "whole", "line_search", **more).train()
    trainer = served_run(server.url, tmp_path / "part", "line_search", **more)
    steps = []
    train = trainer.training_step

    def dying(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            server.faults.append("down")
        return train(*args, **kwargs)

    trainer.training_step = dying
    with pytest.raises(TeacherServerError, match=r"--resume_from_checkpoint true"):
        trainer.train()
    server.faults.clear()
    server.faults.append("nan")  # a fault after the resume is repeated
    resumed = served_run(server.url, tmp_path / "part", "line_search", **(more | {"teacher_server_retries": 1}))
    resumed.train(resume_from_checkpoint=True)
    files = [tmp_path / name / "checkpoints" / "step-000003" / "model.safetensors" for name in ("whole", "part")]
    whole, part = map(load_file, files)
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    scales = [
        [row["accepted_scale"] for row in read_rows(tmp_path / name / "searches.jsonl")] for name in ("whole", "part")
    ]
    assert scales[0] == scales[1] and len(scales[0]) == 2


# -- the command -----------------------------------------------------------------------------------


def test_the_recipe_dry_runs_with_and_without_its_server(server, tmp_path, capsys, monkeypatch):
    recipe = Path(__file__).parents[2] / "recipes" / "served-teacher.yaml"
    monkeypatch.chdir(tmp_path)
    small = ["train", "--config", str(recipe), "--train_size", "64", "--eval_size", "8"]
    gone = ["--teacher_server", "http://127.0.0.1:9", "--teacher_server_retries", "0"]
    assert main([*small, *gone, "--dry_run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "none in memory" in out and "no answer from the server" in out
    *_, last = out.partition("Warning: ")
    assert last.startswith("--teacher_server http://127.0.0.1:9 does not answer") and last.endswith("the dry run.")
    assert not list(tmp_path.iterdir())
    server.faults.clear()
    assert main([*small, "--dry_run", "--teacher_server", server.url]) == 2
    assert "tokenizer of its model 'tiny-teacher' differs" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
    assert main([*small, *gone]) == 2
    said = capsys.readouterr().err
    assert "gave no usable reply" in said and "Traceback" not in said and not list(tmp_path.iterdir())


def test_a_real_server():
    """A server that the environment names answers like the small one."""
    url, name = os.environ.get("EFFOPD_TEACHER_SERVER"), os.environ.get("EFFOPD_TEACHER_TOKENIZER")
    if not url or not name:
        pytest.skip("needs EFFOPD_TEACHER_SERVER, the URL of a vLLM server, and EFFOPD_TEACHER_TOKENIZER, its model")
    real = AutoTokenizer.from_pretrained(name)
    teacher = open_teacher(settings(url, teacher_top_k=8, teacher_server_timeout=60.0), real, len(real))
    ids = real("The capital of France is Paris.")["input_ids"]
    (scored,) = teacher.score([ids], [1])
    assert scored.logq.shape == (len(ids) - 1, 8) and (scored.logq[:, 0] >= scored.sampled - 1e-6).all()
