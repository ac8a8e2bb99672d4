"""Price lists: seconds per token of a deployment, by which every run of a grid is priced again.

    name: 1.7B-8B-1xH100                 # shown as the axis "priced seconds (1.7B-8B-1xH100)"
    note: estimate, not a measurement    # shown below the axis; optional
    seconds_per_token:
      sampled: 1.0e-4                    # a token sampled by the student, searches included
      student_forward: 1.0e-5            # a token in another forward pass of the student
      student_backward: 1.0e-5           # a token in a backward pass of the student
      teacher: 1.0e-5                    # a token in a forward pass of the teacher

    priced seconds = Σ tokens of a kind · seconds per token of this kind

`recipes/prices/` has two lists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from effopd.common.unique_keys import load_unique
from effopd.errors import ConfigError
from effopd.runs.records import Costs

#: Kind of token → the run's net count of it.
KINDS = {
    "sampled": lambda costs: costs.net_generated_tokens,
    "student_forward": lambda costs: costs.student_forward_tokens,
    "student_backward": lambda costs: costs.student_backward_tokens,
    "teacher": lambda costs: costs.teacher_tokens,
}
_FIELDS = ("name", "note", "seconds_per_token")


@dataclass(frozen=True)
class PriceList:
    """Seconds per token, by kind of token (`KINDS`).

    Raises:
        ConfigError: a kind is missing, unknown or not a finite number ≥ 0, or all are 0.
    """

    name: str
    seconds_per_token: Mapping[str, float]
    note: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ConfigError(f"prices: name={self.name!r}: expected a text. It labels the axis.")
        prices = self.seconds_per_token
        if not isinstance(prices, Mapping) or set(prices) != set(KINDS):
            raise ConfigError(
                f"prices '{self.name}': seconds_per_token={prices!r}: expected a mapping with exactly "
                f"{', '.join(KINDS)}."
            )
        for kind, price in prices.items():
            number = isinstance(price, int | float) and not isinstance(price, bool)
            if not number or not math.isfinite(price) or price < 0:
                raise ConfigError(
                    f"prices '{self.name}': {kind}={price!r}: expected seconds per token, a finite number ≥ 0. "
                    "YAML reads 1e-5 as text: write 1.0e-5."
                )
        if not any(prices.values()):
            raise ConfigError(f"prices '{self.name}': all prices are 0. Give at least one kind of token a price.")

    def seconds(self, costs: Costs) -> float | None:
        """Priced seconds; `None`: a kind of token with a price was neither recorded nor derived.

        Example:
            >>> prices = PriceList("x", dict.fromkeys(KINDS, 0.0) | {"sampled": 2.0})
            >>> prices.seconds(Costs(net_generated_tokens=3))
            6.0
        """
        total = 0.0
        for kind, price in self.seconds_per_token.items():
            tokens = KINDS[kind](costs)
            if price and tokens is None:
                return None
            total += price * (tokens or 0)
        return total

    def to_row(self) -> dict[str, Any]:
        """JSON-ready dictionary, for results.json; `PriceList(**row)` is the inverse."""
        return asdict(self) | {"seconds_per_token": dict(self.seconds_per_token)}


def read_prices(paths: Sequence[Path]) -> list[PriceList]:
    """Price lists of YAML files.

    Raises:
        ConfigError: a file is missing or not a price list, or two lists have the same name.
    """
    lists = [_read(path) for path in paths]
    names = [prices.name for prices in lists]
    if len(set(names)) < len(names):
        raise ConfigError(f"--prices: expected lists with different names, got {', '.join(names)}.")
    return lists


def _read(path: Path) -> PriceList:
    try:
        values = load_unique(path.read_text(), f"--prices {path}")
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--prices {path}: expected a YAML file such as recipes/prices/1.7b-8b-1xh100.yaml "
            f"({' '.join(str(error).split())})."
        ) from error
    given = set(values) if isinstance(values, dict) else set()
    if not {"name", "seconds_per_token"} <= given or given - set(_FIELDS):
        raise ConfigError(
            f"--prices {path}: expected a mapping with name, seconds_per_token and optionally note; got {values!r}."
        )
    try:
        return PriceList(values["name"], values["seconds_per_token"], str(values.get("note") or ""))
    except ConfigError as error:
        raise ConfigError(f"--prices {path}: {error}") from error
