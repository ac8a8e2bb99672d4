"""`EffOPD`: the look-ahead for any training loop.

    trigger? → begin → score W, W + 2Δ, W + 4Δ, … → keep the furthest that passes → commit

Everything a search touches comes back: random state, training/eval mode of every submodule, and, unless a candidate is
accepted, the weights bit for bit. The anchor and the history are in `state_dict()`, so an interrupted run goes on as
if nothing had happened (the authors' public code forgets the anchor, and a resume then multiplies the whole
displacement by up to 11).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from effopd.errors import CheckpointError, ConfigError, EffOPDError, ScorerError
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.live_weights import LiveWeights
from effopd.extrapolate.schedule import SCHEDULES
from effopd.extrapolate.search import Score, SearchResult, first_failure_search
from effopd.files import write_atomically
from effopd.restore import evaluating, isolated_rng

Scorer = Callable[[Any], "Score | float"]

ANCHOR_FILE, STATE_FILE = "effopd_anchor.safetensors", "effopd_state.json"


class EffOPD:
    """Look ahead along the last displacement, keep what the scorer accepts.

    Args:
        model: the model being trained, unwrapped.
        scorer: callable `model → Score | float`, larger is better. It is called in eval mode, with the same random
            seed for every candidate of a search; whatever it does to random state is undone.
        config: defaults to the paper's settings.
        on_move: called after the search left the model at other weights than it found (e.g. re-sync an engine).

    Raises:
        ConfigError: the scorer is not callable, or no parameter is selected.

    Example:
        >>> lookahead = EffOPD(model, scorer=my_score)                                      # doctest: +SKIP
        >>> for step, batch in enumerate(loader, start=1):                                  # doctest: +SKIP
        ...     loss(model, batch).backward(); optimizer.step(); optimizer.zero_grad()
        ...     lookahead.step(step)
    """

    def __init__(
        self,
        model: nn.Module,
        scorer: Scorer,
        config: EffOPDConfig | None = None,
        *,
        on_move: Callable[[], None] | None = None,
    ):
        if not callable(scorer):
            raise ConfigError(
                f"scorer must be a callable model → number (larger is better), got {type(scorer).__name__}."
            )
        self.model, self.scorer, self.config = model, scorer, config or EffOPDConfig()
        self.weights = LiveWeights(model, self.config.resolved_parameters, self.config.anchor_device)
        self.history: list[dict[str, Any]] = []
        self.anchor_step = 0
        self._on_move = on_move

    def step(self, step: int) -> dict[str, Any] | None:
        """Call after optimizer step number `step` (the first is 1); searches if the schedule says so.

        Returns:
            The search as a JSON-ready row (also appended to `history`), or `None` if this step is no trigger.

        Raises:
            ScorerError: the scorer raised or returned no score; the weights are back where they were.
        """
        return self.search(step) if SCHEDULES[self.config.schedule](step) else None

    def search(self, step: int) -> dict[str, Any]:
        """Search now, whatever the schedule says; see `step`."""
        start = time.perf_counter()
        delta_norm = self.weights.displacement_norm()
        seed = int(np.random.SeedSequence([self.config.seed, step]).generate_state(1)[0])
        self.weights.begin()
        try:
            with evaluating(self.model):
                result = first_failure_search(
                    lambda scale: self._score(scale, seed), self.config.resolved_scales, self.config.resolved_gate
                )
            self.weights.move_to(result.accepted_scale)
        except BaseException:
            self.weights.abort()
            raise
        self.weights.commit()
        if result.accepted_scale != 0.0 and self._on_move is not None:
            self._on_move()
        row = self._row(step, delta_norm, result, time.perf_counter() - start)
        self.anchor_step = step
        self.history.append(row)
        return row

    def _score(self, scale: float, seed: int) -> Score:
        self.weights.move_to(scale)
        start = time.perf_counter()
        try:
            with isolated_rng(seed), torch.no_grad():
                value = self.scorer(self.model)
        except EffOPDError:
            raise
        except Exception as error:
            raise ScorerError(
                f"the scorer raised {type(error).__name__} at scale {scale}: {error}. The weights were restored; fix "
                "the scorer and resume from the last checkpoint."
            ) from error
        if isinstance(value, Score):
            return value
        try:
            return Score(float(value), seconds=time.perf_counter() - start)
        except (TypeError, ValueError) as error:
            raise ScorerError(
                f"the scorer returned {type(value).__name__}: expected a number or an effopd Score. The weights were "
                "restored."
            ) from error

    def _row(self, step: int, delta_norm: float, result: SearchResult, seconds: float) -> dict[str, Any]:
        return {
            "step": step,
            "anchor_step": self.anchor_step,
            "delta_norm": delta_norm if math.isfinite(delta_norm) else None,
            "accepted_scale": result.accepted_scale,
            "seconds": seconds,
            "generated_tokens": result.generated_tokens,
            "forward_tokens": result.forward_tokens,
            "trials": [trial.to_row() for trial in result.trials],
        }

    # -- state -------------------------------------------------------------------------------------------------

    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same for a resumed run to take the same decisions."""
        config = dataclasses.asdict(self.config)
        for name in ("enabled", "anchor_device"):
            config.pop(name)
        config |= {"gate": self.config.resolved_gate, "parameters": self.config.resolved_parameters}
        return {"config": config, "validation_ids": getattr(self.scorer, "validation_ids", None)}

    def state_dict(self) -> dict[str, Any]:
        """Anchor (fp32 tensors by name), its step, the history, and the settings they belong to."""
        return {
            "anchor": self.weights.state_dict(),
            "anchor_step": self.anchor_step,
            "history": list(self.history),
            "fingerprint": self._fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            CheckpointError: the state belongs to other settings or another D_v.
            WeightsError: the anchor does not fit the model.
        """
        saved, now = state["fingerprint"], json.loads(json.dumps(self._fingerprint()))
        saved = json.loads(json.dumps(saved))
        differing = [k for k in now["config"] if saved["config"].get(k) != now["config"][k]]
        if saved["validation_ids"] != now["validation_ids"]:
            differing.append("validation examples (D_v)")
        if differing:
            raise CheckpointError(
                f"the saved look-ahead state was made with other settings: {', '.join(differing)} differ. Resume with "
                "the settings of the run (its config.yaml), or start a new run."
            )
        self.weights.load_state_dict(state["anchor"])
        self.anchor_step, self.history = int(state["anchor_step"]), list(state["history"])

    def save(self, folder: str | Path) -> None:
        """Write the state into a checkpoint folder; the JSON file comes last, so its presence means "complete"."""
        from safetensors.torch import save_file

        folder, state = Path(folder), self.state_dict()
        anchor = {name: tensor.detach().cpu().contiguous() for name, tensor in state.pop("anchor").items()}
        write_atomically(folder / ANCHOR_FILE, lambda path: save_file(anchor, path))
        write_atomically(folder / STATE_FILE, lambda path: path.write_text(json.dumps(state, indent=1)))

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the folder has no complete look-ahead state, or one of other settings.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / STATE_FILE).is_file() or not (folder / ANCHOR_FILE).is_file():
            raise CheckpointError(
                f"{folder} has no complete look-ahead state ({STATE_FILE} and {ANCHOR_FILE} expected): it was written "
                "without EffOPD, or the run was killed while saving. Resume from an earlier checkpoint."
            )
        state = json.loads((folder / STATE_FILE).read_text())
        self.load_state_dict(state | {"anchor": load_file(folder / ANCHOR_FILE)})
