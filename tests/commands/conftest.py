"""Figures of the commands: drawn and stored, but not laid out."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_layout():
    """The layout takes half of the time of a figure; tests/report draws the same ones with it."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("matplotlib"):
            patch.setattr("matplotlib.layout_engine.ConstrainedLayoutEngine.execute", lambda self, figure: None)
        yield
