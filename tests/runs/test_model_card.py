"""The card in a run directory: valid, true, without holes; for distillation, adapters and
reinforcement learning.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from distill.test_rl import make_trainer as make_rl_trainer
from helpers.tiny_models import make_model, make_tokenizer
from helpers.tiny_run import make_trainer
from huggingface_hub import ModelCard

from effopd import OPDConfig
from effopd.commands.main import main
from effopd.common.files import read_rows
from effopd.runs.model_card import _learning_rate, is_hub_id

pytestmark = pytest.mark.slow


FLAGS = [
    "--model_name_or_path", "testbed:student", "--task", "testbed:chain_sum", "--train_size", "64", "--eval_size", "8",
    "--max_steps", "2", "--max_completion_length", "12", "--report_to", "none", "--use_cpu", "--disable_tqdm", "true",
    "--seed", "7", "--learning_rate", "2e-4",
]  # fmt: skip
TRAIN = [
    "train", *FLAGS, "--teacher_model_name_or_path", "testbed:teacher", "--per_device_train_batch_size", "8",
    "--effopd.strategy", "line_search", "--eval_strategy", "steps", "--eval_steps", "2", "--eval_on_start", "true",
]  # fmt: skip
LORA = ["--use_peft", "true", "--lora_r", "2", "--lora_target_modules", "q_proj", "down_proj"]
RL = ["rl", *FLAGS, "--per_device_train_batch_size", "16", "--num_generations", "4"]


def card_of(root: Path) -> ModelCard:
    card = ModelCard.load(root / "README.md")
    assert "None" not in card.content and "{{ " not in card.content and "{% " not in card.content
    assert card.data.base_model is None and card.data.license is None and "licence" not in card.data.to_dict()
    assert {"effopd", "trl"} <= set(card.data.tags)
    assert "`testbed:student`" in card.text and "`testbed:chain_sum`" in card.text
    assert "| seed | 7 |" in card.text and "| learning rate | 0.0002, constant" in card.text
    for part in (
        "eprint        = {2605.11739}",
        "@software{effopd,",
        "version = {0.",
        "vonwerra2020trl",
        "- trl 1.16",
    ):
        assert part in card.text
    return card


def answer_with(card: ModelCard, capsys) -> None:
    """Run the card's own snippet."""
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("adapter", [False, True])
def test_of_a_distilled_model(tmp_path, capsys, adapter):
    root = tmp_path / "run"
    assert main([*TRAIN, *(LORA if adapter else []), "--save_steps", "1", "--output_dir", str(root)]) == 0
    card = card_of(root)
    assert card.data.library_name == ("peft" if adapter else "transformers")
    assert "| teacher | `testbed:teacher` |" in card.text
    assert "| objective | reverse KL(student ‖ teacher), exact over the vocabulary |" in card.text
    assert "| strategy | `line_search`: " in card.text and "adapted by the look-ahead" in card.text
    assert "| steps | 2 of 2, 8 answers each |" in card.text
    assert ("| trained | LoRA adapter of rank 2 |" in card.text) == adapter and ("PeftModel" in card.text) == adapter
    first, last = read_rows(root / "evals.jsonl")
    found = f"KL {first['eval_kl']:.4f} → {last['eval_kl']:.4f} ± {last['eval_kl_se']:.4f}"
    assert f"Held out (8 prompts), from step 0 to step 2: {found}; accuracy " in card.text
    *_, row = read_rows(root / "metrics.jsonl")
    assert f"{row['cost/net_generated_tokens']:,} sampled tokens" in card.text
    assert "Look-ahead: jumps accepted in " in card.text
    capsys.readouterr()
    answer_with(card, capsys)


def test_of_a_model_after_reinforcement_learning(tmp_path, capsys):
    root = tmp_path / "run"
    assert main([*RL, "--save_strategy", "no", "--algorithm", "dapo", "--output_dir", str(root)]) == 0
    card = card_of(root)
    assert "tuned by reinforcement learning (DAPO)" in card.text and "teacher |" not in card.text
    assert "| objective | DAPO: reward 1 for a verified answer, the last 20 % of the length penalized" in card.text
    first, last = (row["reward"] for row in read_rows(root / "metrics.jsonl"))
    assert f"Mean training reward: {first:.3f} in step 1, {last:.3f} in step 2." in card.text
    assert "Not evaluated on held-out prompts." in card.text
    capsys.readouterr()
    answer_with(card, capsys)


def test_of_models_that_have_no_name(tmp_path):
    """From Python: model objects, no config.yaml; the card of a checkpoint says how far the run has
    come.
    """
    trainer = make_trainer(tmp_path / "opd", max_steps=4, save_steps=2, eval_strategy="no")
    cards = []
    trainer.create_model_card = lambda **names: (type(trainer).create_model_card(trainer, **names), cards.append(
        (tmp_path / "opd" / "README.md").read_text()
    ))  # fmt: skip
    trainer.train()
    assert ["| steps | 2 of 4" in text for text in cards] == [True, False] and "| steps | 4 of 4" in cards[1]
    assert "a model object without a name, distilled on-policy from a model object" in cards[0]
    assert "| strategy | none: plain on-policy distillation |" in cards[0] and "config.yaml" not in cards[0]
    rl = make_rl_trainer(tmp_path / "rl", save_strategy="no", max_steps=1)
    rl.train()
    rl.save_model()
    text = (tmp_path / "rl" / "README.md").read_text()
    assert "None" not in text + "".join(cards) and "| task | `letters` |" in text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "3e-05, constant"),
        ({"warmup_steps": 2}, "3e-05, constant"),
        ({"warmup_steps": 2, "lr_scheduler_type": "linear"}, "3e-05, linear, warm-up 2"),
        ({"warmup_steps": 2, "optim": "schedule_free_adamw"}, "3e-05, constant, warm-up 2"),
    ],
)
def test_a_warm_up_is_named_only_if_it_is_made(settings, text):
    args = OPDConfig(output_dir="unused", use_cpu=True, report_to="none", learning_rate=3e-5, **settings)
    assert _learning_rate(SimpleNamespace(args=args), None) == text


def test_the_base_model_is_named_if_it_is_on_the_hub(tmp_path):
    assert is_hub_id("Qwen/Qwen3-0.6B") and is_hub_id("gpt2")
    assert not any(map(is_hub_id, ("", str(tmp_path), "testbed:student", "a/b/c", "./gpt2")))
    trainer = make_trainer(tmp_path / "run", max_steps=1, eval_strategy="no", save_strategy="no")
    trainer.model.config._name_or_path = "Qwen/Qwen3-0.6B"
    trainer.create_model_card(tags="mine", dataset_name="some/data")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.base_model == "Qwen/Qwen3-0.6B" and card.data.datasets == "some/data" and "mine" in card.data.tags


def test_the_card_says_how_prompts_are_written_and_graded(tmp_path, capsys, monkeypatch):
    (tmp_path / "my_grades.py").write_text(
        "def grade(completion, example):\n    return float(example.answer in completion)\n"
    )
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{i} + 1", "sum": str(i + 1)} for i in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_model(0).save_pretrained("student")
    make_model(1).save_pretrained("teacher")
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{{ '' if enable_thinking else '-' }}"
    for name in ("student", "teacher"):
        tokenizer.save_pretrained(name)
    flags = [
        "--model_name_or_path",
        "student",
        "--teacher_model_name_or_path",
        "teacher",
        "--task",
        "math:rows.jsonl",
        "--task_args",
        '{"prompt_column": "question", "answer_column": "sum"}',
        "--verifier",
        "my_grades:grade",
        "--system_prompt",
        "be | brief",
        "--prompt_suffix",
        " now",
        "--chat_template_kwargs",
        '{"enable_thinking": false}',
        "--max_steps",
        "1",
        "--per_device_train_batch_size",
        "4",
        "--max_completion_length",
        "4",
        "--use_cpu",
        "--report_to",
        "none",
        "--eval_strategy",
        "no",
        "--save_strategy",
        "no",
        "--output_dir",
        "run",
        *LORA,
    ]
    assert main(["train", *flags]) == 0
    card = ModelCard.load("run/README.md")
    for row in (
        '| task_args | `{"prompt_column": "question", "answer_column": "sum"}` |',
        '| verifier | `"my_grades:grade"` |',
        '| system_prompt | `"be \\| brief"` |',
        '| prompt_suffix | `" now"` |',
        '| chat_template_kwargs | `{"enable_thinking": false}` |',
    ):
        assert row in card.text
    assert "as_chat" not in card.text and "eval_task" not in card.text  # defaults
    asked = """[{"role": "system", "content": 'be | brief'}, {"role": "user", "content": "Your question" + ' now'}]"""
    assert f"messages = {asked}\n" in card.text and "enable_thinking=False" in card.text
    # the base is named so that it is found from anywhere, in the adapter's own file, too
    assert f"from_pretrained({str(tmp_path / 'student')!r})" in card.text
    adapter = json.loads(Path("run/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "student")
    capsys.readouterr()
    answer_with(card, capsys)
    monkeypatch.chdir("/")
    elsewhere = ["--eval_task", f"math:{tmp_path}/rows.jsonl", "--eval_task_args", flags[7]]
    assert main(["eval", "--model", str(tmp_path / "run"), *elsewhere]) == 0
