"""Strategies keep their color everywhere, and no two lines of a figure look alike."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from effopd.report.style import GROUNDS, STRATEGY_COLORS, group_colors, looks, save, strategy_of


def linear(color):
    parts = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(color):
    """CIELAB coordinates, D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x = to_xyz @ linear(color) / np.array([0.9505, 1.0, 1.089])
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(a, b):
    low, high = sorted(float(linear(color) @ [0.2126, 0.7152, 0.0722]) for color in (a, b))
    return (high + 0.05) / (low + 0.05)


def test_figures_of_the_benchmarks_take_their_colors_from_the_style():
    for script in (Path(__file__).parents[2] / "benchmarks").glob("**/*.py"):
        assert not re.findall(r"[\"']#[0-9a-fA-F]{6}[\"']", script.read_text()), script.name


@pytest.mark.parametrize("ground", [0, 1])
def test_registered_colors_differ_and_stand_out(ground):
    colors = {name: pair[ground] for name, pair in STRATEGY_COLORS.items()}
    near = {(a, b): np.linalg.norm(lab(colors[a]) - lab(colors[b])) for a, b in itertools.combinations(colors, 2)}
    assert min(near.values()) > 20, min(near, key=near.get)
    assert min(contrast(color, GROUNDS[ground]) for color in colors.values()) > 3


@pytest.mark.parametrize(
    "names",
    [
        ("opd", "effopd"), ("rl", "grpo"), ("OPD", "opd"), tuple("abcdefgh"), ("sft", "effopd", "x"),
        ("line_search", "line_search-32", "line_search-lora", "effopd", "effopd-released"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ground", ["light", "dark"])
def test_two_lines_differ_in_color_or_in_shade_and_dash(names, ground):
    found = looks({name: name for name in names})
    assert list(found) == list(names)
    for one, other in itertools.combinations(found.values(), 2):
        apart = np.linalg.norm(lab(getattr(one, ground)) - lab(getattr(other, ground)))
        assert apart > 20 or (apart > 5 and one.dash != other.dash and one.marker != other.marker)


def test_a_strategy_has_its_color_whatever_its_label_and_company():
    alone = looks({"runs/x": "line_search"})["runs/x"]
    assert looks({"a": "effopd", "b": "line_search", "c": "mine"})["b"].light == alone.light
    assert group_colors(["plain OPD", "EffOPD"]) == {"plain OPD": "#4c566a", "EffOPD": "#d1495b"}
    used = [look.light for look in looks({"mine": "mine", "plain": "plain"}).values()]
    assert len(set(used)) == 2  # an unknown strategy takes a color that is free


@pytest.mark.parametrize(
    "name, strategy",
    [
        ("line_search-32", "line_search"), ("effopd (32 prompts)", "effopd"), ("opd#1", "plain"), ("GRPO", "rl"),
        ("fixed-k1", "fixed"), ("fixedly", None), ("planet", None), ("effopd-released", "effopd"), ("", None),
    ],
)  # fmt: skip
def test_names_of_strategies(name, strategy):
    assert strategy_of(name) == strategy


def test_a_logarithmic_panel_without_data_says_so(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, (full, empty, line_only) = plt.subplots(1, 3)
    full.plot([1, 10], [1, 10])
    line_only.axhline(2.0)
    for axis in (full, empty, line_only):
        axis.set_xscale("log")
        axis.set_yscale("log")
    save(figure, tmp_path / "figure.png", "title")
    assert [axis.get_xscale() for axis in (full, empty, line_only)] == ["log", "linear", "linear"]
    assert [len(axis.texts) for axis in (full, empty, line_only)] == [0, 1, 1]
