"""Stand-in for `python -m MODULE …` (`helpers.processes.forking_python`): sends the command to the
tests, prints what it printed, and ends with its status.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(sys.argv[1])
        server.sendall(json.dumps([sys.argv[2:], dict(os.environ), str(Path.cwd())]).encode() + b"\n")
        status, output = json.load(server.makefile())
    print(output, end="")
    sys.exit(status if status >= 0 else 128 - status)
