"""D_v answered by a model under FSDP2 whose ranks' answers end at different tokens, as a script
that torchrun starts.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from helpers.tiny_models import make_model, make_task, make_tokenizer
from torch.distributed.fsdp import fully_shard

from effopd.common.distributed import exit_gloo, rank
from effopd.common.isolation import isolated_rng
from effopd.extrapolate.scorers.accuracy import AccuracyScorer
from effopd.tasks.base import Task
from effopd.tasks.sampling import Sampling


def fail(completion, example):
    raise ValueError("planted")


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    whole, sharded = make_model(0), make_model(0)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    if rank() == 1:  # its answers end with their first token
        for model in (whole, sharded):
            model.generation_config.eos_token_id = list(range(64))
    task = make_task(13)
    if "--fault" in sys.argv and rank() == 1:
        task = Task("planted", task.examples, fail)
    scorer = AccuracyScorer(task, make_tokenizer(), Sampling(max_new_tokens=12, batch_size=4))
    scores = []
    for model in (whole, sharded):
        with isolated_rng(5), torch.no_grad():
            scores.append(scorer(model))
    assert scores[0].per_example == scores[1].per_example and len(scores[0].per_example) == 13
    assert scores[0].generated_tokens == scores[1].generated_tokens
    exit_gloo()


if __name__ == "__main__":
    main()
