"""Pairs of options: refused by name before training, or trained, resumed and evaluated together."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import shutil
import textwrap

import pandas
import pytest
import torch
from helpers.teacher_server import TeacherServer
from helpers.tiny_models import make_model, make_task, make_tokenizer
from helpers.tiny_run import make_trainer
from trl import ModelConfig

from effopd import EffOPDConfig, OPDConfig
from effopd.common.files import read_rows
from effopd.distill.curriculum import row_difficulty
from effopd.distill.offline_cache import collect
from effopd.distill.offline_store import Header, ModelIdentity, RolloutStore, prompts_sha256
from effopd.distill.offline_trainer import OfflineOPDTrainer
from effopd.distill.rl import TaskGRPOTrainer, TaskRLOOTrainer
from effopd.distill.served.trainer import ServedOPDTrainer
from effopd.errors import ConfigError, EffOPDError
from effopd.launch.dry_run import plan_tables
from effopd.launch.memory_estimate import teacher_choices
from effopd.launch.opd import RunSettings, build_trainer
from effopd.launch.run_models import kept_columns
from effopd.models.fingerprint import tokenizer_sha256, weights_sha256
from effopd.tasks import TaskConfig
from effopd.tasks.generate import encode_prompts

LENGTH = 6
NONE = {"teacher_model_name_or_path": None}
#: One representative value per option; the first key names it in errors.
OPTIONS = {
    "sampled": {"loss_type": "sampled"},
    "top_k": {"loss_type": "teacher_top_k", "teacher_top_k": 8},
    "negative": {"loss_type": "negative_advantage"},
    "discord": {"loss_type": "discord", "rollouts": "TRACES"},
    "rollouts": {"rollouts": "ROLLOUTS"},
    "lmbda": {"lmbda": 0.5, "traces": "TRACES"},
    "mixed": {"teacher_mixed_alpha": 0.2},
    "beta": {"beta": 0.5},
    "normalize": {"normalize_beta": True, "beta": 0.5},
    "baseline": {"baseline": "value", "loss_type": "sampled"},
    "samples": {"samples_per_prefix": 2, "loss_type": "sampled"},
    "entropy": {"highest_entropy_share": 0.5, "loss_type": "teacher_top_k"},
    "mask": {"token_mask": "first_special"},
    "by_answer": {"loss_weighting": "answer"},
    "exopd": {"lambda_extrapolation": 1.25, "reference_model_name_or_path": "OTHER"},
    "topd": {"rollout_horizon": "topd", "horizon_fraction": 0.5},
    "popd": {"rollout_horizon": "popd"},
    "prune": {
        "rollout_horizon": "prune", "prune_start_length": 4, "prune_min_length": 2, "prune_step": 1, "prune_margin": 1,
        "prune_drop": 0.2, "prune_top_k": 4,
    },
    "updates": {"updates_per_rollouts": 2},
    "replay": {"updates_per_rollouts": 2, "replay_batches": 2},
    "parts": {"updates_per_rollouts": 2, "num_mini_batches": 2},
    "served": {"teacher_server": "http://127.0.0.1:9", **NONE},
    "teachers": {"teachers": ["a=TEACHER", "b=OTHER"], **NONE},
    "one_in_memory": {"teachers_in_memory": "one", "teachers": ["a=TEACHER", "b=OTHER"], **NONE},
    "dtype": {"teacher_dtype": "bfloat16"},
    "offload": {"teacher_offload": True},
    "shard": {"teacher_shard": True},
    "curriculum": {"curriculum": "prompt_length", "curriculum_stages": 2},
    "stage_teachers": {"curriculum_teachers": ["OTHER", "TEACHER"], "curriculum": "prompt_length"},
    "ema": {"average_weights": "ema"},
    "k_step": {"k_step_lookahead": 2},
    "muon": {"optimizer_class": "torch.optim:Muon"},
    "accumulate": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "top_p": {"top_p": 0.9},
    "temperature": {"temperature": 0.7},
    "completions": {"log_completions": True},
}  # fmt: skip
#: Option → options that it refuses; each pair once.
REFUSED = {
    "sampled": "normalize beta updates parts replay lmbda top_p",
    "top_k": "beta normalize rollouts",
    "negative": "rollouts lmbda beta normalize exopd prune updates parts replay",
    "discord": "lmbda beta normalize mask exopd topd popd prune updates parts replay served teachers one_in_memory "
    "dtype offload shard curriculum stage_teachers top_p completions",
    "rollouts": "lmbda beta normalize baseline samples entropy mask exopd topd popd prune updates parts replay served "
    "teachers one_in_memory dtype offload shard curriculum stage_teachers top_p completions",
    "lmbda": "baseline samples prune teachers one_in_memory curriculum stage_teachers",
    "mixed": "negative discord rollouts lmbda prune served teachers one_in_memory shard top_p",
    "beta": "baseline samples entropy exopd",
    "normalize": "baseline samples entropy exopd",
    "baseline": "updates parts replay served top_p",
    "samples": "updates parts replay served top_p",
    "exopd": "served teachers one_in_memory",
    "prune": "parts served teachers one_in_memory",
    "served": "teachers one_in_memory dtype offload shard stage_teachers temperature",
    "replay": "stage_teachers one_in_memory",
    "teachers": "shard stage_teachers",
    "one_in_memory": "shard stage_teachers",
    "offload": "shard",
}


def merged(*options):
    """The settings together; `None` if two options set one setting to different values."""
    made = {}
    for key, value in (item for option in options for item in option.items()):
        if made.setdefault(key, value) != value:
            return None
    return made


def config(**settings):
    return OPDConfig(**{"use_cpu": True, "report_to": "none", "max_completion_length": LENGTH,
                        "teacher_model_name_or_path": "TEACHER"} | settings)  # fmt: skip


def test_every_pair_is_accepted_or_refused_with_the_names_of_both():
    refused = {frozenset((one, other)) for one, others in REFUSED.items() for other in others.split()}
    wrong = []
    for pair in itertools.combinations(OPTIONS, 2):
        settings = merged(*(OPTIONS[name] for name in pair))
        if settings is None:
            continue
        try:
            config(**settings)
            said = ""
        except EffOPDError as error:
            said = str(error)
        named = all(any(key in said for key in OPTIONS[name]) for name in pair)
        if bool(said) != (frozenset(pair) in refused) or (said and not named):
            wrong.append((pair, said))
    assert not wrong


def test_an_error_of_the_host_is_typed():
    with pytest.raises(ConfigError, match="load_best_model_at_end"):
        config(load_best_model_at_end=True, eval_strategy="no")


# -- dry run and run -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Word in `OPTIONS` → folder of a model, of rollouts or of traces; and the rows."""
    root, tokenizer = tmp_path_factory.mktemp("places"), make_tokenizer()
    for seed, name in enumerate(("STUDENT", "TEACHER", "OTHER")):
        make_model(seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = [
        {"prompt": f"{i % 10} + {i // 10} = ?"[: 9 - i % 3], "answer": str(i % 8), "teacher": "ab"[i % 2]}
        for i in range(32)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = [
        dataclasses.replace(example, prompt="a longer prompt than the task's") for example in make_task(16).examples
    ]
    task = dataclasses.replace(make_task(16), examples=tuple(examples), verify=lambda text, example: 1.0)
    prompts = encode_prompts(tokenizer, [example.prompt for example in task.examples])
    student, teacher = (ModelIdentity(str(root / n), None, weights_sha256(root / n)) for n in ("STUDENT", "TEACHER"))
    for name, sampler, top_k in (("ROLLOUTS", "student", 4), ("TRACES", "teacher", 0)):
        header = Header(
            teacher=teacher, student=student, sft_teacher=None, tokenizer=tokenizer_sha256(tokenizer), vocab_size=64,
            temperature=1.0, max_completion_length=LENGTH, seed=3, batch_size=16, dtype="auto", top_k=top_k,
            prompts=16, prompts_sha256=prompts_sha256(prompts), rows_per_file=16, sampler=sampler,
        )  # fmt: skip
        store = RolloutStore(root / name)
        store.open(header)
        collect(store, header, make_model(0), make_model(1), tokenizer, task)
    return root


def run_settings(places, output_dir, *names, effopd=None, model=None, **more):
    """Settings of a run of two steps with an evaluation, for `effopd train`."""
    settings = merged(*(OPTIONS[name] for name in names))
    assert settings is not None
    base = {
        "teacher_model_name_or_path": "TEACHER", "max_steps": 2, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4, "learning_rate": 1e-2, "activation_checkpointing": False, "save_steps": 1,
        "eval_strategy": "steps", "eval_steps": 2, "disable_tqdm": True, "eval_greedy": False, "save_total_limit": 3,
    }  # fmt: skip
    text = json.dumps(base | settings | more)
    for word in ("TEACHER", "OTHER", "ROLLOUTS", "TRACES"):
        text = text.replace(f'"{word}"', f'"{places / word}"').replace(f"={word}", f"={places / word}")
    return RunSettings(
        ModelConfig(model_name_or_path=str(places / "STUDENT"), **(model or {})),
        TaskConfig(task=f"math:{places}/rows.jsonl", train_size=24, eval_size=4, prompt_suffix=""),
        config(**json.loads(text), output_dir=str(output_dir)),
        EffOPDConfig(**(effopd or {"strategy": "none"})),
    )


SCORED = {"strategy": "line_search", "score_rollouts": 4}


@pytest.mark.parametrize(("names", "more", "said"), [
    (["exopd"], {"effopd": SCORED}, "lambda_extrapolation=1.25"),
    (["rollouts"], {"effopd": SCORED}, "--rollouts loads no teacher"),
    (["discord"], {"effopd": {"strategy": "fixed"}}, "--rollouts loads no teacher"),
    (
        ["rollouts"],
        {"evaluation_teacher": True, "eval_strategy": "no", "eval_steps": None, "eval_greedy": True},
        "evaluation_teacher=True",
    ),
    (["discord"], {"temperature": 0.7}, "temperature=0.7"),
    (["lmbda"], {"traces": None}, "lmbda=0.5"),
    (["lmbda"], {"max_completion_length": 5}, "max_completion_length=5"),
    (["curriculum", "updates"], {}, "curriculum_stages=2"),
    (["teachers"], {"teacher_column": "label"}, "label"),
])  # fmt: skip
def test_the_dry_run_refuses_with_the_message_of_the_run(places, tmp_path, names, more, said):
    told = []
    for check in (plan_tables, build_trainer):
        with pytest.raises(EffOPDError) as error:
            check(run_settings(places, tmp_path / "run", *names, **more))
        told.append((type(error.value), str(error.value)))
    assert told[0] == told[1] and said in told[0][1]
    assert not (tmp_path / "run").exists()


def test_the_dry_run_counts_the_teachers_that_are_in_memory_together(places, tmp_path):
    one, several, stages, one_in_memory = (
        float(teacher_choices(run_settings(places, tmp_path / "run", *names)).split(" GB")[0])
        for names in (["mask"], ["teachers"], ["stage_teachers"], ["one_in_memory"])
    )
    assert several == pytest.approx(2 * one, rel=0.1)
    assert stages == one_in_memory == one


# -- teachers and rows as arguments ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["exopd", "prune", "lmbda", "shard", "stage_teachers"])
def test_several_teachers_as_an_argument_have_the_checks_of_the_setting(name, tmp_path):
    told = []
    settings = OPTIONS[name] | {"max_completion_length": LENGTH, "eval_strategy": "no"}
    for build in (
        lambda: config(**settings, **OPTIONS["teachers"]),
        lambda: make_trainer(tmp_path, teacher={"a": make_model(1), "b": make_model(2)}, **settings),
    ):
        with pytest.raises(ConfigError) as error:
            build()
        told.append(str(error.value))
    assert told[0] == told[1]


@pytest.mark.parametrize(("name", "other"), [("rollouts", "OfflineOPDTrainer"), ("served", "ServedOPDTrainer")])
def test_a_trainer_refuses_the_settings_of_another(name, other, tmp_path):
    with pytest.raises(ConfigError, match=other):
        make_trainer(tmp_path, **OPTIONS[name])


def test_the_column_of_a_curriculum_is_kept_and_may_be_nested():
    assert kept_columns(config(**OPTIONS["teachers"], curriculum="column:extra.level")) == ("teacher", "extra.level")
    for row in ({"extra": {"level": 2}}, {"metadata": {"extra": {"level": 2}}}, {"metadata": '{"extra.level": 2}'}):
        assert row_difficulty("column:extra.level", row) == 2


# -- training --------------------------------------------------------------------------------------

LORA = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj"]}
RUNS = {
    "stages": (["stage_teachers", "exopd", "prune", "top_k", "by_answer", "accumulate", "mask"], {
        "effopd": {"strategy": "effopd", "validation_size": 4},
    }),
    "served": (["served", "normalize", "lmbda", "topd", "muon", "completions"], {"seed": 0}),  # on-policy, then not
    "mixed": (["mixed", "stage_teachers", "samples", "popd", "by_answer", "accumulate"], {"effopd": SCORED}),
    "teachers": (["one_in_memory", "baseline", "popd", "dtype"], {"effopd": SCORED, "model": LORA}),
    "offline": (["rollouts", "by_answer", "k_step"], {
        "evaluation_teacher": True, "charge_rollouts": True, "residualize": True,
        "effopd": {"strategy": "effopd", "validation_size": 4},
        "load_best_model_at_end": True, "metric_for_best_model": "kl", "save_steps": 2,
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with TeacherServer(make_model(1), make_tokenizer()) as running:
        yield running


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()])


def test_prompts_of_traces_count_for_the_length_of_the_server(places, server, tmp_path):
    for check in (plan_tables, build_trainer):
        with pytest.raises(ConfigError, match=r"max_model_len.*prompts of 31 and answers of 100 tokens"):
            check(run_settings(
                places, tmp_path / "run", "served", "lmbda", teacher_server=server.url, max_completion_length=100
            ))  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_options_train_resume_and_evaluate_together(name, places, server, tmp_path, one_thread):
    names, more = RUNS[name]
    if "served" in names:
        more = more | {"teacher_server": server.url}
    root = tmp_path / "run"
    plan_tables(run_settings(places, root, *names, **more))
    trainer = build_trainer(run_settings(places, root, *names, **more))
    trainer.train()
    rows = list(read_rows(root / "metrics.jsonl"))
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows if "loss" in row)
    assert any(row.get("eval_kl", -1.0) >= 0 for row in trainer.state.log_history)
    if "completions" in names:  # the table of a step has the answers that the step trained on
        for row in (row for row in rows if "loss" in row):
            table = pandas.read_parquet(root / "completions" / f"completions_{row['step']:05d}.parquet")
            given = table["prompt"].str.contains("longer").tolist()
            assert given == [not row["rollouts/on_policy"]] * 4
    end = weights(trainer)
    if name in ("stages", "mixed", "teachers"):
        first = root / "checkpoints" / "step-000001"
        shutil.rmtree(root / "checkpoints" / "step-000002")
        more = more | {"resume_from_checkpoint": str(first)}
        plan_tables(run_settings(places, root, *names, **more))
        resumed = build_trainer(run_settings(places, root, *names, **more))
        resumed.train(resume_from_checkpoint=str(first))
        assert torch.equal(weights(resumed), end)


# -- names -----------------------------------------------------------------------------------------

#: Private names that a subclass shares with a base class or replaces without calling it.
REPLACED = {
    "_measure_task", "_named_teachers", "_open_teachers", "_teacher_entries", "_teacher_parts", "_recall_best",
    "_objective", "_mixture_head", "_settled", "_issue_warnings_after_load", "_compute_loss",
}  # fmt: skip


def private_names(kind) -> dict[str, bool]:
    """Private attributes and methods that a class defines → whether super() is called there."""
    found: dict[str, bool] = {}
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    for item in tree.body:
        calls = "super()" in ast.unparse(item)
        if isinstance(item, ast.FunctionDef):
            found[item.name] = calls
        for node in ast.walk(item):
            stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stored and isinstance(node.value, ast.Name) and node.value.id == "self":
                found.setdefault(node.attr, False)
        targets = item.targets if isinstance(item, ast.Assign) else []
        found |= {target.id: False for target in targets if isinstance(target, ast.Name)}
    return {name: calls for name, calls in found.items() if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize("trainer", [ServedOPDTrainer, OfflineOPDTrainer, TaskGRPOTrainer, TaskRLOOTrainer])
def test_no_two_classes_of_a_trainer_use_one_private_name(trainer):
    """Also not one of ours and one of the hosts'."""
    kinds = [kind for kind in trainer.__mro__ if kind.__module__.split(".")[0] in ("effopd", "trl", "transformers")]
    names = {kind: private_names(kind) for kind in kinds}
    clashes = [
        (name, kind.__name__, base.__name__)
        for place, kind in enumerate(kinds)
        if kind.__module__.startswith("effopd")
        for base in kinds[place + 1 :]
        for name in names[kind].keys() & names[base].keys()
        if not names[kind][name] and name not in REPLACED
    ]
    assert not clashes
