"""Which checkpoints a path holds."""

from __future__ import annotations

import json

import pytest

from effopd.errors import CheckpointError
from effopd.weights import find_snapshots


def fill(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "model.safetensors").touch()
    return root


def steps(path, **kwargs):
    return [snapshot.step for snapshot in find_snapshots(path, **kwargs)]


def test_a_run_directory(tmp_path):
    fill(tmp_path, [f"trajectory/step-{s:06d}" for s in (0, 1, 2, 4, 8, 10)] + ["checkpoints/step-000010"])
    (tmp_path / "config.yaml").write_text("# torch 2\ntrajectory: powers_of_two\n")
    (tmp_path / "model.safetensors").touch()
    found = find_snapshots(tmp_path)
    assert [s.step for s in found] == [0, 1, 2, 4, 8, 10]
    assert found[3].path == tmp_path / "trajectory" / "step-000004"
    assert steps(tmp_path, steps=[8, 2]) == [2, 8]


def test_checkpoints_of_transformers(tmp_path):
    assert steps(fill(tmp_path, ["checkpoint-1500", "checkpoint-500", "checkpoint-1000"])) == [500, 1000, 1500]


def test_a_final_model_beside_its_checkpoints_is_one_checkpoint(tmp_path):
    fill(tmp_path, ["checkpoint-500"])
    (tmp_path / "model.safetensors").touch()
    assert steps(tmp_path) == [None]


@pytest.mark.parametrize(("name", "expected"), [("checkpoint-20", 20), ("step-000008", 8), ("final", None)])
def test_a_single_checkpoint(tmp_path, name, expected):
    assert steps(fill(tmp_path, [name]) / name) == [expected]


def test_a_single_checkpoint_with_trainer_state(tmp_path):
    fill(tmp_path, ["final"])
    (tmp_path / "final" / "trainer_state.json").write_text(json.dumps({"global_step": 77}))
    assert steps(tmp_path / "final") == [77]
    with pytest.raises(CheckpointError, match=r"single checkpoint \(step 77\), not a trajectory"):
        find_snapshots(tmp_path / "final", steps=[1])


@pytest.mark.parametrize(
    ("rule", "have", "missing"),
    [
        ("powers_of_two", [0, 1, 2, 8, 10], "4"),
        ("powers_of_two", [1, 2, 4], "0"),
        ("4", [0, 4, 12, 16], "8"),
        ("4", [0, 4, 12, 14], "8"),
        (None, [0, 4, 8, 12, 20, 24], "16"),
        (None, [500, 1000, 2000, 2500], "1500"),
        (None, [0, 1, 2, 8, 16], "4"),
    ],
)
def test_a_gap_is_named(tmp_path, rule, have, missing):
    fill(tmp_path, [f"trajectory/step-{s:06d}" for s in have])
    if rule is not None:
        (tmp_path / "config.yaml").write_text(f"trajectory: {rule}\n")
    with pytest.raises(CheckpointError, match=rf"has a gap: step {missing} missing.*--steps"):
        find_snapshots(tmp_path)
    assert steps(tmp_path, steps=have[-2:]) == have[-2:]


@pytest.mark.parametrize(
    "have", [[1500, 2000], [0, 7, 50], [0, 4, 8, 10], [1, 2, 4, 8, 16, 20], [0, 100, 300, 900], [3]]
)
def test_no_gap_where_nothing_says_so(tmp_path, have):
    assert steps(fill(tmp_path, [f"step-{s}" for s in have])) == have


def test_mistakes(tmp_path):
    fill(tmp_path, ["trajectory/step-000000", "trajectory/step-000001"])
    with pytest.raises(CheckpointError, match="has no step 5: it has 0, 1"):
        find_snapshots(tmp_path, steps=[1, 5])
    (tmp_path / "trajectory" / "step-000001" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"step-000001 has no model\.safetensors"):
        find_snapshots(tmp_path)
    assert steps(tmp_path, steps=[0]) == [0]


@pytest.mark.parametrize(
    ("name", "message"), [("missing", "hf download"), (".", "or a run directory with a trajectory")]
)
def test_nothing_there(tmp_path, name, message):
    with pytest.raises(CheckpointError, match=message):
        find_snapshots(tmp_path / name)


def test_an_adapter_is_one_snapshot(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert steps(tmp_path) == [None]
