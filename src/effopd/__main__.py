"""`python -m effopd`, which launchers like torchrun and accelerate start."""

from __future__ import annotations

import sys

from effopd.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
