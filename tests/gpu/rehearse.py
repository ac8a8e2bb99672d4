"""Every part of the GPU script on the CPU, in one process: `python rehearse.py STATE`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    os.environ["GPU_REHEARSAL"] = "1"  # read when the parts are imported
    for name in [name for name in sys.modules if name.split(".")[0] == "gpu_parts"]:
        del sys.modules[name]  # a fork of pytest has imported them without it
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
    from gpu_parts.part import run_part
    from gpu_parts.plan import PARTS

    for part in PARTS:
        run_part(part, Path(sys.argv[1]), 600)


if __name__ == "__main__":
    main()
