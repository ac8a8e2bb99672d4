"""The runner, with a launcher that stands in for training: what is done is never run again, what
was cut off is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from effopd.compare.grid import load_grid
from effopd.compare.runner import (
    DONE,
    LOG,
    SETTINGS,
    Runner,
    command,
    environment,
    failure_of,
    is_done,
    only_one,
    prepare,
    progress_of,
)
from effopd.errors import CheckpointError

#: Stands in for `python`: reads the settings it is given, notes when it ran, writes a row; fails
#: where told to.
FAKE = """
import json, os, sys, time, yaml
from pathlib import Path
settings = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
root = Path(settings["output_dir"])
with (root / "calls").open("a") as calls:
    calls.write(json.dumps({"start": time.time(), "threads": os.environ["OMP_NUM_THREADS"],
                            "device": os.environ.get("CUDA_VISIBLE_DEVICES"), "argv": sys.argv[1:]}) + "\\n")
if settings["seed"] in settings.get("fail", []):
    said = root / "say"
    sys.exit(said.read_text() if said.exists() else "planted failure")
time.sleep(settings.get("sleep", 0))
(root / "evals.jsonl").write_text(json.dumps({"step": 1}) + "\\n")
"""


def grid(tmp_path, **changes):
    fake = tmp_path / "fake.py"
    fake.write_text(textwrap.dedent(FAKE))
    values = {
        "output_dir": str(tmp_path / "grid"), "reference_learning_rate": 1.0e-3, "tasks": ["t"], "seeds": [0, 1, 2],
        "base": {}, "strategies": {"plain": {}, "other": {"x": 1}}, "workers": 2, "threads": 1,
        "launcher": [sys.executable, str(fake)],
    } | changes  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    return load_grid(tmp_path / "plan.yaml")


def calls(run):
    path = run.path / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_everything_runs_once_and_only_once(tmp_path):
    plan = grid(tmp_path)
    runs, events = plan.runs(), []
    assert Runner(plan, lambda event, run: events.append((event, run.name))).run(runs) == []
    assert all(is_done(run) and len(calls(run)) == 1 for run in runs)
    assert sorted(name for event, name in events if event == "done") == sorted(run.name for run in runs)
    assert Runner(plan).run([run for run in runs if not is_done(run)]) == []
    assert all(len(calls(run)) == 1 for run in runs)
    assert all(call["threads"] == "1" for run in runs for call in calls(run))


def test_a_failure_does_not_stop_the_others_and_is_tried_again(tmp_path):
    plan = grid(tmp_path, base={"fail": [1]})
    failed = Runner(plan).run(plan.runs())
    assert {run.seed for run in failed} == {1} and len(failed) == 2
    assert "planted failure" in (failed[0].path / LOG).read_text()
    assert [is_done(run) for run in plan.runs()] == [run.seed != 1 for run in plan.runs()]


def test_what_a_run_failed_with_is_its_own_last_attempts_message(tmp_path):
    plan = grid(tmp_path, seeds=[0], strategies={"plain": {}}, base={"fail": [0]})
    (run,) = plan.runs()
    prepare(run)
    bar = "\r 10%|#         | 2/20 [00:01<00:09]"
    (run.path / "say").write_text(
        f"first\n{bar}effopd train: NonFiniteLossError: the loss of step 3\n  is not finite."
    )
    Runner(plan).run([run])
    assert failure_of(run) == "effopd train: NonFiniteLossError: the loss of step 3 is not finite."
    (run.path / "say").write_text("Killed: out of memory")
    Runner(plan).run([run])
    assert failure_of(run) == "Killed: out of memory"


def test_a_long_run_reports_how_far_it_is(tmp_path):
    plan = grid(tmp_path, seeds=[0], strategies={"plain": {}}, base={"sleep": 0.3, "max_steps": 4})
    (run,) = plan.runs()
    events = []
    Runner(plan, lambda event, run: events.append(event), every=0.1).run([run])
    assert events[0] == "start" and events[-1] == "done" and set(events[1:-1]) == {"running"}
    (run.path / "evals.jsonl").unlink()
    assert progress_of(run) == "loading"
    (run.path / "evals.jsonl").write_text('{"step": 0, "eval_kl": 0.5}\n{"step": 2, "eval_kl": 0.25}\n')
    assert progress_of(run) == "step 2 of 4, held-out KL 0.25"
    (run.path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4')  # the last line is not complete yet
    assert progress_of(run) == "step 3 of 4, held-out KL 0.25"


@pytest.mark.slow
def test_no_more_at_a_time_than_workers(tmp_path):
    plan = grid(tmp_path, seeds=[0, 1], base={"sleep": 0.3}, workers=2)
    Runner(plan).run(plan.runs())
    spans = sorted((calls(run)[0]["start"], (run.path / "evals.jsonl").stat().st_mtime) for run in plan.runs())
    assert all(sum(s <= start < e for s, e in spans) <= 2 for start, _ in spans)


def test_each_worker_has_its_devices(tmp_path):
    plan = grid(tmp_path, devices=["0,1", "2,3"])
    Runner(plan).run(plan.runs())
    assert {call["device"] for run in plan.runs() for call in calls(run)} == {"0,1", "2,3"}
    assert environment(plan, 1)["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_other_settings_in_a_runs_folder_are_refused(tmp_path):
    plan = grid(tmp_path)
    Runner(plan).run(plan.runs())
    changed = grid(tmp_path, base={"max_steps": 7})
    with pytest.raises(CheckpointError, match="max_steps"):
        is_done(changed.runs()[0])
    moved = grid(tmp_path, output_dir=str(tmp_path / "elsewhere"))
    assert not is_done(moved.runs()[0])


def test_a_cut_off_run_resumes_from_a_checkpoint_or_starts_anew(tmp_path):
    run = grid(tmp_path).runs()[0]
    assert not prepare(run)
    (run.path / "metrics.jsonl").write_text('{"step": 3}\n')
    assert not prepare(run)
    assert not (run.path / "metrics.jsonl").exists()
    (run.path / "metrics.jsonl").write_text('{"step": 3}\n')
    (run.path / "checkpoints" / "step-000002").mkdir(parents=True)
    assert prepare(run)
    assert (run.path / "metrics.jsonl").exists()
    assert yaml.safe_load((run.path / SETTINGS).read_text()) == run.settings
    assert command(grid(tmp_path), run, resume=True)[-2:] == ["--resume_from_checkpoint", "true"]


def test_the_plain_command_is_one_that_can_be_typed(tmp_path):
    plan = grid(tmp_path, launcher=[])
    run = plan.runs()[0]
    assert command(plan, run, resume=False) == [
        sys.executable, "-m", "effopd.commands.main", "train", "--config", str(run.path / SETTINGS)
    ]  # fmt: skip


def test_two_at_once_on_one_grid_are_refused(tmp_path):
    with only_one(tmp_path / "grid"), pytest.raises(CheckpointError, match="another"), only_one(tmp_path / "grid"):
        pass
    with only_one(tmp_path / "grid"):
        pass


def test_a_run_left_behind_keeps_the_grid_locked(tmp_path):
    """The lock is inherited: it is free only when the orphan is gone, too."""
    plan = grid(tmp_path, seeds=[0], base={"sleep": 600}, strategies={"plain": {}})
    (run,) = plan.runs()
    script = tmp_path / "main.py"
    script.write_text(
        "from pathlib import Path\nfrom effopd.compare.grid import load_grid\n"
        "from effopd.compare.runner import Runner, only_one\n"
        f"plan = load_grid({str(tmp_path / 'plan.yaml')!r})\n"
        "with only_one(Path(plan.output_dir)) as lock:\n    Runner(plan, lock=lock).run(plan.runs())\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    wait_for(lambda: calls(run))
    process.kill()
    process.wait()
    with pytest.raises(CheckpointError, match="left behind"), only_one(Path(plan.output_dir)):
        pass
    (orphan,) = _alive(str(tmp_path / "fake.py"))
    os.kill(orphan, signal.SIGKILL)
    wait_for(lambda: _free(Path(plan.output_dir)))  # a process loses its command line before its files are closed


def test_an_interrupt_stops_the_children_and_leaves_nothing_done(tmp_path):
    script = tmp_path / "main.py"
    grid(tmp_path, base={"sleep": 600}, seeds=[0])
    script.write_text(
        f"from effopd.compare.grid import load_grid\nfrom effopd.compare.runner import Runner\n"
        f"plan = load_grid({str(tmp_path / 'plan.yaml')!r})\nRunner(plan).run(plan.runs())\n"
    )
    runs = load_grid(tmp_path / "plan.yaml").runs()
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # shells start background jobs with it ignored
    )
    wait_for(lambda: all(calls(run) for run in runs))
    process.send_signal(signal.SIGINT)
    assert process.wait(120) != 0
    assert not any((run.path / DONE).exists() for run in runs)
    assert not _alive(str(tmp_path / "fake.py"))


def wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _free(folder: Path) -> bool:
    """Whether nobody holds the lock of a grid."""
    try:
        with only_one(folder):
            return True
    except CheckpointError:
        return False


def _alive(word: str) -> list[int]:
    """Processes with `word` in their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if word in (folder / "cmdline").read_text():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found
