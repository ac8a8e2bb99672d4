"""What this machine offers: cores, memory, accelerators, bfloat16, a compiler, a writable cache.

Each function is a probe for `effopd doctor` and returns a short text or plain values. Probes can
raise; the command catches that. torch is imported only by the probes of devices.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_GB = 1e9
#: Memory limit of a container, cgroup version 2 and 1.
_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def cores() -> str:
    """Number of CPU cores, and of those that this process can use if they are fewer."""
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    return str(total) if usable == total else f"{usable} usable of {total}"


def memory(limits: tuple[str, ...] = _CGROUP) -> str:
    """Main memory in GB; in a container with a lower limit, that limit."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in map(Path, limits):
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit() and int(text) < size:
            return f"{int(text) / _GB:.1f} GB (limit of the container; the machine has {size / _GB:.1f} GB)"
    return f"{size / _GB:.1f} GB"


def accelerators() -> list[str]:
    """Name and memory of each accelerator that torch finds."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        kind = "ROCm" if getattr(torch.version, "hip", None) else "CUDA"
        found.append(f"{kind} {index}: {device.name}, {device.total_memory / _GB:.1f} GB")
    if torch.backends.mps.is_available():
        found.append("MPS")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found += [f"XPU {index}: {torch.xpu.get_device_name(index)}" for index in range(torch.xpu.device_count())]
    return found


def best_device() -> str:
    """Device that a run uses: "cuda", "xpu", "mps" or "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def bfloat16() -> str:
    """Result of a bfloat16 matrix product on the device that a run uses."""
    import torch

    device = best_device()
    ones = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    right = float((ones @ ones).sum()) == 512.0
    return f"works on {device}" if right else f"wrong result on {device}"


def compiler() -> str:
    """Path of the C compiler; "": none."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    return next((path for name in names if name and (path := shutil.which(name.split()[0]))), "")


def cache_folder(folder: Path) -> str:
    """Whether files can be written to `folder`, and the free space of its disk in GB."""
    place = folder
    while not place.exists():
        place = place.parent
    with tempfile.TemporaryFile(dir=place):
        pass
    shown = f"~/{folder.relative_to(Path.home())}" if folder.is_relative_to(Path.home()) else str(folder)
    return f"{shown} is writable, {shutil.disk_usage(place).free / _GB:.0f} GB free"


def driver() -> str:
    """Version of the NVIDIA driver; "": none, or `nvidia-smi` does not answer within 2 s."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=False)
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def system() -> str:
    """Operating system, release and architecture."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"
