"""Fixtures; what they are made of is in `helpers`."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would wait for each other, and spin

import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def student():
    return make_model(0)


@pytest.fixture
def teacher():
    return make_model(1)


@pytest.fixture(scope="session")
def task():
    return make_task()


@pytest.fixture(scope="module")
def one_thread():
    """One thread for torch, even if OMP_NUM_THREADS allows more: reductions in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
