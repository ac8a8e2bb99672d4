"""Figures come from the tables alone, and only those whose data exist."""

from __future__ import annotations

import itertools
import shutil

import matplotlib
import pytest
from helpers.tiny_checkpoints import save_base, save_trained, save_trajectory
from matplotlib.figure import Figure

from effopd.analysis.analyze import analyze
from effopd.errors import CheckpointError
from effopd.report.dynamics_data import Data, short_matrix, spread
from effopd.report.dynamics_figures import FIGURES, draw
from effopd.report.style import group_colors

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = {
    "norms",
    "layers",
    "spectrum",
    "subspaces_left",
    "subspaces_right",
    "first_last",
    "u1_path",
    "u1_tsne",
    "agreement",
    "embeddings",
    "sparsity",
    "rotation",
}
TRAJECTORY = {"subspaces_left", "subspaces_right", "first_last", "u1_path", "u1_tsne"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    base = save_base(root / "base")
    for seed in (1, 2):
        save_trajectory(root / f"opd-{seed}", base, seed)
    save_trajectory(root / "rl", base, 3)
    save_trained(root / "sft", base, 4)
    return root


@pytest.fixture
def unrendered(monkeypatch):
    """Everything but the pixels, which take half of the time."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: path.write_bytes(b"png"))


def names(paths):
    return {path.stem for path in paths}


@pytest.mark.slow
def test_all_figures_of_trajectories_with_seeds(folders, tmp_path):
    moved = shutil.copytree(folders, tmp_path / "checkpoints")
    runs = {"opd": [moved / "opd-1", moved / "opd-2"], "rl": moved / "rl", "sft": moved / "sft"}
    done = analyze(moved / "base", runs, tmp_path / "out", k=4)
    shutil.rmtree(moved)  # from here on there are only tables
    style = dict(matplotlib.rcParams)
    paths = draw(done.out)
    assert dict(matplotlib.rcParams) == style
    assert names(paths) == ALL == set(FIGURES)
    assert all(path.parent == done.out / "figures" and path.stat().st_size > 8_000 for path in paths)
    data = Data(done.out)
    assert list(data.moving) == ["opd", "rl"] and data.label("opd") == "opd (2 seeds)"
    band = data.band("opd", data.averaged[(data.averaged.metric == "stable_rank") & (data.averaged.run != "rl")])
    assert list(band.index) == [1, 2, 4, 8] and (band.low <= band["mean"]).all() and (band["mean"] <= band.high).all()


@pytest.mark.slow
def test_one_trajectory(folders, tmp_path, unrendered):
    done = analyze(folders / "base", {"rl": folders / "rl"}, tmp_path / "out", k=3)
    assert names(draw(done.out)) == ALL - {"agreement"}


def test_a_single_pair_has_no_figures_of_training(folders, tmp_path, unrendered):
    done = analyze(folders / "base", {"sft": folders / "sft"}, tmp_path / "out", k=3)
    assert names(draw(done.out)) == ALL - TRAJECTORY - {"agreement"}


@pytest.mark.slow
def test_two_pairs_and_metrics_left_out(folders, tmp_path, unrendered):
    runs = {"a": folders / "sft", "b": folders / "rl" / "trajectory" / "step-000008"}
    done = analyze(folders / "base", runs, tmp_path / "out", k=3)
    assert names(draw(done.out)) == ALL - TRAJECTORY
    lean = analyze(folders / "base", {"rl": folders / "rl"}, tmp_path / "lean", metrics=["norms"])
    assert names(draw(lean.out)) == {"norms", "layers"}


@pytest.mark.slow
def test_a_zero_update_can_be_drawn(folders, tmp_path, unrendered):
    done = analyze(folders / "base", {"same": folders / "base", "sft": folders / "sft"}, tmp_path / "out", k=3)
    assert {"norms", "layers", "spectrum"} <= names(draw(done.out))


def test_no_analysis(tmp_path):
    with pytest.raises(CheckpointError, match="no finished analysis"):
        draw(tmp_path)


def test_a_group_keeps_its_color():
    assert group_colors(["rl", "opd"])["opd"] == group_colors(["opd", "mine"])["opd"]
    colors = group_colors(["opd", "rl", *"abcdef"])
    assert len(set(colors.values())) == 8
    assert set(group_colors("abcdefghijk")) == set("abcdefghijk")  # more groups than colors


def test_labels_are_pushed_apart_and_stay_in_order():
    heights = spread([0.1, 0.5, 0.5, 0.52, 0.9], 0.1)
    assert heights == sorted(heights)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(heights))
    assert heights[0] == 0.1 and heights[-1] == 0.9
    assert short_matrix("experts.12.gate") == "experts.gate" and short_matrix("o") == "o"
