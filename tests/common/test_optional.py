"""A missing package is explained, and the advice can be followed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from effopd.common import optional
from effopd.errors import MissingDependencyError


def test_the_advice_names_something_that_exists():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = {f"effopd[{name}]" for name in project["optional-dependencies"]}
    required = {re.split(r"[<>=]", line)[0] for line in project["dependencies"]}
    for module, (_, package) in optional._NEEDS.items():
        assert package in extras | required or package.replace("-", "_") in (
            module,
            f"torch_{module}",
            f"{module}_optimizer",
        )  # a project of its own


def test_a_missing_package_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"drawing figures needs .*pip install 'effopd\[plots\]'"):
        optional.require("matplotlib.pyplot")
