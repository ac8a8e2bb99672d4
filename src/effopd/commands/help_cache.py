"""Disk cache of `--help` texts, because importing the flags of a command takes seconds.

The flags of a training command are the fields of transformers' and TRL's configurations, which
import torch. The cache key contains the hash of this package's source, the host libraries'
versions and the terminal width. If the user's cache directory is not usable, the text is rendered
every time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from effopd.common.files import write_atomically
from effopd.common.versions import code, versions

#: Maximum number of cached texts; the oldest are deleted.
KEPT = 64
#: Libraries whose versions are part of the key.
_HOSTS = ("torch", "transformers", "trl", "accelerate")


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether the arguments are only `-h` or `--help`, optionally after `--algorithm NAME`.

    Other arguments, for example a YAML file, could change the text.
    """
    *others, last = argv or [""]
    return last in ("-h", "--help") and (not others or (len(others) == 2 and others[0] == "--algorithm"))


def help_text(argv: Sequence[str], render: Callable[[], object]) -> str:
    """Help text of `effopd …argv`, from the cache or rendered.

    Args:
        argv: the command and its arguments.
        render: prints the text and raises `SystemExit`, as argparse does.

    Raises:
        SystemExit: `render` exited with an error.
    """
    path = _path(argv)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path is not None:
            return path.read_text(encoding="utf-8")
    text = _printed(render)
    with contextlib.suppress(OSError):
        if path is not None:
            _keep(path, text)
    return text


def _path(argv: Sequence[str]) -> Path | None:
    """Path of the cached text; `None` without a cache directory."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        decides = [*argv, shutil.get_terminal_size().columns, code(), *versions(_HOSTS).items()]
    except (OSError, RuntimeError):  # no home
        return None
    return root / "effopd" / "help" / f"{hashlib.sha256(repr(decides).encode()).hexdigest()[:32]}.txt"


def _printed(render: Callable[[], object]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            render()
        except SystemExit as end:
            if end.code:
                raise
    return out.getvalue()


def _keep(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    texts = sorted(path.parent.glob("*.txt"), key=lambda one: one.stat().st_mtime, reverse=True)
    for old in texts[KEPT:]:
        old.unlink(missing_ok=True)
