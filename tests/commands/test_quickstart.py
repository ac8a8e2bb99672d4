"""`effopd quickstart` end to end, a few steps long; and what its summary says."""

from __future__ import annotations

import json
import re

import pytest
import torch

from effopd.commands import quickstart
from effopd.commands.main import main
from effopd.commands.quickstart_results import summarize
from effopd.commands.quickstart_settings import ARMS, QuickstartArguments
from effopd.common.files import append_row, read_rows


@pytest.mark.slow
def test_quickstart_end_to_end(tmp_path, capsys, monkeypatch):
    root = tmp_path / "demo"
    small = ["--max_steps", "2", "--eval_steps", "1", "--eval_size", "16", "--prompts_per_step", "32"]
    flags = [*small, "--output_dir", str(root)]
    assert main(["quickstart", *flags]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((root / "summary.json").read_text())
    for arm in ("plain", "effopd", "newton_search"):
        assert {"steps", "seconds", "generated_tokens", "final_kl", "final_accuracy"} <= summary[arm].keys()
        assert summary[arm]["steps"] == 2 and summary[arm]["seconds"] > 0
    assert set(summary["effopd"]["accepted_scales"]) == {"1", "2"}
    assert set(summary["newton_search"]["accepted_scales"]) == {"2"}  # step 1 on the rollouts of step 2
    assert {"steps", "seconds", "generated_tokens"} <= summary["speedup"].keys()
    assert (root / "figure.png").stat().st_size > 10_000
    assert all(arm in (root / "report.html").read_text() for arm in ARMS)
    assert "held-out KL" in printed and "speed-up" in printed
    before, after = printed.split("plain OPD    step 0")[0], printed.rsplit("summary:")[-1]
    assert "effopd quickstart: plain OPD" in before.splitlines()[0] and "3 times, 2 steps each" in before
    assert f"Results: {root}" in before
    assert [line.split()[1] for line in after.splitlines() if line.startswith("  effopd")] == [
        "init", "train", "report"
    ]  # fmt: skip
    # without a terminal, a line an evaluation
    lines = [line for line in printed.splitlines() if re.search(r"step \d/2 ", line)]
    assert [re.split(r"  +", line)[:2] for line in lines] == [
        [label, f"step {step}/2"] for label in ARMS.values() for step in range(3)
    ]
    assert all(re.search(r"KL 0\.\d+ .*\(\d+ (s|min)(, about \d+ (s|min) left)?\)$", line) for line in lines)
    assert "left" in lines[1] and "left" not in lines[-1]
    first = [next(iter(read_rows(root / arm / "evals.jsonl"))) for arm in ARMS]
    assert len({row["eval_kl"] for row in first}) == 1  # same start, same held-out prompts, same noise

    started, before = [], tree(root)
    monkeypatch.setattr(quickstart, "_run_arm", lambda arm, arguments, folder, display: started.append(folder))
    monkeypatch.setattr(quickstart, "conclude", lambda *_: None)
    assert main(["quickstart", *flags]) == 0  # again: the earlier demo is kept
    (kept,) = (path for path in tmp_path.iterdir() if path.name.startswith("demo-"))
    assert tree(kept) == before and started == [root / arm for arm in ARMS]


def tree(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (["mine/evals.jsonl", "demo/summary.json"], r"holds demo, mine, which is not from a demo"),
        (["plain/evals.jsonl", "summary.json", "notes.txt"], r"holds notes\.txt, which"),
        ([f"{name}/evals.jsonl" for name in "abcd"], r"holds a, b, c, …, which"),
        (["report.html"], r"holds report\.html, which"),
    ],
)
def test_a_folder_that_holds_no_demo_stays_where_it_is(tmp_path, capsys, monkeypatch, there, message):
    root = tmp_path / "runs"
    for name in there:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    before = tree(tmp_path)
    monkeypatch.setattr(quickstart, "_run_arm", lambda *_: pytest.fail("it starts to train"))
    monkeypatch.chdir(root)
    for given in (str(root), ".", "../runs"):
        assert main(["quickstart", "--output_dir", given]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert re.search(message, said) and "Nothing was changed" in said
    assert tree(tmp_path) == before


def test_an_earlier_demo_is_moved_aside_but_not_from_within(tmp_path, capsys, monkeypatch):
    started = []
    monkeypatch.setattr(quickstart, "_run_arm", lambda arm, arguments, folder, display: started.append(folder))
    monkeypatch.setattr(quickstart, "conclude", lambda *_: None)
    root = tmp_path / "demo"
    for there in ([], ["plain"], ["plain", "effopd", "newton_search", "summary.json", ".DS_Store"]):
        for name in there:
            (root / name).mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert main(["quickstart", "--output_dir", "demo"]) == 0
        kept = [path for path in tmp_path.iterdir() if path.name.startswith("demo-")]
        assert [sorted(path.name for path in folder.iterdir()) for folder in kept] == (
            [sorted(there)] if there else []
        )
        for folder in kept:
            folder.rename(tmp_path / f"seen-{len(there)}")
    assert len(started) == 9
    root.mkdir()
    (root / ".DS_Store").write_text("")
    assert main(["quickstart", "--output_dir", "demo"]) == 0
    assert root.is_dir() and len(started) == 12  # nothing to move aside
    (root / "plain").mkdir()
    monkeypatch.chdir(root / "plain")
    for given in ("..", str(root)):
        assert main(["quickstart", "--output_dir", given]) == 2
        assert "working directory" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["quickstart", "--output_dir", "file"]) == 2
    assert "is a file" in capsys.readouterr().err
    assert len(started) == 12
    assert main(["quickstart", "--output_dir", "demo/plain/.."]) == 0
    assert not root.exists() and started[12:] == [root / arm for arm in ("plain", "effopd", "newton_search")]


def rows(root, arm, values, seconds):
    (root / arm).mkdir(parents=True)
    for i, value in enumerate(values):
        row = {
            "step": i,
            "eval_kl": value,
            "cost/net_seconds": seconds * i,
            "cost/net_generated_tokens": 100 * i,
            "cost/net_forward_tokens": 300 * i,
        }
        row |= {"eval_accuracy": 0.5, "eval_accuracy_low": 0.4, "eval_accuracy_high": 0.6}
        append_row(root / arm / "evals.jsonl", row)


def test_summary_finds_a_planted_speedup_and_reports_never(tmp_path):
    rows(tmp_path / "a", "plain", [0.9**i for i in range(31)], 1.0)
    rows(tmp_path / "a", "effopd", [0.9 ** (3 * i) for i in range(31)], 1.5)
    rows(tmp_path / "a", "newton_search", [0.9 ** (6 * i) for i in range(31)], 1.5)
    summary = summarize(tmp_path / "a", QuickstartArguments(max_steps=30))
    for speedup, steps in ((summary["speedup"], 3.0), (summary["newton_search"]["speedup"], 6.0)):
        assert speedup["steps"] == pytest.approx(steps, rel=0.2)
        assert speedup["seconds"] == pytest.approx(steps / 1.5, rel=0.2)

    rows(tmp_path / "b", "plain", [0.9**i for i in range(31)], 1.0)
    for arm in ("effopd", "newton_search"):
        rows(tmp_path / "b", arm, [0.99**i for i in range(31)], 1.0)
    speedup = summarize(tmp_path / "b", QuickstartArguments(max_steps=30))["speedup"]
    assert speedup["steps"] is None and speedup["seconds"] is None and "did not reach" in speedup["reason"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the clock of the CPU does not see its work")
@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_the_clock_reaches_the_runs_and_the_summary(tmp_path, clock):
    arguments = QuickstartArguments(cost_clock=clock, max_steps=2)
    for arm in ARMS:
        assert quickstart.settings(arm, arguments, tmp_path / "run").opd.cost_clock == clock
        rows(tmp_path, arm, [1.0, 0.9, 0.8], 1.0)
    assert summarize(tmp_path, arguments)["cost_clock"] == clock
    assert QuickstartArguments().cost_clock == "cpu"  # other processes do not change the speed-ups


def test_fast_changes_what_is_not_given(tmp_path):
    full, fast = QuickstartArguments(), QuickstartArguments(fast=True)
    assert full.max_steps == 48 and full.prompts_per_step == 64
    assert quickstart.settings("plain", full, tmp_path).opd.per_device_train_batch_size == 64
    assert (fast.max_steps, fast.eval_size, fast.prompts_per_step) == (12, 64, 32)
    given = QuickstartArguments(fast=True, max_steps=48, eval_size=256)
    assert (given.max_steps, given.eval_size, given.prompts_per_step) == (48, 256, 32)
    say = quickstart.introduction
    assert "about 3 minutes" in say(full, tmp_path) and "under a minute" in say(fast, tmp_path)
    assert "minute" not in say(given, tmp_path) and "minute" not in say(QuickstartArguments(max_steps=7), tmp_path)


def test_mistakes(capsys):
    assert main(["quickstart", "--max_steps", "0"]) == 2
    assert "--max_steps: expected at least 1, got 0" in capsys.readouterr().err
    assert main(["quickstart", "--family", "poetry"]) == 2
    assert "--family: expected one of" in capsys.readouterr().err
    assert main(["quickstart", "--prompts_per_step", "5000"]) == 2
    assert "--prompts_per_step: expected at most 4096" in capsys.readouterr().err


def test_a_wrong_setting_leaves_an_earlier_demo_where_it_is(tmp_path, capsys):
    (tmp_path / "demo" / "plain").mkdir(parents=True)
    assert main(["quickstart", "--seed", "-1", "--output_dir", str(tmp_path / "demo")]) == 2
    printed = capsys.readouterr()
    assert "--seed: expected a whole number" in printed.err and all(label in printed.out for label in ARMS.values())
    assert tree(tmp_path) == ["demo", "demo/plain"]
