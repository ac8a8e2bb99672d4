"""Models on the Hub are read at the revision that the settings name, wherever they are read.

The Hub is a cache without network. Its main branches hold only the configuration of a model with
too few tokens, so a place that forgets the revision fails. (They hold one at all because TRL takes
the model's class from there.)
"""

from __future__ import annotations

import hashlib
import json
import re

import pytest
import torch
from helpers.tiny_models import make_model, make_tokenizer
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from effopd.commands.evaluate import run_eval
from effopd.commands.main import main
from effopd.commands.rl import parse_rl
from effopd.commands.train import parse_train
from effopd.common.files import read_rows
from effopd.distill.teachers.manifest import live_sha256
from effopd.distill.teachers.settings import given_teachers, split_revision
from effopd.errors import CompatibilityError, ConfigError
from effopd.launch.dry_run import plan_tables
from effopd.launch.memory_estimate import sizes_of
from effopd.launch.model_size import model_size
from effopd.launch.opd import build_trainer, check_models_of
from effopd.launch.rl import build_rl_trainer
from effopd.launch.rl_dry_run import rl_plan_tables
from effopd.models.files import load_model, load_tokenizer
from effopd.models.fingerprint import weights_sha256

TASK = ["--task", "math:rows.jsonl", "--prompt_suffix", "", "--eval_size", "4"]
RUN = [
    *TASK, "--use_cpu", "--max_steps", "1", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4",
    "--max_completion_length", "4", "--report_to", "none", "--save_strategy", "no", "--output_dir", "run",
    "--activation_checkpointing", "false",
]  # fmt: skip
STUDENT = ["--model_name_or_path", "org/student", "--model_revision", "v2"]
TEACHER = ["--teacher_model_name_or_path", "org/teacher", "--teacher_model_revision", "v3"]
LORA = ["--use_peft", "true", "--lora_target_modules", "q_proj", "--lora_r", "2"]


def commit(name: str, revision: str) -> str:
    return hashlib.sha1(f"{name} {revision}".encode()).hexdigest()


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Write a model to the Hub's cache, as a download leaves it; the current directory has rows."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": f"{n} + 1 =", "answer": str(n + 1)} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name: str, revision: str, seed: int = 0, hidden: int = 16):
        root = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = root / "snapshots" / commit(name, revision)
        make_model(seed, hidden=hidden).save_pretrained(snapshot)
        make_tokenizer().save_pretrained(snapshot)
        (root / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(commit(name, revision))
        if not (root / "refs" / "main").exists():
            config = make_model(0, vocab_size=8).config
            config.architectures = ["Qwen3ForCausalLM"]
            config.save_pretrained(root / "snapshots" / commit(name, "main"))
            (root / "refs" / "main").write_text(commit(name, "main"))
        return snapshot

    return write


@pytest.mark.slow
def test_a_run_reads_no_other_revision(publish, tmp_path):
    publish("org/student", "v2")
    teacher = publish("org/teacher", "v3", seed=1)
    evaluates = ["--eval_strategy", "steps", "--eval_steps", "1"]
    assert main(["train", *STUDENT, *TEACHER, *RUN, *evaluates, "--effopd.strategy", "line_search"]) == 0
    assert [row["step"] for row in read_rows(tmp_path / "run" / "evals.jsonl")] == [0, 1]
    (entry,) = json.loads((tmp_path / "run" / "teachers.json").read_text())["teachers"]
    assert entry["revision"] == commit("org/teacher", "v3") and entry["sha256"] == weights_sha256(teacher)
    again = ["--model_name_or_path", "org/student", "--teacher_model_name_or_path", "org/teacher", *RUN]
    revisions = ["--model_init_kwargs", '{"revision": "v2"}', "--teacher_model_init_kwargs", '{"revision": "v3"}']
    trainer = build_trainer(parse_train([*again, *revisions, "--output_dir", "other"]))
    assert trainer._teacher_entries("org/teacher")[0].sha256 == weights_sha256(teacher)
    with pytest.raises(CompatibilityError, match="org/student"):
        build_trainer(parse_train([*again, "--output_dir", "third"]))


@pytest.mark.slow
def test_the_reference_and_other_teachers_of_a_curriculum_are_read_at_main(publish):
    publish("org/student", "v2")
    publish("org/teacher", "v3", seed=1)
    publish("org/other", "main", seed=2)
    reference = ["--reference_model_name_or_path", "org/other", "--lambda_extrapolation", "1.25"]
    build_trainer(parse_train([*STUDENT, *TEACHER, *RUN, *reference]))
    stages = ["--curriculum", "prompt_length", "--curriculum_stages", "2", "--curriculum_teachers", "org/other",
              "org/teacher"]  # fmt: skip
    trainer = build_trainer(parse_train([*STUDENT, *TEACHER, *RUN, *stages, "--max_steps", "2"]))
    entries = trainer._teacher_entries("org/teacher")
    assert {entry.name: entry.revision for entry in entries} == {
        "org/teacher": commit("org/teacher", "v3"), "org/other": commit("org/other", "main")
    }  # fmt: skip


@pytest.mark.slow
def test_each_of_several_teachers_is_read_at_its_own_revision(publish, tmp_path):
    publish("org/student", "v2")
    hashes = {v: weights_sha256(publish("org/teacher", v, seed=n)) for n, v in enumerate(("v3", "refs/pr/1"), start=1)}
    rows = [{"problem": f"{n} + 1 =", "answer": str(n + 1), "teacher": "ab"[n % 2]} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers = ["--teachers", "a=org/teacher@v3", "b=org/teacher@refs/pr/1"]
    settings = parse_train([*STUDENT, *RUN, *teachers])
    assert main(["train", *STUDENT, *RUN, *teachers]) == 0
    entries = {each["label"]: each for each in json.loads((tmp_path / "run/teachers.json").read_text())["teachers"]}
    for label, revision in (("a", "v3"), ("b", "refs/pr/1")):
        found = entries[label]
        assert (found["name"], found["revision"], found["sha256"]) == (
            "org/teacher", commit("org/teacher", revision), hashes[revision]
        )  # fmt: skip
    again = parse_train(["--config", "run/config.yaml", "--output_dir", "other"])
    assert again.opd.teacher_sources == settings.opd.teacher_sources
    assert [each.name for each in check_models_of(again)] == ["org/student", "org/teacher", "org/teacher"]
    plan_tables(again)
    with pytest.raises(CompatibilityError, match="org/teacher"):  # the main branch, as before
        build_trainer(
            parse_train([*STUDENT, *RUN, "--teachers", "a=org/teacher@v3", "b=org/teacher", "--output_dir", "third"])
        )


@pytest.mark.slow
def test_each_teacher_of_a_curriculum_is_read_at_its_own_revision(publish):
    publish("org/student", "v2")
    hashes = {v: weights_sha256(publish("org/teacher", v, seed=n)) for n, v in enumerate(("v3", "v4"), start=1)}
    stages = ["--curriculum", "prompt_length", "--curriculum_teachers", "org/teacher@v4", "org/teacher"]
    settings = parse_train([*STUDENT, *TEACHER, *RUN, *stages, "--max_steps", "2"])
    assert len(check_models_of(settings)) == 3  # the second stage has the teacher of evaluations
    trainer = build_trainer(settings)
    entries = {entry.label: (entry.name, entry.sha256) for entry in trainer._teacher_entries("org/teacher")}
    first, named = ("org/teacher", hashes["v4"]), ("org/teacher", hashes["v3"])
    assert entries == {"teacher": named, "stage 1": first, "stage 2": named}
    trainer.train()
    assert live_sha256(trainer.teacher_model) == hashes["v3"]
    trainer.use_teacher("org/teacher@v4")
    assert live_sha256(trainer.teacher_model) == hashes["v4"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--teachers", "a=org/teacher@"],
            "--teachers 'org/teacher@': a part is missing; expected a folder, a Hub id",
        ),
        (["--teachers", "a=here@v1"], "--teachers 'here@v1': a folder has no revisions"),
        (["--curriculum", "nll", "--curriculum_teachers", "@v1", "x"], "curriculum_teachers '@v1': a part is missing"),
    ],
)
def test_a_wrong_revision_is_refused(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "at@home").mkdir()
    assert split_revision("at@home") == ("at@home", None) and split_revision("./no@v1") == ("./no@v1", None)
    assert split_revision("org/teacher@v1") == ("org/teacher", "v1")
    teacher = TEACHER[:2] if "--curriculum" in flags else []
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_train([*STUDENT, *teacher, *RUN, *flags])
    with pytest.raises(ConfigError, match=re.escape("teacher_model['a'] 'here@v1': a folder has no revisions")):
        given_teachers({"a": "here@v1"})


@pytest.mark.slow
def test_the_reference_is_read_at_its_own_revision(publish):
    publish("org/student", "v2")
    publish("org/teacher", "v3", seed=1)
    publish("org/other", "v4", seed=2)
    reference = ["--reference_model_name_or_path", "org/other", "--lambda_extrapolation", "1.25"]
    settings = parse_train([*STUDENT, *TEACHER, *RUN, *reference, "--reference_model_revision", "v4"])
    check_models_of(settings)
    trainer = build_trainer(settings)
    read = trainer.accelerator.unwrap_model(trainer.reference_model).get_input_embeddings().weight
    assert torch.equal(read, make_model(2).get_input_embeddings().weight)
    with pytest.raises(ConfigError, match="reference_model_revision='v4' has no effect"):
        parse_train([*STUDENT, *TEACHER, *RUN, "--reference_model_revision", "v4"])


@pytest.mark.slow
def test_accuracy_of_a_revision(publish, tmp_path):
    publish("org/student", "v2")
    flags = ["--model", "org/student", "--eval_task", "math:rows.jsonl", "--max_new_tokens", "4"]
    assert main(["eval", *flags, "--model_revision", "v2", "--output", "answers.jsonl"]) == 0
    assert json.loads((tmp_path / "answers.summary.json").read_text())["model_revision"] == "v2"
    with pytest.raises(CompatibilityError):
        run_eval(flags)


@pytest.mark.slow
def test_sizes_are_those_of_the_revision(publish):
    for revision, hidden in (("main", 16), ("v2", 24), ("v3", 32)):
        publish("org/student", revision, hidden=hidden)
    counts = {hidden: make_model(0, hidden=hidden).num_parameters() for hidden in (16, 24, 32)}
    assert model_size("org/student", revision="v3").parameters == counts[32]
    same = ["--teacher_model_name_or_path", "org/student", "--teacher_model_revision", "v3", "--lambda_extrapolation",
            "1.25", "--reference_model_name_or_path", "org/student"]  # fmt: skip
    settings = parse_train([*STUDENT, *same, *RUN])
    sizes = sizes_of(settings)
    assert sizes.student.parameters == counts[24]
    assert [size.parameters for size in sizes.frozen.values()] == [counts[32], counts[16]]
    assert [model.meta.num_parameters() for model in check_models_of(settings)] == [counts[24], counts[32], counts[16]]
    plan_tables(settings)
    dgrpo = ["--algorithm", "dgrpo", *STUDENT, "--teacher_model_name_or_path", "org/student", *TASK]
    rl = parse_rl([*dgrpo, "--teacher_model_init_kwargs", '{"revision": "v3"}', "--use_cpu"])
    (cells,) = [list(c.cells) for c in rl_plan_tables(rl)[0].columns][1:]
    assert [f"{n / 1e6:.3g} M" in " ".join(cells) for n in (counts[24], counts[32])] == [True, True]


@pytest.mark.slow
def test_reinforcement_learning_with_a_teacher(publish):
    publish("org/student", "v2")
    publish("org/teacher", "v3", seed=1)
    flags = ["--algorithm", "dgrpo", *STUDENT, *TEACHER[:2], "--teacher_model_init_kwargs", '{"revision": "v3"}']
    trainer = build_rl_trainer(parse_rl([*flags, *RUN, "--num_generations", "2"]))
    teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
    assert torch.equal(teacher.get_input_embeddings().weight, make_model(1).get_input_embeddings().weight)


@pytest.mark.slow
def test_stored_rollouts(publish, capsys):
    publish("org/student", "v2")
    publish("org/teacher", "v3", seed=1)
    publish("org/teacher", "main", seed=2)
    cache = [*TASK, "--max_completion_length", "4", "--batch_size", "8", "--output_dir", "stored"]
    assert main(["cache", *STUDENT, *TEACHER, *cache]) == 0
    offline = ["train", *STUDENT, "--rollouts", "stored", *RUN, "--eval_strategy", "steps", "--eval_steps", "1"]
    assert main([*offline, *TEACHER, "--evaluation_teacher"]) == 0
    capsys.readouterr()
    assert main([*offline, *TEACHER[:2], "--evaluation_teacher", "--output_dir", "other"]) == 2
    assert "org/teacher is not the teacher that scored --rollouts stored (org/teacher at revision v3" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_an_adapter_names_the_revision_of_its_base(publish, tmp_path):
    base = publish("org/student", "v2")
    publish("org/teacher", "v3", seed=1)
    assert main(["train", *STUDENT, *TEACHER, *RUN, *LORA]) == 0
    adapter = tmp_path / "run"
    assert json.loads((adapter / "adapter_config.json").read_text())["revision"] == "v2"
    assert "from_pretrained('org/student', revision='v2')" in (adapter / "README.md").read_text()
    for file in adapter.glob("*token*"):
        file.unlink()
    assert len(load_tokenizer("--model", str(adapter))) == len(make_tokenizer())
    weights = load_model("--model", str(adapter)).state_dict()
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert (weights["model.embed_tokens.weight"] == plain["model.embed_tokens.weight"]).all()
