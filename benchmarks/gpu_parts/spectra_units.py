"""Part `spectra`: spectra and leading directions on the GPU against `torch.linalg.svd`."""

from __future__ import annotations

from pathlib import Path

import spectra

from gpu_parts.plan import PARTS, REHEARSAL
from gpu_parts.results import Results, device


def measure(results: Results, state: Path) -> None:
    """Measure each shape; the accuracy against float64 for the first one only, which is smaller."""
    del state
    for i, unit in enumerate(PARTS["spectra"].units):
        rows, columns = (48, 96) if REHEARSAL else map(int, unit.split(" × "))
        results.run(
            unit,
            lambda shape=(rows, columns), exact=i == 0: spectra.measure(
                *shape, repeats=1 if REHEARSAL or not exact else 2, device=device(), accuracy=exact
            ),
            least=0 if REHEARSAL else 20,
        )
