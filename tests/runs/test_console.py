"""What a run says on the console: lines of rows, in the place of transformers' dictionaries."""

from __future__ import annotations

import io
import math
import re
import sys
import warnings
from types import SimpleNamespace

import pytest
from helpers.tiny_run import make_trainer
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from effopd import EffOPDConfig
from effopd.commands.main import _finish, main
from effopd.common.files import append_row
from effopd.runs.console import LinesAlone, LinesWithBar
from effopd.runs.lines import closing_lines, duration, eval_line, number, step_line
from effopd.runs.records import Costs, EvaluationRecord, StepRecord

ROW = {
    "loss": 0.0123,
    "learning_rate": 3e-5,
    "completions/mean_length": 11.4,
    "completions/clipped_ratio": 0.0,
    "cost/net_seconds": 14.2,
    "cost/search_seconds": 1.0,
    "cost/net_generated_tokens": 12345,
    "effopd/accepted_scale": 21.7,
    "health/reverse_kl": 0.0456,
}
EVAL = {
    "eval_kl": 0.0031, "eval_kl_se": 0.0004, "eval_accuracy": 0.789, "eval_accuracy_low": 0.735,
    "eval_accuracy_high": 0.835, "eval_runtime": 1.0,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def line_of(row, step, steps, **options) -> str:
    return step_line(StepRecord.from_row({"step": step, **row}), steps, **options)


def evaluation_line(row, step) -> str:
    return eval_line(EvaluationRecord.from_row({"step": step, **row}))


def test_a_step_is_a_line():
    assert line_of(ROW, 12, 96) == (
        "step 12/96  KL 0.0123  lr 3.0e-05  length 11  net 14 s (search 7 %)  tokens 12,345  jump 21.7Δ"
    )
    assert "loss 0.0123  KL 0.0456" in line_of(ROW, 12, 96, loss_is_kl=False)
    assert "mean jump 21.7Δ" in line_of(ROW, 12, 96, averaged=True)
    assert line_of(ROW | {"effopd/accepted_scale": 0.0}, 12, 96).endswith("jump none")
    assert line_of(ROW | {"effopd/accepted_scale": -0.5}, 12, 96).endswith("jump -0.5Δ")
    assert "net 14 s of CPU (search 7 %)" in line_of(ROW, 12, 96, clock="cpu")
    assert "length 11 (3 % cut)" in line_of(ROW | {"completions/clipped_ratio": 0.03}, 12, 96)


def test_what_a_row_lacks_is_left_out():
    assert line_of({"loss": 0.5}, 3, 100) == "step   3/100  KL 0.5000"
    nothing = dict.fromkeys(ROW)
    assert line_of(nothing, 3, 4) == line_of(nothing, 3, 4, loss_is_kl=False) == line_of({}, 3, 4) == "step 3/4"
    assert evaluation_line(dict.fromkeys(EVAL), 3) == "eval @3"


def test_reinforcement_learning_shows_its_reward():
    row = ROW | {"loss": 3e-9, "reward": 0.28125, "kl": 3.63e-5, "entropy": 0.2244, "frac_reward_zero_std": 0.25}
    line = line_of({k: v for k, v in row.items() if not k.startswith("effopd/")}, 2, 96, loss_is_kl=False)
    assert line.startswith(
        "step  2/96  reward 0.281  tied groups 25 %  KL to start 3.63e-05  entropy 0.224  lr 3.0e-05"
    )
    assert "loss" not in line


def test_an_evaluation_is_a_line():
    assert evaluation_line(EVAL, 12) == "eval @12  KL 0.0031 ± 0.0004  accuracy 0.789 [0.735, 0.835]"
    assert evaluation_line({"eval_kl": 9.59e-4, "eval_kl_se": 1.2e-4}, 12) == "eval @12  KL 9.59e-04 ± 1.20e-04"
    assert evaluation_line({"eval_loss": 0.25, "eval_runtime": 1.0}, 8) == "eval @8  loss 0.2500"
    assert evaluation_line({"test_kl": 0.25, "test_runtime": 1.0}, 8) == "test @8  KL 0.2500"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0000"), (0.0123, "0.0123"), (1.25e-5, "1.25e-05"), (-0.5, "-0.5000"), (123456.0, "1.23e+05"),
     (math.nan, "nan"), (math.inf, "inf")],
)  # fmt: skip
def test_numbers_of_any_size_stay_short(value, text):
    assert number(value) == text


def test_durations():
    assert [duration(s) for s in (0.26, 14.2, 754, 36000)] == ["0.3 s", "14 s", "12.6 min", "10.0 h"]


def test_the_end_says_what_was_reached_and_what_to_do_next(tmp_path):
    root = tmp_path / "a run"
    root.mkdir()
    for step, kl in ((0, 0.25), (12, 0.0031)):
        append_row(root / "evals.jsonl", EVAL | {"step": step, "eval_kl": kl})
    for scale in (21.7, 0.0, -0.5):
        append_row(root / "searches.jsonl", {"step": 1, "accepted_scale": scale})
    text = closing_lines(root, 12, Costs.from_row(ROW))
    assert f"Done: step 12. The model, its card and all rows are in {root}\n" in text
    assert "held out, step 0 → step 12:  KL 0.2500 → 0.0031 ± 0.0004  accuracy 0.789 → 0.789 [0.735, 0.835]" in text
    assert "net 14 s (search 7 %)  tokens 12,345" in text
    assert "look-ahead: jumps accepted in 2 of 3 searches (1 back)" in text
    assert text.endswith(f"\nNext: effopd report '{root}'")
    (root / "config.yaml").write_text("seed: 1\ncost_clock: cpu\nlearning_rate: 1\n")
    assert "net 14 s of CPU (search 7 %)" in closing_lines(root, 12, Costs.from_row(ROW))
    assert closing_lines(tmp_path / "none", 3, Costs()).count("\n") == 1
    text = closing_lines(root, 12, Costs.from_row(ROW), 60)
    assert "Stopped by SIGTERM after step 12 of 60" in text and "Done" not in text
    assert text.endswith("with --resume_from_checkpoint true")


@pytest.mark.parametrize(("terminated", "status"), [(False, 0), (True, 143)])
def test_a_run_that_sigterm_stopped_does_not_end_like_a_finished_one(tmp_path, capsys, terminated, status):
    trainer = SimpleNamespace(
        terminated=terminated, state=SimpleNamespace(global_step=4, max_steps=60), costs=Costs(),
        run_dir=SimpleNamespace(root=tmp_path), is_world_process_zero=lambda: True,
    )  # fmt: skip
    assert _finish(trainer) == status
    assert ("Stopped by SIGTERM after step 4 of 60" in capsys.readouterr().out) is terminated


def test_values_are_those_of_the_steps_that_are_named(tmp_path):
    for step in (2, 6):
        append_row(tmp_path / "evals.jsonl", EVAL | {"step": step})
        text = closing_lines(tmp_path, 6, Costs.from_row(ROW))
        assert ("held out, step 2 → step 6:  KL" if step == 6 else "held out, step 2:  KL") in text


def test_an_evaluation_whose_answers_cannot_be_graded_says_so():
    for found, said in ((3, True), (49, True), (50, False), (100, False), (None, False)):
        line = evaluation_line(EVAL | {"eval_answers": 100, "eval_answers_found": found}, 12)
        assert line.endswith(f"(only {found} of 100 answers could be graded)") == said
    assert "graded" not in evaluation_line(EVAL | {"eval_answers": 100}, 12)


@pytest.mark.slow
def test_a_run_says_lines_and_nothing_else(tmp_path, capsys):
    look_ahead = EffOPDConfig(strategy="line_search")
    trainer = make_trainer(tmp_path, effopd=look_ahead, max_steps=3, eval_steps=2, save_strategy="no")
    capsys.readouterr()
    trainer.train()
    trainer.log({"of_mine": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:5]] == ["step 1/3", "step 2/3", "eval @2", "step 3/3", "eval @3"]
    assert "jump" in lines[1] and all("search" in line for line in lines if line.startswith(("step 2", "step 3")))
    assert "of_mine" in lines[5] and len(lines) == 6
    trainer.remove_callback(PrinterCallback)  # whoever silenced the host's silences ours
    assert not any(isinstance(callback, LinesAlone) for callback in trainer.callback_handler.callbacks)


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_is_for_terminals(tmp_path, monkeypatch, terminal):
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    make_trainer(tmp_path, max_steps=2, eval_strategy="no", save_strategy="no", disable_tqdm=False).train()
    assert ("| 2/2 [" in screen.getvalue()) == terminal
    said = [part.strip() for part in re.split(r"[\r\n]", screen.getvalue())]
    assert [part[:8] for part in said if part.startswith("step")] == ["step 1/2", "step 2/2"]
    assert "{" not in screen.getvalue()


@pytest.mark.slow
def test_an_error_begins_on_a_line_of_its_own(tmp_path, monkeypatch):
    """`compare.runner.error_message` and whoever reads the screen look for it at the beginning of a
    line.
    """
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("effopd.distill.trainer.full_loss", _nan_in_the_second_step())
    flags = [*FLAGS, "--teacher_model_name_or_path", "testbed:teacher", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *flags]) == 2
    assert "| 1/3 [" in screen.getvalue()
    assert "\neffopd train: NonFiniteLossError: the loss of step 2" in screen.getvalue()


def _nan_in_the_second_step():
    from effopd.distill.divergence import full_loss

    calls = []

    def loss(*arguments, **settings):
        calls.append(1)
        value, entropy, count = full_loss(*arguments, **settings)
        return value * (math.nan if len(calls) > 1 else 1.0), entropy, count

    return loss


FLAGS = [
    "--model_name_or_path", "testbed:student", "--task", "testbed:chain_sum", "--train_size", "64", "--eval_size", "8",
    "--max_steps", "3", "--per_device_train_batch_size", "8", "--max_completion_length", "12", "--report_to", "none",
    "--use_cpu", "--save_strategy", "no",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["train", "--teacher_model_name_or_path", "testbed:teacher"],
        ["rl", "--num_generations", "4", "--per_device_train_batch_size", "16"],
    ],
)
def test_the_commands_print_lines_alone(tmp_path, capsys, command):
    """No row, no warning about the names that TRL uses, no bar of transformers; afterwards both are
    as they were.
    """
    flags = [*FLAGS, *command[1:], "--eval_strategy", "steps", "--eval_steps", "2", "--disable_tqdm", "true"]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert main([command[0], *flags, "--output_dir", str(tmp_path / "run")]) == 0
    assert not [w for w in heard if "checkpointing" in str(w.message)]
    assert transformers_logging.is_progress_bar_enabled()
    out, err = capsys.readouterr()
    starts = [line.split("  ")[0] for line in out.splitlines()]
    assert starts[:5] == ["step 1/3", "step 2/3", "eval @2", "step 3/3", "eval @3"]
    assert f"Next: effopd report {tmp_path / 'run'}" in out and "Done: step 3" in out
    assert ("reward" in out.splitlines()[0]) == (command[0] == "rl")
    assert "it/s" not in err and "Warning" not in err


def test_only_the_first_process_speaks(capsys):
    args = SimpleNamespace(logging_strategy="steps")
    for first in (False, True):
        state = SimpleNamespace(
            is_world_process_zero=first, is_local_process_zero=True, global_step=1, max_steps=2, logging_steps=1
        )
        for callback in (LinesAlone(), LinesWithBar()):
            callback.on_train_begin(args, state, None)
            callback.on_log(args, state, None, logs=dict(ROW))
            callback.on_evaluate(args, state, None, metrics=dict(EVAL))
            callback.on_log(args, state, None, logs={"train_runtime": 1.0})
            callback.on_train_end(args, state, None)
        lines = capsys.readouterr().out.splitlines()
        assert [line[:4] for line in lines] == (["step", "eval"] * 2 if first else [])


def test_ours_take_the_place_of_the_hosts(tmp_path):
    alone, barred = (make_trainer(tmp_path, disable_tqdm=quiet).callback_handler.callbacks for quiet in (True, False))
    assert [type(c) for c in alone if isinstance(c, PrinterCallback | ProgressCallback)] == [LinesAlone]
    assert [type(c) for c in barred if isinstance(c, PrinterCallback | ProgressCallback)] == [LinesWithBar]
