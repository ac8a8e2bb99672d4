"""Cost of the look-ahead for 1.7B to 32B students on 1, 8 and 32 GPUs: memory and time.

    .venv/bin/python benchmarks/scale_table.py [--bandwidth 3350] [--link 55] [--write]

Bytes per rank follow from the configurations (`effopd.launch.model_states`, which a test checks
against a real step). Seconds are bytes moved / bandwidth. `--bandwidth` is that of GPU memory;
`--link` is that between GPU and host, for an anchor in pinned host memory. The defaults are H100
data-sheet values, not measurements. The seconds include the share of the copy bandwidth that
`LiveWeights` reaches, which is measured on this machine in the same run.
"""

from __future__ import annotations

import argparse
import time

import torch
from pages import DOCS, rewrite
from torch import nn
from transformers import Qwen3Config

from effopd.extrapolate.live_weights import LiveWeights
from effopd.launch.model_size import ModelSize, size_of
from effopd.launch.model_states import FP32, REPLICATED, fsdp2, model_state_bytes

#: Hidden size, layers, heads, MLP width, tied embeddings of the Qwen3 models (8 key-value heads of
#: 128, vocabulary 151936).
SHAPES = {
    "1.7B": (2048, 28, 16, 6144, True),
    "4B": (2560, 36, 32, 9728, True),
    "8B": (4096, 36, 32, 12288, False),
    "14B": (5120, 40, 40, 17408, False),
    "32B": (5120, 64, 64, 25600, False),
}
RANKS = (1, 8, 32)
#: Passes over the moved parameters. A candidate takes three: read origin and anchor, write.
CANDIDATE, BEGIN, COMMIT, NORM = 3, 2, 2, 2


def config(hidden: int, layers: int, heads: int, width: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=width,
        tie_word_embeddings=tied,
    )


def efficiency(megabytes: int = 512, repeats: int = 5) -> float:
    """Bandwidth of `move_to` (bytes moved / seconds), relative to that of a plain copy."""
    model = nn.ParameterList(nn.Parameter(torch.randn(megabytes * 2**20 // 4 // 16)) for _ in range(16))
    weights = LiveWeights(model, "all")
    with torch.no_grad():
        for parameter in model:
            parameter.add_(0.1)
    weights.begin()
    size, other = torch.randn(megabytes * 2**18), torch.empty(megabytes * 2**18)

    def best(run) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    ideal = best(lambda: other.copy_(size)) / 2  # seconds per pass
    return CANDIDATE * ideal / best(lambda: weights.move_to(2.0))


def inputs_table(bandwidth: float, link: float, share: float) -> str:
    """Inputs of the time estimates."""
    rows = [
        ("GPU memory bandwidth", f"{bandwidth:g} GB/s", "data sheet (H100)"),
        ("GPU to pinned host memory", f"{link:g} GB/s", "data sheet (H100)"),
        ("share of the copy bandwidth that a candidate reaches", f"{share:.0%}", "measured on a CPU"),
    ]
    return "\n".join(["| quantity | value | source |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def memory_table(sizes: dict[str, ModelSize]) -> str:
    heads = " | ".join(f"{ranks} GPU{'s' * (ranks > 1)}" for ranks in RANKS)
    lines = [
        f"| student | moved | strategy | {heads} | the released code's full gathers, any number of GPUs |",
        "|---" * (len(RANKS) + 4) + "|",
    ]
    for name, size in sizes.items():
        for rule, strategy in (("attention+mlp", "`effopd`"), ("all", "`line_search`")):
            moved = size.selected(rule)
            extra = []
            for ranks in RANKS:
                parts = model_state_bytes(size, 0, fsdp2(ranks) if ranks > 1 else REPLICATED, moved=moved)
                extra.append(f"{(parts['anchor'] + parts['candidate']) / 1e9:.2f} GB")
            gathers = 2 * FP32 * size.parameters / 1e9
            lines.append(f"| {name} | {moved / 1e9:.2f} B | {strategy} | {' | '.join(extra)} | {gathers:.0f} GB |")
    return "\n".join(lines)


def time_table(sizes: dict[str, ModelSize], bandwidth: float, link: float, share: float) -> str:
    lines = [
        "| student | GPUs | a candidate | begin + commit + norm | a candidate, anchor on the "
        "host | a KL score, forward of 32 × 4096 "
        "tokens at 40 % of 989 TFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, size in sizes.items():
        for ranks in RANKS:
            each = FP32 * size.selected("all") / ranks
            a_pass = each / (bandwidth * 1e9 * share)
            flops = 2 * size.parameters * 32 * 4096 / ranks
            lines.append(
                f"| {name} | {ranks} | {1e3 * CANDIDATE * a_pass:.1f} ms | "
                f"{1e3 * (BEGIN + COMMIT + NORM) * a_pass:.1f} ms "
                f"| {1e3 * (each / (link * 1e9) + 2 * a_pass):.0f} ms | {flops / (0.4 * 989e12):.2f} s |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=3350.0, help="memory bandwidth of a GPU, GB/s")
    parser.add_argument("--link", type=float, default=55.0, help="GPU to pinned host memory, GB/s")
    parser.add_argument("--write", action="store_true", help="rewrite the tables of docs/scale.md")
    arguments = parser.parse_args()
    sizes = {name: size_of(config(*shape)) for name, shape in SHAPES.items()}
    share = efficiency()
    blocks = {
        "inputs": inputs_table(arguments.bandwidth, arguments.link, share),
        "memory": memory_table(sizes),
        "time": time_table(sizes, arguments.bandwidth, arguments.link, share),
    }
    print("\n\n".join(blocks.values()))
    if arguments.write:
        rewrite(DOCS / "scale.md", blocks)


if __name__ == "__main__":
    main()
