"""Entry point of `python -m effopd`, for launchers such as torchrun and accelerate."""

from __future__ import annotations

import sys

from effopd.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
