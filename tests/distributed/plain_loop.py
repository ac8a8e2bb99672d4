"""A plain PyTorch loop under DDP, FSDP2 or alone, as a script that torchrun starts (for the tests
beside it).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from effopd import EffOPD, EffOPDConfig, Score
from effopd.common.distributed import exit_gloo, local_shard, rank, world_size

ROWS, WIDTH = 24, 10  # not divisible by the ranks of some tests, so that shards are uneven


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return self.head(x)[:, 0]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--mode", choices=["alone", "ddp", "fsdp2", "hsdp"], default="alone")
    parser.add_argument("--strategy", default="effopd")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--fault", default="")
    parser.add_argument("--lora", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.mode != "alone":
        dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    y = torch.sin(x.sum(1))
    net: nn.Module = Net()
    layers = list(net.layers)
    if arguments.lora:
        from peft import LoraConfig, get_peft_model

        net = get_peft_model(net, LoraConfig(r=3, lora_alpha=6, target_modules=[f"layers.{i}" for i in range(3)]))
        layers = list(net.base_model.model.layers)
    if arguments.mode in ("fsdp2", "hsdp"):
        shape = (world_size(),) if arguments.mode == "fsdp2" else (2, world_size() // 2)  # replicas, shards
        mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    trained = DistributedDataParallel(net) if arguments.mode == "ddp" else net
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.02)
    scores = []

    def scorer(model):
        if arguments.fault == "scorer" and rank() == 1 and len(scores) == 8:
            raise RuntimeError("planted")
        if arguments.fault == "kill" and rank() == 1 and len(scores) == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        losses = (model(x) - y).square()
        scores.append(1)
        return Score(-float(losses.mean()), per_example=tuple((-losses).tolist()))

    config = EffOPDConfig(arguments.strategy, parameters="all", reset_moments=False, adapt_learning_rate=False)
    look = EffOPD(net, scorer, config, optimizer=optimizer)
    start = 0
    if arguments.resume:
        state = torch.load(arguments.resume / "weights.pt")
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                value = state[name]
                if isinstance(parameter, DTensor):
                    value = dist.tensor.distribute_tensor(value, parameter.device_mesh, parameter.placements)
                parameter.copy_(value)
        look.load(arguments.resume)
        start = look.history[-1].step
    part = slice(rank(), None, world_size())
    for step in range(start + 1, arguments.steps + 1):
        optimizer.zero_grad()
        (trained(x[part]) - y[part]).square().mean().backward()
        optimizer.step()
        if arguments.fault == "diverge" and rank() == 1 and step == 3:
            with torch.no_grad():
                local_shard(next(iter(net.parameters()))).add_(1e-3)
        if arguments.fault == "nan" and rank() == 1 and step == 4:
            with torch.no_grad():
                next(iter(look.weights.state_dict().values())).fill_(float("nan"))
        look.step(step)
        if step == 4 and not arguments.resume:
            folder = arguments.out / "at-4"
            folder.mkdir(parents=True, exist_ok=True)
            weights = {name: whole(p.detach()).clone() for name, p in net.named_parameters()}
            if rank() == 0:
                torch.save(weights, folder / "weights.pt")
            look.save(folder)
    weights = {name: whole(p.detach()).clone() for name, p in net.named_parameters()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        torch.save(weights, arguments.out / "weights.pt")
    rows = [
        {
            key: getattr(search, key)
            for key in ("step", "accepted_scale", "memory_bytes", "delta_norm", "lora_lost_share")
        }
        for search in look.history
    ]
    (arguments.out / f"rows-{rank()}.json").write_text(json.dumps(rows))
    exit_gloo()


if __name__ == "__main__":
    main()
