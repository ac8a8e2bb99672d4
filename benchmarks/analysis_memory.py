"""Peak memory of `effopd analyze` by depth, on a synthetic pair with the shapes of an 8B model.

    .venv/bin/python benchmarks/analysis_memory.py [--layers 1 2 4] [--vocabulary 4096] [--out
    runs/analysis_memory]

Writes a sharded bfloat16 base and trained checkpoint per depth, with the shapes of Qwen3-8B: hidden
4096, MLP 12288, 32 heads, 8 key/value heads of 128. The vocabulary is an option because the
embedding is by far the largest matrix. Each pair is analyzed in its own process. Reports the peak
resident memory of that process, and of a process that only imports the libraries.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, MLP, HEADS, KV, HEAD = 4096, 12288, 32, 8, 128


def shapes(layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a Qwen3 model."""
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in range(layers):
        one = {
            "self_attn.q_proj": (HEADS * HEAD, HIDDEN), "self_attn.k_proj": (KV * HEAD, HIDDEN),
            "self_attn.v_proj": (KV * HEAD, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
            "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP),
            "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
            "self_attn.q_norm": (HEAD,), "self_attn.k_norm": (HEAD,),
        }  # fmt: skip
        tensors |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in one.items()}
    return tensors | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}


def write_pair(out: Path, layers: int, vocabulary: int) -> None:
    """Write base and trained checkpoint, with one shard per layer and separate embedding shards."""
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": HEAD,
        "vocab_size": vocabulary, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes(layers, vocabulary).items():
        groups.setdefault(name.split(".")[2] if ".layers." in name else name.split(".")[-2], {})[name] = shape
    for kind in ("base", "trained"):
        (out / kind).mkdir(parents=True)
        (out / kind / "config.json").write_text(json.dumps(config))
        index: dict[str, str] = {}
        for number, group in enumerate(groups.values(), start=1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            save_file({name: tensor(name, shape, kind) for name, shape in group.items()}, out / kind / file)
            index |= dict.fromkeys(group, file)
        (out / kind / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def tensor(name: str, shape: tuple[int, ...], kind: str) -> torch.Tensor:
    """Random weights; the trained ones add 16 directions and a small full-rank tail."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    weights = 0.02 * torch.randn(shape, generator=generator)
    if kind == "trained":
        weights += 1e-5 * torch.randn(shape, generator=generator)
        if len(shape) == 2:
            left, right = (torch.randn(size, 16, generator=generator) / size**0.5 for size in shape)
            weights += (left * 0.8 ** torch.arange(16)) @ right.T
    return weights.bfloat16()


def peak(command: list[str]) -> tuple[float, float]:
    """Peak resident memory (GiB) and seconds of a process."""
    code = (
        "import resource, subprocess, sys; status = subprocess.run(sys.argv[1:], "
        "stdout=subprocess.DEVNULL).returncode; "
        "print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    status, kilobytes = map(int, done.stdout.split())
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return kilobytes / 2**20, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path("runs/analysis_memory"))
    arguments = parser.parse_args()
    largest = max(HIDDEN * MLP, HIDDEN * arguments.vocabulary) * 4 / 2**30
    python = [
        sys.executable,
        "-c",
        "import torch, scipy.integrate, pandas, sklearn.manifold, matplotlib.pyplot, safetensors",
    ]
    floor, _ = peak(python)
    print(f"largest matrix in float32: {largest:.2f} GiB; a process that only imports: {floor:.2f} GiB")
    for layers in arguments.layers:
        folder = arguments.out / f"{layers}-layers"
        shutil.rmtree(folder, ignore_errors=True)
        write_pair(folder, layers, arguments.vocabulary)
        command = [
            sys.executable,
            "-m",
            "effopd.commands.main",
            "analyze",
            "--base",
            str(folder / "base"),
            "--trained",
            f"synthetic={folder / 'trained'}",
            "--out",
            str(folder / "analysis"),
            "--device",
            "cpu",
        ]
        used, taken = peak(command)
        print(
            f"{layers} layers: peak {used:.2f} GiB = {used / largest:.1f}× the largest matrix, "
            f"{(used - floor) / largest:.1f}× above the imports; {taken:.0f} s",
            flush=True,
        )
        for kind in ("base", "trained"):
            shutil.rmtree(folder / kind)


if __name__ == "__main__":
    main()
