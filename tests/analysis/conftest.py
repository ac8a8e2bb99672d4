"""One analysis of the tiny checkpoints, for every file here that reads its tables."""

from __future__ import annotations

import pytest
from helpers.tiny_checkpoints import K, save_runs, trained

from effopd.analysis.analyze import analyze


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_runs(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def done(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "analysis"
    return analyze(folders / "base", trained(folders), out, k=K, base_spectrum=True)
