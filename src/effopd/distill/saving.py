"""Rehearsal of a checkpoint before the first step, and rescue of the weights if a save fails.

Without it, a run of hours fails at its first checkpoint, or at its end, because something in it
cannot be written. `rehearse` does everything that a checkpoint does, in a temporary folder and
without the bytes of the tensors.
"""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import GenerationConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging as transformers_logging

from effopd.common.files import fsync
from effopd.distill.callback import EffOPDCallback
from effopd.distill.trl_host.state import save_optimizer, save_scaler, save_weights
from effopd.errors import CheckpointError
from effopd.extrapolate.saved_state import fingerprint

logger = logging.getLogger(__name__)

#: Modules that write tensors with safetensors, and their name for `save_file`.
_WRITERS = (
    ("safetensors.torch", "save_file"),
    ("transformers.modeling_utils", "safe_save_file"),
    ("peft.peft_model", "safe_save_file"),
)
RESCUED = "rescued"


# -- the generation config -------------------------------------------------------------------------


def idle_settings(config: GenerationConfig) -> dict[str, Any]:
    """Settings without effect, with which transformers refuses to save a generation config.

    Sampling settings without `do_sample`, beam settings with one beam, outputs that are not
    returned, and cache settings with `use_cache=False`.
    """
    defaults, idle_values = GenerationConfig(), {}
    groups: tuple[tuple[bool, tuple[str, ...]], ...] = (
        (
            config.do_sample is not True,
            ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        ),
        (config.num_beams in (None, 1), ("early_stopping", "length_penalty")),
        (config.return_dict_in_generate is not True, tuple(getattr(config, "extra_output_flags", ()))),
        (config.use_cache is False, ("cache_implementation", "cache_config")),
    )
    for idle, names in groups:
        for name in names if idle else ():
            value = getattr(config, name, None)
            if value is not None and value != getattr(defaults, name, None):
                idle_values[name] = value
    return idle_values


def savable(config: GenerationConfig) -> dict[str, Any]:
    """Drop settings without effect that keep a generation config from being saved; return them.

    Raises:
        CheckpointError: the config is still invalid.
    """
    dropped: dict[str, Any] = {}
    try:
        config.validate(strict=True)
        return dropped
    except ValueError:
        dropped = idle_settings(config)
    for name in dropped:
        setattr(config, name, getattr(GenerationConfig(), name, None))
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise CheckpointError(
            f"the student's generation_config cannot be saved: {_text(error)} Correct "
            "generation_config.json in the model's folder."
        ) from error
    return dropped


def check_generation_config(model: str, **load: Any) -> None:
    """Check that the generation config of a model folder or Hub id can be saved; reads no weights.

    Raises:
        CheckpointError: it is invalid even without its settings that have no effect.
    """
    try:
        config = GenerationConfig.from_pretrained(model, **load)
    except OSError:
        return  # it has none
    except ValueError as error:
        raise CheckpointError(
            f"generation_config.json of {model!r} is invalid: {_text(error)} Correct it, or remove the file."
        ) from error
    savable(config)


def tidy_generation_config(model: Any) -> None:
    """Make the student's generation config savable; one warning lists dropped settings.

    Raises:
        CheckpointError: as `savable`.
    """
    config = getattr(model, "generation_config", None)
    if config is not None and (dropped := savable(config)):
        settings = ", ".join(f"{name}={value}" for name, value in dropped.items())
        logger.warning(
            "The student's generation_config sets %s, which have no effect and which transformers refuses to save. "
            "The trained model's generation_config leaves them out. Rollouts use the run's own sampling settings.",
            settings,
        )


# -- the rehearsal ---------------------------------------------------------------------------------


def rehearse(trainer: Any) -> None:
    """Do everything that a checkpoint and the final save do, without tensor bytes; leave no files.

    Runs on the ranks that save. With sharded parameters (FSDP, DeepSpeed) it leaves out weights and
    optimizer, which all ranks write together.

    Raises:
        CheckpointError: something cannot be saved; the message names it and the fix.
    """
    root: Path = trainer.run_dir.root
    with _scratch(root) as folder, _without_tensors():
        for what, advice, save in _parts(trainer, folder):
            try:
                save()
            except Exception as error:
                raise CheckpointError(
                    f"{what} cannot be saved, so the first checkpoint will fail: {type(error).__name__}: "
                    f"{_text(error)} {advice} Nothing was trained, nothing was written."
                ) from error


def _parts(trainer: Any, folder: Path) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Yield (name, fix if it fails, function that saves it) per part."""
    model, state = trainer.accelerator.unwrap_model(trainer.model), folder / TRAINER_STATE_NAME
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if hasattr(model, "config"):
        advice = "Values of config.json must be JSON; correct it in the model's folder, or model.config."
        yield "the student's configuration", advice, lambda: model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        advice = "Correct generation_config.json in the model's folder, or model.generation_config."
        yield "the student's generation_config", advice, lambda: model.generation_config.save_pretrained(folder)
    if trainer.processing_class is not None:
        advice = (
            "Load it, correct it and save it again with save_pretrained: its settings must be JSON, its chat template "
            "text."
        )
        yield "the tokenizer or processor", advice, lambda: trainer.processing_class.save_pretrained(folder)
    yield "the training arguments", "They must be picklable.", lambda: torch.save(trainer.args, folder / "args")
    if not sharded:
        advice = "Weights that share memory must be declared as tied by the model's class, or be cloned."
        yield "the student's weights", advice, lambda: save_weights(trainer, folder)
        if not trainer.args.save_only_model:
            advice = "The states of the optimizer and the schedule must be picklable."
            yield "the optimizer's state", advice, lambda: save_optimizer(trainer, folder)
            yield "the gradient scaler", advice, lambda: save_scaler(trainer, folder)
    yield (
        "the trainer's state",
        "The states of stateful callbacks must be JSON.",
        lambda: trainer.state.save_to_json(str(state)),
    )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EffOPDCallback):  # its tensors are copies of the student's
            advice = "The ids of the task's examples must be JSON."
            yield "the look-ahead's state", advice, partial(json.dumps, fingerprint(callback.config, callback.scorer))


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A temporary folder in `root`; `root` is created, and removed again if it did not exist.

    Raises:
        CheckpointError: `root` is not writable.
    """
    missing = [path for path in (root, *root.parents) if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".rehearsal-", dir=root))
    except OSError as error:
        _remove_empty(missing)
        raise CheckpointError(
            f"nothing can be written to the run directory {root}: {error}. Choose an --output_dir with write "
            "permission."
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(missing)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def _without_tensors() -> Iterator[None]:
    """In this block, files are written without tensor bytes; shared tensors are still refused."""
    real_save, real_file = torch.save, safetensors.torch.save_file

    def save(value: Any, *args: Any, **kwargs: Any) -> None:
        real_save(
            tree_map(lambda leaf: leaf.new_empty(0) if isinstance(leaf, Tensor) else leaf, value), *args, **kwargs
        )

    def save_file(tensors: Mapping[str, Tensor], filename: Any, metadata: dict[str, str] | None = None) -> None:
        _refuse_shared(tensors)
        real_file({name: torch.empty(0, dtype=each.dtype) for name, each in tensors.items()}, filename, metadata)

    bars = transformers_logging.is_progress_bar_enabled()
    with ExitStack() as stack:
        transformers_logging.disable_progress_bar()
        if bars:
            stack.callback(transformers_logging.enable_progress_bar)
        stack.enter_context(_replaced(torch, "save", save))
        for module, name in _WRITERS:
            try:
                writer = importlib.import_module(module)
            except ImportError:
                continue
            if hasattr(writer, name):
                stack.enter_context(_replaced(writer, name, save_file))
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _refuse_shared(tensors: Mapping[str, Tensor]) -> None:
    """Raise if two tensors share memory, as safetensors does."""
    places: dict[tuple[str, int], str] = {}
    for name, tensor in tensors.items():
        if tensor.device.type == "meta" or not tensor.numel():
            continue
        other = places.setdefault((str(tensor.device), tensor.data_ptr()), name)
        if other != name:
            raise RuntimeError(f"{other} and {name} share memory.")


# -- the last resort -------------------------------------------------------------------------------


def rescue(trainer: Any) -> Path | None:
    """Save the weights as `rescued/model.safetensors` under their names in memory; return the path.

    Runs on the rank that saves. `None`: parameters are sharded, or this save fails too.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    path = trainer.run_dir.root / RESCUED / "model.safetensors"
    try:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        tensors: dict[str, Tensor] = {}
        seen: dict[int, set[torch.Size]] = {}
        for name, tensor in model.state_dict().items():
            shapes = seen.setdefault(tensor.untyped_storage().data_ptr(), set())
            if tensor.shape not in shapes:  # save tied weights once
                tensors[name] = tensor.detach().contiguous() if not shapes else tensor.detach().clone()
                shapes.add(tensor.shape)
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, path, {"format": "pt", "step": str(trainer.state.global_step)})
        fsync(path)
    except Exception as error:
        logger.error("Rescuing the weights failed too: %s", error)
        shutil.rmtree(path.parent, ignore_errors=True)
        return None
    return path


def save_failed(trainer: Any, what: str, error: Exception) -> CheckpointError:
    """Rescue the weights, and return the error of a save that failed during or after training."""
    rescued = rescue(trainer) if trainer.args.should_save else None
    last = trainer.run_dir.last_checkpoint()
    hint = f"The weights are in {rescued}: load them with load_state_dict." if rescued else ""
    hint += f" The last complete checkpoint is {last}: resume with --resume_from_checkpoint true." if last else ""
    return CheckpointError(
        f"{what} could not be saved: {type(error).__name__}: {_text(error)} "
        f"{hint.strip() or 'There is no checkpoint.'} Free disk space or fix the cause named above, then resume."
    )


def _text(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!")) else f"{text}."
