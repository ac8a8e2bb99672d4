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
from typing import Any

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


def measure(rows: int, columns: int, *, repeats: int, device: str, accuracy: bool = True) -> dict[str, Any]:
    """Seconds of every method, by repeat, and its accuracy against a float64 SVD.

    Returns:
        `seconds`: method → one number per repeat. With `accuracy`: `metric_error`, the largest
        relative error of a spectral metric; `angle`, the largest angle in radians of a leading
        subspace; `angle_bound`, its own bound; `gap`, 1 − s_{k+1} / s_k after the last direction.
    """
    shape = (rows, columns)
    base, trained = make_update(*shape, device)
    methods = {
        "svd": lambda: torch.linalg.svd(trained.float() - base.float(), full_matrices=False),
        "spectrum": lambda: spectrum_metrics(singular_values(trained, base), shape),
        "all values": lambda: entry_metrics(base, trained) | spectrum_metrics(singular_values(trained, base), shape),
        "top 20": lambda: leading_directions(trained, base, k=20),
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, call in methods.items():
            taken, results[name] = seconds(call, device)
            times[name].append(taken)
    found: dict[str, Any] = {"seconds": times, "k": len(results["top 20"].s_K)}
    if not accuracy:
        return found
    del results["svd"]
    u, s, vt = torch.linalg.svd(trained.double() - base.double(), full_matrices=False)
    expected, measured, top = spectrum_metrics(s, shape), results["spectrum"], results["top 20"]
    u, vt, k = u.cpu(), vt.cpu(), found["k"]
    angles = [max(angle(u[:, :i], top.u_MK[:, :i]), angle(vt[:i].T, top.v_NK[:, :i])) for i in range(1, k + 1)]
    return found | {
        "metric_error": max(abs(measured[name] / expected[name] - 1) for name in expected),
        "angle": max(angles),
        "angle_bound": float(top.angle_bound_K.max()),
        "gap": float(1 - s[k] / s[k - 1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=12288)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    found = measure(arguments.rows, arguments.columns, repeats=arguments.repeats, device=arguments.device)
    print(
        f"{arguments.rows} × {arguments.columns} bfloat16 update on {arguments.device}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}"
    )
    times = found["seconds"]
    for name, taken in times.items():
        ratios = [svd / method for svd, method in zip(times["svd"], taken, strict=True)]
        print(
            f"{name:12} {statistics.median(taken):7.2f} s   {statistics.median(ratios):5.1f}× faster than the SVD "
            f"(repeats: {', '.join(f'{ratio:.1f}' for ratio in ratios)})"
        )
    print(f"largest relative error of a spectral metric against float64: {found['metric_error']:.1e}")
    print(f"top {found['k']}: largest angle of a leading-k subspace {found['angle']:.1e} rad (its own bound: "
          f"{found['angle_bound']:.1e}); gap after k: {found['gap']:.1e} of s_k")  # fmt: skip


if __name__ == "__main__":
    main()
