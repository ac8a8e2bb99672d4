"""What cannot be saved is refused before the first step, and what fails later costs no weights."""

from __future__ import annotations

import errno
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from helpers.tiny_models import make_model, make_task, make_tokenizer
from helpers.tiny_run import EFFOPD, make_trainer
from huggingface_hub import HfApi
from huggingface_hub.cli.hf import app
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback
from transformers.trainer_callback import ExportableState

from effopd import OPDConfig
from effopd.commands.main import main
from effopd.distill import saving
from effopd.distill.rl import TaskGRPOTrainer
from effopd.distill.rl_config import TaskGRPOConfig
from effopd.errors import CheckpointError, ConfigError
from effopd.tasks.base import Example, Task

pytestmark = pytest.mark.slow


RUN = {"eval_strategy": "no", "max_steps": 2, "save_steps": 1}


def everything(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


# -- the generation config -------------------------------------------------------------------------

IDLE = [
    {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
    {"top_k": 20, "min_p": 0.1},
    {"typical_p": 0.5, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4},
    {"early_stopping": True, "length_penalty": 2.0},
    {"output_scores": True, "output_hidden_states": True},
]


@pytest.mark.parametrize("settings", IDLE)
def test_settings_without_effect_do_not_keep_a_model_from_being_saved(tmp_path, caplog, settings):
    student = make_model(0)
    for name, value in settings.items():
        setattr(student.generation_config, name, value)
    trainer = make_trainer(tmp_path, student=student, **RUN | {"max_steps": 1})
    assert all(f"{name}={value}" in caplog.text for name, value in settings.items() if value)
    assert caplog.text.count("which transformers refuses to save") == 1
    trainer.train()
    trainer.save_final()
    for folder in (tmp_path, tmp_path / "checkpoints" / "step-000001"):
        config = GenerationConfig.from_pretrained(folder)
        config.validate(strict=True)
        assert config.eos_token_id == 2 and not config.do_sample
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == 2


def test_settings_with_an_effect_stay(tmp_path, caplog):
    student = make_model(0)
    student.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
    trainer = make_trainer(tmp_path, student=student, **RUN | {"max_steps": 1})
    trainer.train()
    saved = GenerationConfig.from_pretrained(tmp_path / "checkpoints" / "step-000001")
    assert (saved.do_sample, saved.temperature, saved.top_p, saved.top_k) == (True, 0.6, 0.9, 20)
    assert "which transformers refuses to save" not in caplog.text


def test_an_invalid_one_is_refused(tmp_path):
    student = make_model(0)
    student.generation_config.num_return_sequences = 3
    with pytest.raises(
        CheckpointError, match=r"generation_config cannot be saved.*num_return_sequences.*Correct generation_config"
    ):
        make_trainer(tmp_path, student=student, **RUN)
    assert not everything(tmp_path)


def test_reinforcement_learning_saves_it_too(tmp_path):
    student = make_model(0)
    student.generation_config.update(do_sample=False, temperature=0.6)
    task = make_task(16)
    args = TaskGRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        max_completion_length=4,
        num_generations=4,
        per_device_train_batch_size=8,
        beta=0.0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = TaskGRPOTrainer(student, args, task, processing_class=make_tokenizer())
    trainer.train()
    trainer.save_final()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.temperature in (None, 1.0)


@pytest.mark.parametrize("dry", [True, False])
def test_the_command_reads_the_file_before_anything_is_loaded(tmp_path, capsys, dry):
    for seed, name in enumerate(("student", "teacher")):
        make_model(seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"problem": f"{i} + {i} = ?", "answer": str(2 * i)}) + "\n" for i in range(16)))
    argv = [
        "train",
        "--model_name_or_path",
        str(tmp_path / "student"),
        "--teacher_model_name_or_path",
        str(tmp_path / "teacher"),
        "--task",
        f"math:{rows}",
        "--per_device_train_batch_size",
        "8",
        "--max_completion_length",
        "4",
        "--max_steps",
        "1",
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
        "--use_cpu",
        "true",
        "--as_chat",
        "false",
        "--output_dir",
        str(tmp_path / "run"),
        *(["--dry_run"] if dry else []),
    ]
    file = tmp_path / "student" / "generation_config.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps(good | {"num_return_sequences": 3}))
    assert main(argv) == 2
    assert "num_return_sequences" in capsys.readouterr().err and not (tmp_path / "run").exists()
    file.write_text(json.dumps(good | IDLE[0]))
    assert main(argv) == 0
    assert dry or (tmp_path / "run" / "model.safetensors").is_file()


# -- the rehearsal ---------------------------------------------------------------------------------


def unsavable_config(trainer):
    trainer.model.config.extra = object()


def unsavable_generation_config(trainer):
    trainer.model.generation_config.early_stopping = "sometimes"


def unsavable_tokenizer(trainer):
    trainer.processing_class.init_kwargs["extra"] = object()


def shared_weights(trainer):
    layers = trainer.model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight


def unpicklable_arguments(trainer):
    trainer.args.extra = lambda: None


def unpicklable_optimizer(trainer):
    build = trainer.create_optimizer

    def create(*args, **kwargs):
        optimizer = build(*args, **kwargs)
        optimizer.param_groups[0]["extra"] = lambda: None
        return optimizer

    trainer.create_optimizer = create


class Stateful(TrainerCallback, ExportableState):
    def state(self):
        return {"args": {}, "attributes": {"extra": object()}}


def stateful_callback(trainer):
    trainer.add_callback(Stateful())


PARTS = {
    unsavable_config: "the student's configuration",
    unsavable_generation_config: "the student's generation_config",
    unsavable_tokenizer: "the tokenizer or processor",
    shared_weights: "the student's weights",
    unpicklable_arguments: "the training arguments",
    unpicklable_optimizer: "the optimizer's state",
    stateful_callback: "the trainer's state",
}


@pytest.mark.parametrize("spoil", PARTS)
def test_what_cannot_be_saved_is_named_before_the_first_step(tmp_path, spoil):
    root = tmp_path / "a" / "run"
    trainer = make_trainer(root, **RUN)
    spoil(trainer)
    with pytest.raises(CheckpointError, match=f"{PARTS[spoil]} cannot be saved"):
        trainer.train()
    assert trainer.state.global_step == 0 and not everything(root)


def test_ids_that_are_no_json_are_named(tmp_path):
    task = make_task(64)
    odd = Task(
        task.name, tuple(Example(complex(i), e.prompt, e.answer) for i, e in enumerate(task.examples)), task.verify
    )
    trainer = make_trainer(tmp_path, **RUN)
    from effopd import EffOPDCallback

    trainer.add_callback(EffOPDCallback(trainer, EFFOPD, task=odd))
    with pytest.raises(CheckpointError, match="look-ahead's state cannot be saved"):
        trainer.train()


@pytest.mark.parametrize(
    "settings",
    [{}, {"effopd": EFFOPD}, {"save_only_model": True}, {"torch_compile": True, "torch_compile_backend": "eager"}],
)
def test_a_rehearsal_writes_no_tensor_and_leaves_nothing(tmp_path, monkeypatch, settings):
    seen, real = {}, saving.shutil.rmtree

    def look(folder, **kwargs):
        if ".rehearsal-" in str(folder):
            seen.update({path.name: path for path in folder.rglob("*")})
            assert all(not tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
            seen["names"] = set(load_file(folder / "model.safetensors"))
        real(folder, **kwargs)

    monkeypatch.setattr(saving.shutil, "rmtree", look)
    trainer = make_trainer(tmp_path, **RUN, **settings)
    trainer.train()
    checkpoint = trainer.run_dir.checkpoint(2)
    assert seen["names"] == set(load_file(checkpoint / "model.safetensors"))
    assert {path.name for path in checkpoint.iterdir()} - set(seen) <= {
        "rng_state.pth",
        "training_args.bin",
        "effopd_ledger.json",
        "effopd_settings.json",
        "effopd_anchor.safetensors",
        "effopd_state.json",
        "effopd_observations.safetensors",
        "teachers.json",
        "inputs.json",
    }
    assert not list(tmp_path.glob(".rehearsal-*"))
    assert torch.save is not saving.torch.save or torch.save.__module__ == "torch.serialization"
    assert safetensors.torch.save_file.__module__ == "safetensors.torch"


def test_a_rehearsal_does_not_disturb_training(tmp_path, monkeypatch):
    def trained(name):
        make_trainer(tmp_path / name, **RUN).train()
        return load_file(tmp_path / name / "checkpoints" / "step-000002" / "model.safetensors")

    with_it = trained("with")
    monkeypatch.setattr("effopd.distill.run_dir_mixin.rehearse", lambda trainer: None)
    assert all(torch.equal(tensor, with_it[name]) for name, tensor in trained("without").items())


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_a_run_directory_that_is_a_file(tmp_path, capsys, where):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="nothing can be written to the run directory"):
        make_trainer(tmp_path / where, **RUN).train()
    argv = [
        "train",
        "--model_name_or_path",
        "testbed:student",
        "--teacher_model_name_or_path",
        "testbed:teacher",
        "--task",
        "testbed:chain_sum",
        "--report_to",
        "none",
        "--output_dir",
        str(tmp_path / where),
    ]
    for extra in ([], ["--dry_run"]):
        assert main([*argv, *extra]) == 2
        assert "is not a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


# -- the last resort -------------------------------------------------------------------------------


def failing(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_final_save_that_fails_leaves_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, **RUN | {"save_strategy": "no"})
    trainer.train()
    trainer.processing_class.save_pretrained = failing
    with pytest.raises(
        CheckpointError, match=r"final model could not be saved.*No space left.*weights are in .*rescued"
    ):
        trainer.save_final()
    model = make_model(3)
    result = model.load_state_dict(load_file(tmp_path / "rescued" / "model.safetensors"), strict=False)
    assert result.missing_keys == ["lm_head.weight"] and not result.unexpected_keys
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), trainer.model.parameters(), strict=True))


def test_a_checkpoint_that_fails_leaves_the_weights_and_the_one_before(tmp_path):
    trainer = make_trainer(tmp_path, **RUN)
    save = trainer._save_rng_state
    trainer._save_rng_state = lambda folder: failing() if trainer.state.global_step == 2 else save(folder)
    with pytest.raises(
        CheckpointError, match=r"step 2 could not be saved.*rescued.*last complete checkpoint is .*step-000001"
    ):
        trainer.train()
    assert load_file(tmp_path / "rescued" / "model.safetensors")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    make_trainer(tmp_path, **RUN).train(resume_from_checkpoint=True)
    assert trainer.run_dir.checkpoint(2).is_dir()


def test_where_nothing_can_be_written_the_last_checkpoint_is_named(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **RUN)
    trainer.train()
    monkeypatch.setattr(trainer.model, "save_pretrained", failing)
    monkeypatch.setattr(safetensors.torch, "save_file", failing)
    with pytest.raises(CheckpointError, match=r"No space left.*last complete checkpoint is .*step-000002"):
        trainer.save_final()
    assert not (tmp_path / "rescued").exists()


def test_a_card_that_fails_costs_nothing_but_itself(tmp_path, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise TypeError("no card")

    monkeypatch.setattr("effopd.distill.run_dir_mixin.model_card", fails)
    trainer = make_trainer(tmp_path, **RUN)
    trainer.train()
    trainer.save_final()
    assert AutoModelForCausalLM.from_pretrained(tmp_path) and trainer.run_dir.checkpoint(2).is_dir()
    assert "The model card was not written: TypeError: no card" in caplog.text


# -- compiled models -------------------------------------------------------------------------------


@pytest.mark.parametrize("look", [None, EFFOPD], ids=["plain", "look-ahead"])
def test_a_compiled_run_saves_resumes_and_keeps_its_best_like_a_plain_one(tmp_path, look):
    settings = {
        "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "trajectory": "1", "effopd": look,
        "load_best_model_at_end": True, "metric_for_best_model": "kl",
    }  # fmt: skip
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    make_trainer(tmp_path / "plain", **settings).train()
    make_trainer(tmp_path / "part", **settings | {"max_steps": 2}, **compiled).train()
    trainer = make_trainer(tmp_path / "part", **settings, **compiled)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_final()
    for folder in ("checkpoints/step-000003", "trajectory/step-000003"):
        plain, other = (load_file(tmp_path / name / folder / "model.safetensors") for name in ("plain", "part"))
        assert plain.keys() == other.keys()
        assert all(torch.allclose(plain[name], other[name], atol=1e-4) for name in plain)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "part", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    best = load_file(trainer.run_dir.checkpoint(trainer.kept.step) / "model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in model.named_parameters() if name in best)
    assert "teacher" in (tmp_path / "part" / "README.md").read_text()


def test_compiled_adapters_train(tmp_path):
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(make_model(0), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    trainer = make_trainer(tmp_path, student=student, torch_compile=True, torch_compile_backend="eager", **RUN)
    trainer.train()
    saved = load_file(trainer.run_dir.checkpoint(2) / "adapter_model.safetensors")
    assert saved and not any("_orig_mod" in name for name in saved)


# -- the host's flags ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True restarts at step 0"),
        ({"train_sampling_strategy": "group_by_length"}, "has no effect, because TRL orders the prompts itself"),
    ],
)
def test_flags_that_would_lose_or_ignore_something_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, **settings)


def test_the_final_model_has_its_tokenizer(tmp_path):
    trainer = make_trainer(tmp_path, **RUN)
    trainer.train()
    trainer.save_final()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == make_tokenizer().chat_template


# -- publishing ------------------------------------------------------------------------------------


def _documented() -> str:
    page = Path(__file__).parents[2] / "docs" / "tutorials" / "own-data.md"
    (command,) = re.findall(r"^hf upload [^\\\n]*(?:\\\n[^\\\n]*)*", page.read_text(), re.MULTILINE)
    return command.replace("\\\n", " ")


def _of_the_error() -> str:
    with pytest.raises(ConfigError) as refused:
        OPDConfig(push_to_hub=True, use_cpu=True)
    return str(refused.value)[str(refused.value).index("hf upload") :]


@pytest.mark.parametrize("command", [_documented, _of_the_error])
def test_the_command_that_publishes_a_run_leaves_its_checkpoints_out(command, tmp_path, monkeypatch):
    """As `hf` itself reads the command; nothing is sent."""
    given = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, **_: SimpleNamespace(repo_id="me/model"))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **passed: given.update(passed))
    program, *words = shlex.split(command().replace("REPO", "me/model"))
    assert program == "hf"
    run = {word: str(tmp_path) for word in ("runs/first", "OUTPUT_DIR")}
    result = CliRunner().invoke(app, [run.get(word, word) for word in words])
    assert result.exit_code == 0, result.output
    whole = ["model.safetensors", "config.yaml", "metrics.jsonl"]
    private = ["checkpoints/step-000002/optimizer.pt", "trajectory/step-000001/model.safetensors", "training_args.bin"]
    names = [*whole, *private, "superseded/1/checkpoints/step-000008/model.safetensors"]
    kept = filter_repo_objects(names, allow_patterns=given["allow_patterns"], ignore_patterns=given["ignore_patterns"])
    assert given["repo_id"] == "me/model" and list(kept) == whole
