"""What a model's folder and configuration tell before weights are loaded: its class, its limits,
whether it is one.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from trl import ModelConfig

from effopd.commands.main import main
from effopd.errors import CompatibilityError
from effopd.launch import opd as launch
from effopd.launch import rl as launch_rl
from effopd.launch.adapters import adapter_config, check_adapter
from effopd.launch.meta_model import meta_model, positions
from effopd.models.folders import check_model_folder, check_whole_model


def save(model, folder: Path) -> str:
    model.config.eos_token_id = model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def small(kind: str, **settings):
    base = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(base | settings)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models, adapters, and what is neither; rows of a task."""
    root = tmp_path_factory.mktemp("folders")
    save(make_model(0), root / "student")
    save(make_model(1), root / "teacher")
    save(small("gpt2", n_positions=32, n_inner=32), root / "gpt2")
    save(small("opt", max_position_embeddings=32, ffn_dim=32, word_embed_proj_dim=16), root / "opt")
    save(small("llama", max_position_embeddings=32, intermediate_size=32), root / "llama")
    get_peft_model(
        make_model(0),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], base_model_name_or_path="my/base"),
    ).save_pretrained(root / "adapter")
    settings = json.loads((root / "adapter" / "adapter_config.json").read_text())
    (root / "adapter" / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "my/base"})
    )
    (root / "empty").mkdir()
    (root / "model.gguf").write_bytes(b"GGUF")
    shutil.copytree(root / "student", root / "weightless")
    (root / "weightless" / "model.safetensors").unlink()
    config = json.loads((root / "student" / "config.json").read_text())
    for name, change in (
        ("unknown", {"model_type": "qwen99", "architectures": ["Qwen99ForCausalLM"]}),
        ("headless", {"architectures": ["Qwen3Model"]}),
        ("unnamed", {"architectures": None}),
        ("missing", {"architectures": ["Qwen99ForCausalLM"]}),
    ):
        shutil.copytree(root / "student", root / name)
        (root / name / "config.json").write_text(json.dumps(config | change))
    rows = [{"problem": f"what is {n} + {n}", "answer": str(2 * n)} for n in range(40)]
    (root / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


BAD = {
    "adapter": "is an adapter of 'my/base': expected a whole model. Merge",
    "empty": "has no config.json",
    "model.gguf": "GGUF files are not read",
    "math.jsonl": "is a file: expected a model folder",
    "weightless": "holds no weights",
    "unknown": "cannot be read",
    "headless": "is a Qwen3Model: expected a decoder",
    "unnamed": "has no 'architectures'",
    "missing": "which transformers",
}


def flags(folders, **models):
    chosen = {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher"} | models
    named = [word for flag, name in chosen.items() for word in (f"--{flag}", str(folders / name))]
    return [
        *named,
        "--task",
        f"math:{folders / 'math.jsonl'}",
        "--prompt_suffix",
        "",
        "--use_cpu",
        "--report_to",
        "none",
    ]


@pytest.fixture
def nothing_is_loaded(monkeypatch, tmp_path):
    def loaded(*args, **kwargs):
        raise AssertionError("the models would have been loaded")

    for module, name in ((launch, "OPDTrainer"), (launch_rl, "TaskGRPOTrainer")):
        monkeypatch.setattr(module, name, loaded)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_model_is_refused_in_every_role(name, folders, nothing_is_loaded, capsys):
    roles = (
        {"model_name_or_path": name},
        {"teacher_model_name_or_path": name},
        {"reference_model_name_or_path": name},
    )
    for role in roles:
        for dry in ([], ["--dry_run"]):
            exopd = ["--lambda_extrapolation", "1.25"] * ("reference_model_name_or_path" in role)
            assert main(["train", *flags(folders, **role), *exopd, *dry]) == 2
            said = capsys.readouterr().err
            assert BAD[name] in said and f"--{next(iter(role))} " in said
    arguments = flags(folders, model_name_or_path=name)
    del arguments[2:4]
    assert main(["rl", "--num_generations", "4", "--per_device_train_batch_size", "8", *arguments]) == 2
    assert BAD[name] in capsys.readouterr().err


@pytest.mark.parametrize(("name", "table"), [("gpt2", True), ("opt", True), ("llama", False)])
def test_positions(name, table, folders):
    assert positions(meta_model("model", str(folders / name))) == (32, table)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_prompts_and_answers_beyond_a_table_of_positions_are_refused(name, folders, nothing_is_loaded, capsys):
    long = ["--max_completion_length", "30", "--as_chat", "false"]
    for role in ("model_name_or_path", "teacher_model_name_or_path"):
        for dry in ([], ["--dry_run"]):
            assert main(["train", *flags(folders, **{role: name}), *long, *dry]) == 2
            said = capsys.readouterr().err
            assert "has 32 positions" in said and "Set --max_completion_length to" in said
    arguments = flags(folders, model_name_or_path=name)
    del arguments[2:4]
    rl = ["--num_generations", "4", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1"]
    assert main(["rl", *arguments, *rl, *long]) == 2
    assert "has 32 positions" in capsys.readouterr().err
    task = ["--task", f"math:{folders / 'math.jsonl'}", "--as_chat", "false", "--prompt_suffix", ""]
    assert main(["eval", "--model", str(folders / name), *task, "--max_new_tokens", "30"]) == 2
    assert "Set --max_new_tokens to" in capsys.readouterr().err


@pytest.mark.slow
def test_beyond_computed_positions_is_a_warning(folders, nothing_is_loaded, caplog):
    arguments = flags(folders, teacher_model_name_or_path="llama")
    with caplog.at_level(logging.WARNING):
        assert main(["train", *arguments, "--max_completion_length", "30", "--dry_run"]) == 0
    assert "has 32 positions" in caplog.text and "It was not trained" in caplog.text


def test_one_target_is_a_list_of_one(folders):
    student = str(folders / "student")
    for given, wanted in ((["q_proj"], {"q_proj"}), ([".*q_proj"], ".*q_proj"), (["all-linear"], "all-linear")):
        model = ModelConfig(model_name_or_path=student, use_peft=True, lora_target_modules=given)
        assert adapter_config(model).target_modules == wanted
        check_adapter(model, meta_model("model", student))


@pytest.mark.slow
def test_a_vision_language_student_is_distilled_on_text(tmp_path, folders):
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        text = {
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            "rope_parameters": rope,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
        tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"patch_size": 4}, **tokens)
        save(Qwen2_5_VLForConditionalGeneration(config), tmp_path / name)
    run = [*flags(tmp_path), "--max_completion_length", "4", "--max_steps", "1", "--save_strategy", "no"]
    run[run.index("--task") + 1] = f"math:{folders / 'math.jsonl'}"
    run += ["--output_dir", str(tmp_path / "run")]
    assert main(["train", *run, "--dry_run"]) == 0
    assert main(["train", *run]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert main(["eval", "--model", str(tmp_path / "run"), "--max_new_tokens", "4"]) == 0


def test_a_hub_id_and_a_whole_folder_pass(folders):
    check_whole_model("--model", "org/model")
    check_whole_model("--model", str(folders / "student"))
    check_model_folder("--model", str(folders / "adapter"))
    with pytest.raises(CompatibilityError, match="an adapter of 'my/base'"):
        check_whole_model("--model", str(folders / "adapter"))
