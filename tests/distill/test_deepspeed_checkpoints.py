"""Checkpoints of DeepSpeed can be resumed by the engine that wrote them, and by no other."""

from __future__ import annotations

import pytest

from effopd.distill.resuming import check_engine
from effopd.errors import CheckpointError


def checkpoint(root, stage: int, processes: int, prefix: str = ""):
    folder = root / "global_step4"
    folder.mkdir()
    for rank in range(processes):
        (folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        if stage == 3:
            (folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    if stage < 3:
        (folder / "mp_rank_00_model_states.pt").touch()
    return root


@pytest.mark.parametrize(("wrote", "stage"), [(1, 1), (2, 2), (1, 2), (3, 3)])
def test_the_same_engine_resumes(wrote, stage, tmp_path):
    check_engine(checkpoint(tmp_path, wrote, 2, prefix="bf16_"), stage, 2)


def test_whole_weights_need_no_deepspeed(tmp_path):
    check_engine(tmp_path, None, 2)
    with pytest.raises(CheckpointError, match=r"with no DeepSpeed, and this run has DeepSpeed ZeRO-2 on 2"):
        check_engine(tmp_path, 2, 2)


@pytest.mark.parametrize(
    ("wrote", "stage", "processes", "message"),
    [
        (2, 2, 4, r"ZeRO-1 or -2 on 2 process\(es\), and this run has DeepSpeed ZeRO-2 on 4"),
        (3, 3, 1, r"ZeRO-3 on 2 process\(es\), and this run has DeepSpeed ZeRO-3 on 1"),
        (3, 2, 2, "ZeRO-3 on 2.*this run has DeepSpeed ZeRO-2"),
        (2, 3, 2, "ZeRO-1 or -2 on 2.*this run has DeepSpeed ZeRO-3"),
        (2, None, 2, "this run has no DeepSpeed"),
    ],
)
def test_another_engine_is_refused(wrote, stage, processes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        check_engine(checkpoint(tmp_path, wrote, 2), stage, processes)
