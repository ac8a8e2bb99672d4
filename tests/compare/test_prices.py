"""Priced seconds: tokens by kind times seconds per token."""

from __future__ import annotations

from pathlib import Path

import pytest

from effopd.compare.prices import KINDS, PriceList, read_prices
from effopd.errors import ConfigError
from effopd.runs.records import Costs

ROOT = Path(__file__).parents[2]
LISTS = sorted((ROOT / "recipes" / "prices").glob("*.yaml"))
COSTS = Costs(
    net_generated_tokens=10, net_forward_tokens=70, update_forward_tokens=20, teacher_forward_tokens=20,
    search_forward_tokens=30, search_teacher_tokens=10,
)  # fmt: skip
PRICES = {"sampled": 1.0, "student_forward": 0.1, "student_backward": 0.01, "teacher": 0.001}


def test_every_kind_of_token_has_its_price():
    # 10 sampled; 70 − 30 = 40 forward; 20 backward; 20 + 10 = 30 by the teacher
    assert PriceList("x", PRICES).seconds(COSTS) == pytest.approx(10 + 4 + 0.2 + 0.03)


def test_an_unknown_kind_leaves_the_price_unknown_unless_it_is_free():
    unknown = Costs(net_generated_tokens=10, net_forward_tokens=70, search_forward_tokens=30)
    assert PriceList("x", PRICES).seconds(unknown) is None
    assert PriceList("x", dict.fromkeys(KINDS, 0.0) | {"sampled": 2.0}).seconds(unknown) == 20.0


@pytest.mark.parametrize(
    "prices",
    [
        {}, {"sampled": 1.0}, PRICES | {"more": 1.0}, PRICES | {"teacher": "1e-5"}, PRICES | {"teacher": -1.0},
        PRICES | {"teacher": float("nan")}, PRICES | {"teacher": True}, dict.fromkeys(KINDS, 0.0), None,
    ],
)  # fmt: skip
def test_unusable_prices_are_refused(prices):
    with pytest.raises(ConfigError, match=r"expected|prices are 0"):
        PriceList("x", prices)


@pytest.mark.parametrize("text", ["", "[1]", "name: x", "name: x\nseconds_per_token: {}\nmore: 1", "a: [", "name: ''"])
def test_a_file_that_is_no_price_list_is_named(tmp_path, text):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"--prices .*p\.yaml"):
        read_prices([path])
    with pytest.raises(ConfigError, match=r"--prices .*none\.yaml"):
        read_prices([tmp_path / "none.yaml"])


def test_two_lists_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="different names"):
        read_prices([LISTS[0], LISTS[0]])


@pytest.mark.parametrize(
    ("file", "student", "teacher", "layers", "devices"),
    [("1.7b-8b-1xh100", 1.7e9, 8.0e9, 28, 1), ("4b-32b-8xh100", 4.0e9, 32.8e9, 36, 8)],
)
def test_the_shipped_lists_follow_from_their_assumptions(file, student, teacher, layers, devices):
    (prices,) = read_prices([ROOT / "recipes" / "prices" / f"{file}.yaml"])
    flops, bandwidth = devices * 0.4 * 989e12, 0.6 * 3.35e12
    step = (2 * student + 128 * 2000 * 2 * layers * 8 * 128 * 2) / bandwidth
    expected = {
        "sampled": step / (128 * devices), "student_forward": 2 * student / flops,
        "student_backward": 4 * student / flops, "teacher": 2 * teacher / flops,
    }  # fmt: skip
    assert prices.seconds_per_token == pytest.approx(expected, rel=1e-3)
    assert "not measured" in prices.note
