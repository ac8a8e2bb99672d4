"""`EffOPD`: the look-ahead for any training loop.

    trigger? → begin → score W, W + 2Δ, W + 4Δ, … → accept or restore → commit
    strategies that predict: observe the first steps → fit → jump

A search restores the random state and the training/eval mode of every submodule. Unless it accepts
a candidate, it also restores the weights bit for bit. `state_dict()` contains the anchor and the
history, so a resumed run makes the same decisions as an uninterrupted one.

Differs from the authors' public code, which does not save the anchor: after a resume, its first
search multiplies the whole update since the start by up to 11.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effopd.common.distributed import assert_same_on_ranks, rank, world_size
from effopd.errors import ConfigError
from effopd.extrapolate.after_search import OptimizerUpdate
from effopd.extrapolate.checks import check_model, check_scorer, movable_weights, refuse_unread
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.lora_weights import has_adapters
from effopd.extrapolate.movable import Direction
from effopd.extrapolate.predicting import Predictor, finite_or_none
from effopd.extrapolate.saved_state import check_same, fingerprint, load_state, write_state
from effopd.extrapolate.scorers.base import Scorer
from effopd.extrapolate.search import Score
from effopd.extrapolate.searcher import NOWHERE, Searcher
from effopd.extrapolate.weight_copies import Movable, refuse_masters
from effopd.runs.records import SearchRecord

logger = logging.getLogger(__name__)


class EffOPD:
    """Look-ahead: search along the last update W − anchor and move to the point that is accepted.

    Use it as a context manager, or call `close`, if training continues without it: closing removes
    its hooks from the optimizer.

    Args:
        model: the unwrapped model being trained.
        scorer: callable `model → Score | float`, larger is better. It is called in eval mode with
            the same random seed for every candidate of a search; the random state is restored
            afterwards. `None` for strategies that do not score.
        config: settings; `None`: the paper's.
        target: measures the target accuracy of a fit, unless the strategy's arguments set it.
        on_move: called after a search has changed the weights, e.g. to re-sync an engine.
        optimizer: the loop's optimizer, for strategies that reset its moments or adapt its learning
            rate, and for optimizers that keep copies of the weights, which a jump moves too. Logged
            learning rates are the schedule's: the factor of `LearningRateMultiplier` applies only
            during the optimizer step.
        wanted: called before every optimizer step; the learning rate is adapted while it returns
            true. Default: until `close`.
        updates: number of consecutive optimizer steps on the same examples.
        seen: called before every optimizer step and after a search; whether an earlier step trained
            on the examples of the next gradient. Only gradients on new ones steer the rate.
        host: values of settings that the host decides, compared on resume (see `fingerprint`).
        score_timeout: time limit for scoring one candidate, in seconds; `None`: no limit.
        averages: averages of the weights, which a jump moves too.

    Raises:
        ConfigError: the scorer is missing or not callable, the strategy is 'none', no parameter is
            selected, `config.anchor_device` cannot hold the anchor, a custom scorer does not read a
            setting, another look-ahead adapts this optimizer's learning rate, or the optimizer
            steps copies of the parameters.

    Example:
        >>> look_ahead = EffOPD(model, scorer=my_score)  # doctest: +SKIP
        >>> for step, batch in enumerate(loader, start=1):  # doctest: +SKIP
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
        updates: int = 1,
        seen: Callable[[], bool] = lambda: False,
        host: Mapping[str, Any] | None = None,
        score_timeout: float | None = None,
        averages: Sequence[Movable] = (),
    ):
        self.config = config or EffOPDConfig()
        check_scorer(scorer, self.config, score_timeout)
        check_model(model, self.config, target=target is not None)
        refuse_unread(self.config, scorer)
        self._target, self._on_move, self._host, self._closed = target, on_move, dict(host or {}), False
        self.model, self.weights = model, movable_weights(model, self.config, optimizer)
        refuse_masters(optimizer, model)
        self._searcher = Searcher(model, self.weights, scorer, self.config.seed, score_timeout)
        self.predictor = (
            Predictor(fit, self.config.strategy_args, self.config.seed, self.config.anchor_device)
            if (fit := self.config.rules.fit)
            else None
        )
        self._optimizer = OptimizerUpdate(
            self.config, optimizer, wanted, averages, updates=updates, seen=seen, lora=has_adapters(model)
        )
        self._warned = False
        self.history: list[SearchRecord] = []
        self.anchor_step = 0
        self.schedule_start = 0

    @property
    def scorer(self) -> Scorer | None:
        """The scorer; can be replaced between searches."""
        return self._searcher.scorer

    @scorer.setter
    def scorer(self, scorer: Scorer | None) -> None:
        self._searcher.scorer = scorer

    # -- searching ---------------------------------------------------------------------------------

    def due(self, step: int, since: int | None = None) -> bool:
        """Whether `step(step, since)` would observe or search now."""
        return any(self._due(each) for each in _steps(step, since))

    def _due(self, step: int) -> bool:
        if self.predictor is not None:
            return self.predictor.observes(step) or self.predictor.predicts(step)
        start, past = self.schedule_start, self.history
        if start:
            past = [dataclasses.replace(each, step=each.step - start) for each in past if each.step > start]
        return self.config.triggers(step - start, past)

    def step(self, step: int, since: int | None = None) -> SearchRecord | None:
        """Observe or search if due. Call after every optimizer step.

        Args:
            step: number of the optimizer step; the first is 1.
            since: the last step after which this was possible, for loops that cannot search after
                every step: what was due in between is done now. Default: `step` − 1.

        Returns:
            The search or observation, also appended to `history`; `None` if none was due.

        Raises:
            ScorerError: the scorer raised, took too long or returned no score. The weights are
                restored.
        """
        self._check_open()
        step = int(step)  # also from NumPy, whose numbers JSON cannot hold
        if self.predictor is None:
            return self.search(step) if self.due(step, since) else None
        steps = _steps(step, since)
        observed = self._observe(step, self.predictor) if any(map(self.predictor.observes, steps)) else None
        if any(map(self.predictor.predicts, steps)):
            return self.search(step, observed)
        if observed is not None:
            self.history.append(observed)
        return observed

    def search(self, step: int, observed: SearchRecord | None = None) -> SearchRecord:
        """Search now, regardless of the schedule; see `step`.

        Args:
            observed: an observation of the same step. Its score becomes the start's, and its cost
                is added to the search.
        """
        self._check_open()
        with self._optimizer.carried() as held:
            return self._search(int(step), observed, held)

    def _search(self, step: int, observed: SearchRecord | None, held: int) -> SearchRecord:
        start, config = time.perf_counter(), self.config
        self._notice_unfrozen()
        self._assert_same(step)
        delta_norm = self.weights.displacement_norm()
        direction, quality = self._direction(step)
        moved = delta_norm != 0.0 or self.predictor is not None
        result, memory = self._searcher.search(
            step,
            direction,
            lambda score: config.rules.search(score, config, config.strategy_args) if moved else NOWHERE,
            self._optimizer.after_one_of_several,
        )
        if result.accepted_scale != 0.0 and self._on_move is not None:
            self._on_move()
        factor = self._optimizer.after(result, self.history)
        trials = [trial.to_record() for trial in result.trials]
        record = SearchRecord(
            step=step,
            anchor_step=self.anchor_step,
            delta_norm=finite_or_none(delta_norm),
            accepted_scale=result.accepted_scale,
            best_scale=result.best_scale,
            seconds=time.perf_counter() - start + (observed.seconds if observed else 0.0),
            generated_tokens=result.generated_tokens + (observed.generated_tokens if observed else 0),
            forward_tokens=result.forward_tokens + (observed.forward_tokens if observed else 0),
            teacher_tokens=result.teacher_tokens + ((observed.teacher_tokens or 0) if observed else 0),
            trials=(*(observed.trials if observed else trials[:1]), *trials[1:]),
            memory_bytes=memory + held + (0 if self.predictor is None else self.predictor.observations.nbytes),
            learning_rate_factor=factor,
            learning_rate_factor_total=None if factor is None else self.learning_rate_factor,
            lora_lost_share=self.weights.lost_share,
            fit=None if quality is None else {name: finite_or_none(value) for name, value in quality.items()},
        )
        self.anchor_step = step
        self.history.append(record)
        return record

    def _notice_unfrozen(self) -> None:
        """Move the parameters that were unfrozen, or warn once if the strategy cannot."""
        if self.predictor is None:
            names = self.weights.take_unfrozen()
            then = "They move from the next search on, without their update so far."
        else:
            names = () if self._warned else tuple(self.weights.unfrozen())
            then = f"A fit of '{self.config.strategy}' lacks them, so they stay."
            self._warned = self._warned or bool(names)
        if names and rank() == 0:
            logger.warning(
                "%d parameters that the look-ahead moves were frozen when it was built (%s). %s Unfreeze parameters "
                "before EffOPD is built, or call reanchor(step) right after unfreezing them.",
                len(names),
                ", ".join(names[:3]) + (", …" if len(names) > 3 else ""),
                then,
            )

    def _direction(self, step: int) -> tuple[Direction, Mapping[str, float] | None]:
        if self.predictor is not None:
            return self.predictor.direction()
        return self.config.rules.direction(self.config.seed, step), None

    def _observe(self, step: int, predictor: Predictor) -> SearchRecord:
        searcher, target = self._searcher, self._target
        with self._optimizer.evaluated():
            return predictor.observe(
                step,
                self.anchor_step,
                self.weights,
                score=lambda: searcher.score_present(step),
                target=lambda: searcher.measure(target, step),
            )

    # -- the learning rate -------------------------------------------------------------------------

    @property
    def learning_rate_factor(self) -> float:
        """Current multiplier of the schedule's learning rate."""
        return self._optimizer.factor

    @property
    def finds_rate(self) -> bool:
        """Whether the next search sets the learning rate, because none has yet."""
        return self._optimizer.finds_rate

    @property
    def applied_learning_rate_factor(self) -> float:
        """Multiplier of the schedule's learning rate in the last optimizer step."""
        return self._optimizer.applied

    # -- life --------------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove all hooks from the optimizer and refuse further searches.

        The history and `state_dict` remain readable. Safe to call twice.
        """
        self._closed = True
        self._optimizer.close()

    def __enter__(self) -> EffOPD:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reanchor(self, step: int) -> None:
        """Make the current weights the anchor, without a search, and drop a fit's observations.

        Call it when the training objective changes (loss, data or rollout length), because an
        update must not span two objectives. Call it also after unfreezing parameters: they move
        from then on.
        """
        self.weights.take_unfrozen()
        with self._optimizer.evaluated():
            self.weights.begin()
            self.weights.commit()
        self.anchor_step = int(step)
        if self.predictor is not None:
            self.predictor.forget()

    def restart(self, step: int) -> None:
        """`reanchor`, and count the steps of the schedule or of a fit from `step`.

        Call it when a new stage of training begins, such as that of another teacher. The history
        and the learning-rate factor remain.
        """
        self.reanchor(step)
        self._start_schedule(step)

    def _start_schedule(self, step: int) -> None:
        self.schedule_start = step = int(step)
        if self.predictor is not None:
            self.predictor.start = step

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this look-ahead was closed. Build a new EffOPD to search again.")

    def _assert_same(self, step: int) -> None:
        if world_size() > 1:
            assert_same_on_ranks(
                "(step, anchor's step, searches so far, checksum of the weights)",
                (step, self.anchor_step, len(self.history), self.weights.checksum()),
            )

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Anchor (fp32, by parameter name), its step, observations, history, learning-rate factor
        and the fingerprint of the settings.
        """
        return {
            "anchor": self.weights.state_dict(),
            "observations": None if self.predictor is None else self.predictor.observations.state_dict(),
            "anchor_step": self.anchor_step,
            "schedule_start": self.schedule_start,
            "history": [record.to_row() for record in self.history],
            **self._optimizer.state_dict(),
            "fingerprint": fingerprint(self.config, self.scorer, self._host),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            CheckpointError: the settings or the validation prompts differ from the saved ones.
            WeightsError: the anchor does not fit the model.
        """
        check_same(state["fingerprint"], self.config, self.scorer, self._host)
        self.weights.take_unfrozen(state["anchor"])
        self.weights.load_state_dict(state["anchor"])
        if self.predictor is not None:
            self.predictor.observations.load_state_dict(state["observations"])
        self.anchor_step = int(state["anchor_step"])
        self._start_schedule(int(state.get("schedule_start", 0)))
        self.history = [SearchRecord.from_row(row) for row in state["history"]]
        self._optimizer.resume(state, self.history)

    def save(self, folder: str | Path) -> None:
        """Write the state into a checkpoint folder, which is created if it does not exist.

        The JSON file is written last and marks the state as complete.

        Call it on all ranks: each rank writes its shards, and rank 0 writes the rest.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_state(Path(folder), self.state_dict(), self.weights.sharded)

    def load(self, folder: str | Path) -> None:
        """Load the state that `save` wrote.

        Raises:
            CheckpointError: the folder has no complete look-ahead state, or the settings differ.
        """
        self.load_state_dict(load_state(Path(folder), self.weights.sharded))


def _steps(step: int, since: int | None) -> range:
    """The steps after `since` up to `step`."""
    return range(step if since is None else since + 1, step + 1)
