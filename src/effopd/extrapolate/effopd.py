"""`EffOPD`: the look-ahead for any training loop.

    trigger? → begin → score W, W + 2Δ, W + 4Δ, … → keep the furthest that passes → commit

(or, for the strategies that predict: observe the first steps → fit → jump).

Everything a search touches comes back: random state, training/eval mode of every submodule, and, unless a candidate is
accepted, the weights bit for bit. The anchor and the history are in `state_dict()`, so an interrupted run goes on as
if nothing had happened (the authors' public code forgets the anchor, and a resume then multiplies the whole
displacement by up to 11).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effopd.common.distributed import assert_same_on_ranks, broadcast_from_rank0, raise_on_all_ranks, world_size
from effopd.common.isolation import evaluating, isolated_rng, time_limit
from effopd.errors import ConfigError, EffOPDError, NonFiniteWeightsError, ScorerError
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.learning_rate import SteeredRate
from effopd.extrapolate.live_weights import Direction, LiveWeights, displacement, usable_device
from effopd.extrapolate.lora_weights import LoraWeights, has_adapters, selected_adapters
from effopd.extrapolate.observations import Observations
from effopd.extrapolate.parameter_rules import inside, select, trained_parameters
from effopd.extrapolate.saved_state import check_same, fingerprint, load_state, write_state
from effopd.extrapolate.search import Score, SearchResult, Trial
from effopd.extrapolate.settings_in_use import refuse_unread
from effopd.extrapolate.strategies import Prediction, steering

Scorer = Callable[[Any], "Score | float"]


def _needs_whole_matrices(config: EffOPDConfig) -> bool:
    return config.plan.direction is None or config.plan.direction(0, 0) is not displacement


def check_model(model: nn.Module, config: EffOPDConfig, *, target: bool) -> None:
    """Refuse what can be told before training: nothing is copied and nothing is moved.

    Args:
        model: the model to be trained, unwrapped.
        config: of the look-ahead.
        target: whether the accuracy that 'alpha_opd' aims at can be measured.

    Raises:
        ConfigError: strategy 'none'; nothing to aim at; an unusable device; `parameters` that match nothing; LoRA adapters that
            the strategy cannot move.
    """
    if not config.enabled:
        raise ConfigError("strategy 'none' is plain training: leave the look-ahead out, or choose a strategy.")
    if config.strategy == "alpha_opd" and config.alpha_target is None and not target:
        raise ConfigError(
            "strategy 'alpha_opd' needs the accuracy it aims at: set alpha_target (there is no teacher to measure)."
        )
    usable_device(config.anchor_device)
    if not has_adapters(model):
        select(trained_parameters(model), config.resolved_parameters, type(inside(model)).__name__)
        return
    if _needs_whole_matrices(config):
        raise ConfigError(
            f"strategy '{config.strategy}' needs whole matrices, but the student trains LoRA adapters. Use "
            "effopd, line_search, noop or fixed, or train the full weights."
        )
    selected_adapters(model, config.resolved_parameters)


class EffOPD:
    """Look ahead along the last displacement, keep what the scorer accepts.

    Args:
        model: the model being trained, unwrapped.
        scorer: callable `model → Score | float`, larger is better. It is called in eval mode, with the same random
            seed for every candidate of a search; whatever it does to random state is undone. `None` for strategies
            that do not score.
        config: defaults to the paper's settings.
        target: measures the accuracy that 'alpha_opd' aims at (unless `config.alpha_target` says it).
        optimizer: the loop's optimizer, for strategies that reset its moments after a jump or steer its learning rate. The
            rate is steered on top of the schedule it has: see `SteeredRate`; a logged rate is the schedule's.
        on_move: called after the search left the model at other weights than it found (e.g. re-sync an engine).
        wanted: asked before every optimizer step whether its rate is still to be steered; default: until `close`.
        host: what the host decides where the settings leave it open, for resumed runs (`fingerprint`).

    Use it as a context manager, or call `close`, where the loop goes on without it: then nothing is left on the optimizer.

    Raises:
        ConfigError: the scorer is missing or not callable, the strategy is 'none', no parameter is selected, the anchor cannot
            live on `config.anchor_device`, a setting belongs to another scorer, or another look-ahead steers this optimizer.

    Example:
        >>> look_ahead = EffOPD(model, scorer=my_score)                                      # doctest: +SKIP
        >>> for step, batch in enumerate(loader, start=1):                                  # doctest: +SKIP
        ...     loss(model, batch).backward(); optimizer.step(); optimizer.zero_grad()
        ...     look_ahead.step(step)
    """

    def __init__(
        self,
        model: nn.Module,
        scorer: Scorer | None,
        config: EffOPDConfig | None = None,
        *,
        target: Callable[[], Score | float] | None = None,
        on_move: Callable[[], None] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        wanted: Callable[[], bool] = lambda: True,
        host: Mapping[str, Any] | None = None,
    ):
        self.model, self.scorer, self.config = model, scorer, config or EffOPDConfig()
        self._host, self._closed = dict(host or {}), False
        if not callable(scorer) and (scorer is not None or self.config.resolved_scorer is not None):
            raise ConfigError(
                f"scorer must be a callable model → number (larger is better), got {type(scorer).__name__}."
            )
        check_model(model, self.config, target=target is not None)
        refuse_unread(self.config, scorer)
        if optimizer is None and (self.config.resolved_optimizer == "reset" or self.config.resolved_steer):
            raise ConfigError(
                f"strategy '{self.config.strategy}' resets the optimizer's moments or steers its learning rate: pass "
                "optimizer=…, or set optimizer='keep' and steer=False."
            )
        self._optimizer = optimizer
        self._target = target
        self.observations = Observations()
        self.weights = self._weights(model)
        self._rate = SteeredRate(optimizer, wanted) if self.config.resolved_steer else None
        self.history: list[dict[str, Any]] = []
        self.anchor_step = 0
        self._on_move = on_move

    def _weights(self, model: nn.Module) -> LiveWeights:
        """All of the weights, or the LoRA factors, whichever is trained."""
        kind = LoraWeights if has_adapters(model) else LiveWeights
        weights = kind(model, self.config.resolved_parameters, self.config.anchor_device)
        if weights.sharded and _needs_whole_matrices(self.config):
            raise ConfigError(
                f"strategy '{self.config.strategy}' needs whole matrices, but this process holds shards of them (FSDP2). Use "
                "effopd, effopd-released, line_search, noop or fixed, or train with DDP."
            )
        return weights

    def step(self, step: int) -> dict[str, Any] | None:
        """Call after optimizer step number `step` (the first is 1); observes and searches when it is time to.

        Returns:
            The search as a JSON-ready row (also appended to `history`), or `None` if there was nothing to do.

        Raises:
            ScorerError: the scorer raised or returned no score; the weights are back where they were.
        """
        self._check_open()
        row = self._observe(step) if self.config.observes(step) else None
        return self.search(step, row) if self.config.triggers(step, self.history) else row

    def search(self, step: int, observed: dict[str, Any] | None = None) -> dict[str, Any]:
        """Search now, whatever the schedule says; see `step`. The cost of an observation made at the same step
        (`observed`) is added to the row."""
        self._check_open()
        start = time.perf_counter()
        plan, seed = self.config.plan, self._seed(step)
        if world_size() > 1:
            assert_same_on_ranks(
                "(step, anchor's step, searches so far, checksum of the weights)",
                (step, self.anchor_step, len(self.history), self.weights.checksum()),
            )
        delta_norm = self.weights.displacement_norm()
        if plan.fit is not None:
            direction, quality = self._prediction()
        else:
            assert plan.direction is not None
            direction, quality = plan.direction(self.config.seed, step), None
        self.weights.begin(direction)
        memory = self.weights.nbytes + self.observations.nbytes
        try:
            if delta_norm == 0.0 and plan.fit is None:  # nothing has moved since the anchor: nowhere to look
                result = SearchResult(0.0, (Trial(0.0, None, "start"),))
            else:
                with evaluating(self.model):
                    result = plan.search(lambda scale: self._score(scale, seed), self.config)
            result = self._move(result)
            if world_size() > 1:
                assert_same_on_ranks(
                    "(accepted scale, checksum of the weights)", (result.accepted_scale, self.weights.checksum())
                )
        except BaseException:
            self.weights.abort()
            raise
        self.weights.commit()
        if result.accepted_scale != 0.0 and self._on_move is not None:
            self._on_move()
        factor = self._after(result) if len(result.trials) > 1 else 1.0
        row = self._row(step, delta_norm, result, time.perf_counter() - start) | {"memory_bytes": memory}
        if self.config.resolved_steer:
            row |= {"learning_rate_factor": factor, "learning_rate_factor_total": self.learning_rate_factor}
        if isinstance(self.weights, LoraWeights):
            row["lora_lost_share"] = self.weights.lost_share
        if quality is not None:
            row["fit"] = {name: value if math.isfinite(value) else None for name, value in quality.items()}
        if observed is not None:
            self.history.remove(observed)
            row["trials"][0] = observed["trials"][0]
            for name in ("seconds", "generated_tokens", "forward_tokens"):
                row[name] += observed[name]
        self.anchor_step = step
        self.history.append(row)
        return row

    def _after(self, result: SearchResult) -> float:
        """What a search does to the optimizer; returns the factor on the learning rate."""
        if result.accepted_scale > 0 and self.config.resolved_optimizer == "reset":
            assert self._optimizer is not None
            self._optimizer.state.clear()
        if self._rate is None:
            return 1.0
        before = self.history[-1]["best_scale"] if self.history else 0.0
        factor = steering(result.best_scale, before, self._rate.factor)
        self._rate.factor *= factor
        return factor

    @property
    def learning_rate_factor(self) -> float:
        """What the schedule's learning rate is multiplied with at present."""
        return 1.0 if self._rate is None else self._rate.factor

    @property
    def applied_learning_rate_factor(self) -> float:
        """What the schedule's learning rate was multiplied with in the last optimizer step."""
        return 1.0 if self._rate is None else self._rate.applied

    def close(self) -> None:
        """Let go of the optimizer and search no more; for a loop that goes on without the look-ahead, or with a new one.
        The history and `state_dict` can still be read. Safe to call twice."""
        self._closed = True
        if self._rate is not None:
            self._rate.close()

    def __enter__(self) -> EffOPD:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reanchor(self, step: int) -> None:
        """Start the displacement anew from the present weights, without a search.

        For a training loop that changes its objective on the way (another loss, data or rollout length): a
        displacement must not span two objectives. Observations of a fit start anew too.
        """
        self.weights.begin()
        self.weights.commit()
        self.anchor_step = step
        self.observations = Observations()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this look-ahead was closed: build a new EffOPD to go on looking ahead.")

    def _seed(self, step: int) -> int:
        return int(np.random.SeedSequence([self.config.seed, step]).generate_state(1)[0])

    def _move(self, result: SearchResult) -> SearchResult:
        """Go where the search says; a point that it did not score itself may turn out non-finite: then stay."""
        try:
            self.weights.move_to(result.accepted_scale)
        except NonFiniteWeightsError:
            return SearchResult(0.0, (*result.trials[:-1], Trial(result.accepted_scale, None, "non-finite")))
        return result

    def _observe(self, step: int) -> dict[str, Any]:
        """Remember the displacement from the start, and how good it is if the fit wants to know."""
        fit, start = self.config.plan.fit, time.perf_counter()
        assert fit is not None
        if not self.observations.steps:
            self.observations.target = self._measure_target(step)
        score = None
        if fit.scored:
            self.weights.begin()
            try:
                with evaluating(self.model):
                    score = self._score(0.0, self._seed(step))
            finally:
                self.weights.abort()
        kept = {name: fit.keep(delta) for name, delta in self.weights.displacements()}
        self.observations.add(step, kept, score.mean if score else None, self.config.anchor_device)
        row = self._row(
            step,
            self.weights.displacement_norm(),
            SearchResult(0.0, (Trial(0.0, score, "start"),)),
            time.perf_counter() - start,
        )
        row |= {"observation": len(self.observations.steps)}
        row["generated_tokens"] += self.observations.take_target_tokens()
        self.history.append(row)
        return row

    def _measure_target(self, step: int) -> Score | None:
        if self.config.strategy != "alpha_opd":
            return None
        if self.config.alpha_target is not None:
            return Score(self.config.alpha_target)
        assert self._target is not None
        measure = self._target
        with isolated_rng(self._seed(step)), torch.no_grad():
            value = broadcast_from_rank0(raise_on_all_ranks(lambda: measure()))
        return value if isinstance(value, Score) else Score(float(value))

    def _prediction(self) -> tuple[Direction, Mapping[str, float]]:
        """The direction W_0 + predicted displacement − W; parameters without a prediction stay."""
        fit, seen = self.config.plan.fit, self.observations
        assert fit is not None
        if len(seen.steps) < 4:  # observations were dropped on the way (`reanchor`)
            prediction = Prediction({}, {"observations": len(seen.steps)})
        else:
            prediction = fit.predict(seen.by_parameter, seen.steps, seen.quality(), self.config)

        def direction(name: str, origin: Tensor, anchor: Tensor) -> Tensor:
            delta = prediction.delta.get(name)
            return torch.zeros_like(origin) if delta is None else anchor + delta.to(anchor.device) - origin

        return direction, prediction.quality

    def _score(self, scale: float, seed: int) -> Score:
        """The score of a point: rank 0's, so that every rank decides alike. Scorers that share the work between ranks
        return the whole score on each."""
        self.weights.move_to(scale)
        return broadcast_from_rank0(raise_on_all_ranks(lambda: self._ask(scale, seed)))

    def _ask(self, scale: float, seed: int) -> Score:
        assert self.scorer is not None
        start = time.perf_counter()
        try:
            with isolated_rng(seed), torch.no_grad(), time_limit(self.config.score_timeout):
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
            "best_scale": result.best_scale,
            "seconds": seconds,
            "generated_tokens": result.generated_tokens,
            "forward_tokens": result.forward_tokens,
            "trials": [trial.to_row() for trial in result.trials],
        }

    # -- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Anchor (fp32 tensors by name), its step, observations, history, steered rate, and the settings they belong to."""
        return {
            "anchor": self.weights.state_dict(),
            "observations": self.observations.state_dict(),
            "anchor_step": self.anchor_step,
            "history": list(self.history),
            "learning_rate_factor": self.learning_rate_factor,
            "fingerprint": fingerprint(self.config, self.scorer, self._host),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            CheckpointError: the state belongs to other settings or another D_v.
            WeightsError: the anchor does not fit the model.
        """
        check_same(state["fingerprint"], self.config, self.scorer, self._host)
        self.weights.load_state_dict(state["anchor"])
        self.observations.load_state_dict(state["observations"])
        self.anchor_step, self.history = int(state["anchor_step"]), list(state["history"])
        if self._rate is not None:
            self._rate.factor = float(state["learning_rate_factor"])

    def save(self, folder: str | Path) -> None:
        """Write the state into a checkpoint folder; the JSON file comes last, so its presence means "complete".

        With several processes every rank calls this: sharded parameters are written by the rank that holds them, the rest
        by rank 0.
        """
        write_state(Path(folder), self.state_dict(), self.weights.sharded)

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the folder has no complete look-ahead state, or one of other settings.
        """
        self.load_state_dict(load_state(Path(folder), self.weights.sharded))
