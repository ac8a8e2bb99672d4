"""Fixtures; what they are made of is in `helpers`."""

from __future__ import annotations

import functools
import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would wait for each other, and spin

import sys

import pytest  # torch and the hosts only in the fixtures: the controller of several workers needs none


def pytest_collection_finish():
    """Keep the garbage collector off the imported modules: each Trainer collects at its start, and
    a full pass over torch, transformers and TRL takes 0.3 s.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """Fork the server of processes off pytest before the first test, if the tests import the
    hosts.
    """
    if "trl" in sys.modules and "effopd.distill" in sys.modules:
        from helpers.processes import fork_server
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("qwen3")  # once per process, a thousand regular expressions
        fork_server()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """`os.fsync` only checks its file: nothing but a power failure shows the difference, and ten
    tiny steps with their saves would wait 135 times for some milliseconds.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="module", autouse=True)
def forked_graders(request):
    """Grading processes are forks, which have sympy loaded. Not where they are what is tested."""
    if "effopd.tasks" not in sys.modules or request.path.name == "test_task_verify.py":
        yield
        return
    from helpers.processes import ForkedGrader, is_forked

    from effopd.tasks import worker

    new = worker._spawn

    def spawn(connection, words):
        known = is_forked() and words[0].startswith("effopd.")
        return (ForkedGrader if known else new)(connection, words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_spawn", spawn)
        yield


@pytest.fixture(scope="module", autouse=True)
def models_are_measured_once(request):
    """Checks of a model before training run once per model. Not where they are what is tested."""
    if "effopd.models.checks" not in sys.modules or "models" in request.path.parts:
        yield
        return
    from helpers.measured_once import measured_once

    with measured_once():
        yield


@pytest.fixture(scope="session", autouse=True)
def packages_are_looked_for_once():
    """accelerate asks at each `unwrap_model` whether DeepSpeed and PEFT are installed."""
    imports = sys.modules.get("accelerate.utils.imports")
    with pytest.MonkeyPatch.context() as patch:
        if imports is not None:
            patch.setattr(imports, "_is_package_available", functools.cache(imports._is_package_available))
        yield


@pytest.fixture(scope="session")
def tokenizer():
    from helpers.tiny_models import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def student():
    from helpers.tiny_models import make_model

    return make_model(0)


@pytest.fixture
def teacher():
    from helpers.tiny_models import make_model

    return make_model(1)


@pytest.fixture(scope="session")
def task():
    from helpers.tiny_models import make_task

    return make_task()


@pytest.fixture(scope="module")
def one_thread():
    """One thread for torch, even if OMP_NUM_THREADS allows more: reductions in one order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def a_loud_process():
    """`quickstart` turns transformers' progress bars and warnings off in its process, which tests
    share.
    """
    yield
    logging = sys.modules.get("transformers.utils.logging")
    if logging is not None and not logging.is_progress_bar_enabled():
        logging.enable_progress_bar()
        logging.set_verbosity_warning()
