"""One analysis of the tiny checkpoints, for every file here that reads its tables; one thread."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_checkpoints import K, save_runs, trained

from effopd.analysis.analyze import analyze


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return save_runs(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def done(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "analysis"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    analysis = analyze(folders / "base", trained(folders), out, k=K, base_spectrum=True)
    torch.set_num_threads(threads)
    return analysis
