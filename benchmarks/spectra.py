"""Speed and accuracy of spectral metrics and leading directions against `torch.linalg.svd`.

    .venv/bin/python benchmarks/spectra.py [--rows 4096] [--columns 12288] [--repeats 3] [--device
    cpu]

The update is that of two bfloat16 checkpoints: 40 directions with s_i ∝ 0.9^i, a full-rank tail,
and the rounding of both sides. Times are medians over interleaved repeats. The SVD is float32 with
`full_matrices=False`, as in the paper's scripts. Accuracy is relative to a float64 SVD. Run it on
an idle machine.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch

from effopd.analysis.sparsity import entry_metrics
from effopd.weights.leading import leading_directions
from effopd.weights.spectrum import singular_values, spectrum_metrics


def make_update(rows: int, columns: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Base and trained weights in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(rows, columns, generator=generator)).bfloat16()
    left, right = (torch.randn(size, 40, generator=generator) / math.sqrt(size) for size in (rows, columns))
    delta = (left * 0.9 ** torch.arange(40)) @ right.T
    delta += 0.1 * torch.randn(rows, columns, generator=generator) / (math.sqrt(rows) + math.sqrt(columns))
    return base.to(device), (base + delta).bfloat16().to(device)


def seconds(call, device: str) -> tuple[float, object]:
    """Wall-clock seconds of `call()`, and its result."""
    start = time.perf_counter()
    result = call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start, result


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest principal angle in radians."""
    return math.asin(min(1.0, float(torch.linalg.matrix_norm(b - a @ (a.T @ b), 2))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=12288)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    shape, device = (arguments.rows, arguments.columns), arguments.device
    base, trained = make_update(*shape, device)
    methods = {
        "svd": lambda: torch.linalg.svd(trained.float() - base.float(), full_matrices=False),
        "spectrum": lambda: spectrum_metrics(singular_values(trained, base), shape),
        "all values": lambda: entry_metrics(base, trained) | spectrum_metrics(singular_values(trained, base), shape),
        "top 20": lambda: leading_directions(trained, base, k=20),
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    results: dict[str, object] = {}
    for _ in range(arguments.repeats):
        for name, call in methods.items():
            taken, results[name] = seconds(call, device)
            times[name].append(taken)
    print(
        f"{shape[0]} × {shape[1]} bfloat16 update on {device}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}"
    )
    for name, taken in times.items():
        ratios = [svd / method for svd, method in zip(times["svd"], taken, strict=True)]
        print(
            f"{name:12} {statistics.median(taken):7.2f} s   {statistics.median(ratios):5.1f}× faster than the SVD "
            f"(repeats: {', '.join(f'{ratio:.1f}' for ratio in ratios)})"
        )
    del results["svd"]
    u, s, vt = torch.linalg.svd(trained.double() - base.double(), full_matrices=False)
    expected, measured = spectrum_metrics(s, shape), results["spectrum"]
    worst = max(abs(measured[name] / expected[name] - 1) for name in expected)
    print(f"largest relative error of a spectral metric against float64: {worst:.1e}")
    top = results["top 20"]
    k = len(top.s_K)
    angles = [
        max(angle(u[:, :i].cpu(), top.u_MK[:, :i]), angle(vt[:i].T.cpu(), top.v_NK[:, :i])) for i in range(1, k + 1)
    ]
    print(f"top {k}: largest angle of a leading-k subspace {max(angles):.1e} rad (its own bound: "
          f"{float(top.angle_bound_K.max()):.1e}); gap after k: {float(1 - s[k] / s[k - 1]):.1e} of s_k")  # fmt: skip


if __name__ == "__main__":
    main()
