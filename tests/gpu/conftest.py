"""Device of the tests in this folder, and a tiny run on it."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.tiny_run import make_trainer


@pytest.fixture(scope="session")
def device() -> str:
    """`cuda`; with GPU_REHEARSAL=1 on a machine without a GPU, `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("GPU_REHEARSAL") == "1":
        return "cpu"
    pytest.skip("needs an NVIDIA GPU; GPU_REHEARSAL=1 runs these tests on the CPU")


@pytest.fixture
def trainer_on(device):
    """`make_trainer` on the device, without evaluations and checkpoints unless asked for."""

    def make(output_dir, **settings):
        quiet = {"eval_strategy": "no", "save_strategy": "no", "use_cpu": device == "cpu", "bf16": False}
        return make_trainer(output_dir, **(quiet | settings))

    return make
