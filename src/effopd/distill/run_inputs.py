"""Measure the inputs of a run, write them, and compare them on resume (`runs.inputs`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from effopd.common.distributed import rank
from effopd.distill.run_record import RecordCallback
from effopd.errors import CheckpointError
from effopd.models.fingerprint import tensors_sha256
from effopd.models.logit_path import is_whole
from effopd.runs.inputs import Inputs, PromptSet, prompt_set, read_inputs, write_inputs

logger = logging.getLogger(__name__)

#: Settings of an adapter that decide what its saved weights mean.
_ADAPTER = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "modules_to_save", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip


class InputsCallback(RecordCallback[Inputs]):
    """Writes `inputs.json` into the run directory and its checkpoints; compares it on resume."""

    def __init__(self, trainer: Any):
        super().__init__(trainer.run_dir.root, lambda: inputs_of(trainer), write_inputs, check_same_inputs)
        self._trainer = trainer

    def check_resume(self, checkpoint: Path) -> None:
        """Compare with the checkpoint's inputs; without an adapter, keep its initial weights.

        Raises:
            CheckpointError: as `check_same_inputs`.
        """
        before = read_inputs(checkpoint)
        if before is not None and before.adapter is None:  # the present weights are replaced, so not measured
            self.record = replace(inputs_of(self._trainer, weights=False), weights=before.weights)
        super().check_resume(checkpoint)


def inputs_of(trainer: Any, *, weights: bool = True) -> Inputs:
    """Inputs of a trainer with its initial weights; only rank 0 measures prompts and weights.

    Args:
        weights: whether to measure the weights.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = adapter_settings(model)
    if rank() > 0:
        return Inputs(adapter=adapter)
    task = trainer.eval_task
    held_out = _prompts(trainer.eval_dataset) if task is None else (each.prompt for each in task.examples)
    train = _prompts(trainer.train_dataset)
    return Inputs(
        train=None if train is None else prompt_set(train),
        held_out=None if held_out is None else prompt_set(held_out),
        weights=initial_sha256(model, adapter=adapter is not None) if weights and is_whole(model) else None,
        adapter=adapter,
    )


def adapter_settings(model: Any) -> dict[str, Any] | None:
    """Shape and scale of a model's adapters, by name; `None`: it has none."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    return {
        name: {key: _plain(getattr(config, key)) for key in _ADAPTER if getattr(config, key, None) is not None}
        for name, config in configs.items()
    }


def initial_sha256(model: Any, *, adapter: bool) -> str:
    """SHA-256 of the parameters (name, dtype, shape, bytes); with an adapter, of the frozen ones.

    Names do not depend on which modules have an adapter.
    """
    named = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if not (adapter and parameter.requires_grad)
    }
    return tensors_sha256(sorted(named.items()))


def check_same_inputs(checkpoint: Path, now: Inputs) -> None:
    """Check a run's inputs against those of the checkpoint that it resumes from.

    Other training prompts are a warning. Values that are not known on one side are not compared.

    Raises:
        CheckpointError: an adapter has another base, shape or scale; or the held-out prompts
            differ, so that evaluations before and after could not be compared.
    """
    before = read_inputs(checkpoint)
    if before is None or rank() > 0:
        return
    problems = _adapter_problems(before, now)
    if _differ(before.held_out, now.held_out):
        problems.append(
            f"held-out prompts: {before.held_out} → {now.held_out}; evaluations before and after could not be "
            "compared, and rows held out now may have been trained on"
        )
    if problems:
        raise CheckpointError(
            f"{checkpoint} was written by a run with other inputs: {'; '.join(problems)}. Resume with the run's data "
            "and settings (config.yaml in its folder), or start a new run from its weights: --model_name_or_path "
            f"{checkpoint} with another --output_dir."
        )
    if _differ(before.train, now.train):
        logger.warning(
            "Training prompts differ from those of %s: %s → %s. This run will differ from an uninterrupted one.",
            checkpoint,
            before.train,
            now.train,
        )


def _adapter_problems(before: Inputs, now: Inputs) -> list[str]:
    """What an adapter's saved weights do not fit."""
    if before.adapter is None or now.adapter is None:
        return []
    problems = []
    for name in sorted(before.adapter.keys() & now.adapter.keys()):
        old, new = before.adapter[name], now.adapter[name]
        keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        problems += [f"adapter '{name}': {key} {old.get(key)} → {new.get(key)}" for key in keys]
    if None not in (before.weights, now.weights) and before.weights != now.weights:
        problems.append(f"weights below the adapter: {str(before.weights)[:12]} → {str(now.weights)[:12]}")
    return problems


def _differ(old: PromptSet | None, new: PromptSet | None) -> bool:
    return old is not None and new is not None and old != new


def _prompts(data: Any) -> Iterator[Any] | None:
    """Prompts of a data set, or of several by name; `None`: a stream, or one without prompts."""
    if isinstance(data, dict):
        parts = [_prompts(part) for part in data.values()]
        return None if None in parts else (prompt for part in parts if part is not None for prompt in part)
    if not isinstance(data, Dataset) or "prompt" not in data.column_names:
        return None
    return (row["prompt"] for row in data.select_columns(["prompt"]))


def _plain(value: Any) -> Any:
    """A setting as JSON would return it, sets in alphabetical order."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)
