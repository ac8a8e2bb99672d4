"""`EffOPD`: the look-ahead for any training loop.

    trigger? → begin → score W, W + 2Δ, W + 4Δ, … → keep the best that passes → commit

(or, for the strategies that predict: observe the first steps → fit → jump).

Everything a search touches comes back: random state, training/eval mode of every submodule, and,
unless a candidate is accepted, the weights bit for bit. The anchor and the history are in
`state_dict()`, so an interrupted run goes on as if nothing had happened (the authors' public code
forgets the anchor, and a resume then multiplies the whole displacement by up to 11).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effopd.common.distributed import assert_same_on_ranks, world_size
from effopd.errors import ConfigError
from effopd.extrapolate.after_search import OptimizerUpdate
from effopd.extrapolate.checks import check_model, check_scorer, movable_weights, refuse_unread
from effopd.extrapolate.config import EffOPDConfig
from effopd.extrapolate.movable import Direction
from effopd.extrapolate.predicting import Predictor, finite_or_none
from effopd.extrapolate.saved_state import check_same, fingerprint, load_state, write_state
from effopd.extrapolate.scoring import Scorer
from effopd.extrapolate.search import Score
from effopd.extrapolate.searcher import NOWHERE, Searcher
from effopd.runs.records import SearchRecord


class EffOPD:
    """Look ahead along the last displacement, keep what the scorer accepts.

    Args:
        model: the model being trained, unwrapped.
        scorer: callable `model → Score | float`, larger is better. It is called in eval mode, with
            the same random seed for every candidate of a search; whatever it does to random state
            is undone. `None` for strategies that do not score.
        config: defaults to the paper's settings.
        target: measures the accuracy that a fit aims at (unless the strategy's arguments give it).
        optimizer: the loop's optimizer, for strategies that reset its moments after a jump or adapt
            its learning rate. The factor comes on top of the schedule: see
            `LearningRateMultiplier`; a logged rate is the schedule's.
        on_move: called after the search left the model at other weights than before (e.g. re-sync
            an engine).
        wanted: asked before every optimizer step whether its rate is still to be adapted; default:
            until `close`.
        host: the values of settings that the host decides, for resumed runs (`fingerprint`).
        score_timeout: stop with an error if scoring one candidate takes longer, in seconds; `None`:
            no limit.

    Use it as a context manager, or call `close`, where the loop goes on without it: then nothing is
    left on the optimizer.

    Raises:
        ConfigError: the scorer is missing or not callable, the strategy is 'none', no parameter is
            selected, the anchor cannot live on `config.anchor_device`, a setting belongs to another
            scorer, or another look-ahead adapts this optimizer's rate.

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
        score_timeout: float | None = None,
    ):
        self.config = config or EffOPDConfig()
        check_scorer(scorer, self.config, score_timeout)
        check_model(model, self.config, target=target is not None)
        refuse_unread(self.config, scorer)
        self._target, self._on_move, self._host, self._closed = target, on_move, dict(host or {}), False
        self.model, self.weights = model, movable_weights(model, self.config)
        self._searcher = Searcher(model, self.weights, scorer, self.config.seed, score_timeout)
        self.predictor = (
            Predictor(fit, self.config.strategy_args, self.config.seed, self.config.anchor_device)
            if (fit := self.config.rules.fit)
            else None
        )
        self._optimizer = OptimizerUpdate(self.config, optimizer, wanted)
        self.history: list[SearchRecord] = []
        self.anchor_step = 0

    @property
    def scorer(self) -> Scorer | None:
        """What scores the model; may be replaced between searches."""
        return self._searcher.scorer

    @scorer.setter
    def scorer(self, scorer: Scorer | None) -> None:
        self._searcher.scorer = scorer

    # -- searching ---------------------------------------------------------------------------------

    def step(self, step: int) -> SearchRecord | None:
        """Call after optimizer step number `step` (the first is 1); observes and searches when it
        is time to.

        Returns:
            The search (also appended to `history`), or `None` if there was nothing to do.

        Raises:
            ScorerError: the scorer raised or returned no score; the weights are back where they
                were.
        """
        self._check_open()
        if self.predictor is None:
            return self.search(step) if self.config.triggers(step, self.history) else None
        observed = self._observe(step, self.predictor) if self.predictor.observes(step) else None
        if self.predictor.predicts(step):
            return self.search(step, observed)
        if observed is not None:
            self.history.append(observed)
        return observed

    def search(self, step: int, observed: SearchRecord | None = None) -> SearchRecord:
        """Search now, whatever the schedule says; see `step`.

        Args:
            observed: an observation made at the same step: its score is the start's, and its cost
                is added.
        """
        self._check_open()
        start, config = time.perf_counter(), self.config
        self._assert_same(step)
        delta_norm = self.weights.displacement_norm()
        direction, quality = self._direction(step)
        moved = delta_norm != 0.0 or self.predictor is not None
        result, memory = self._searcher.search(
            step,
            direction,
            lambda score: config.rules.search(score, config, config.strategy_args) if moved else NOWHERE,
        )
        if result.accepted_scale != 0.0 and self._on_move is not None:
            self._on_move()
        previous = self.history[-1].best_scale if self.history else None
        factor = self._optimizer.after(result, previous or 0.0)
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
            trials=(*(observed.trials if observed else trials[:1]), *trials[1:]),
            memory_bytes=memory + (0 if self.predictor is None else self.predictor.observations.nbytes),
            learning_rate_factor=factor,
            learning_rate_factor_total=None if factor is None else self.learning_rate_factor,
            lora_lost_share=self.weights.lost_share,
            fit=None if quality is None else {name: finite_or_none(value) for name, value in quality.items()},
        )
        self.anchor_step = step
        self.history.append(record)
        return record

    def _direction(self, step: int) -> tuple[Direction, Mapping[str, float] | None]:
        if self.predictor is not None:
            return self.predictor.direction()
        return self.config.rules.direction(self.config.seed, step), None

    def _observe(self, step: int, predictor: Predictor) -> SearchRecord:
        searcher, target = self._searcher, self._target
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
        """The present multiplier of the schedule's learning rate."""
        return self._optimizer.factor

    @property
    def applied_learning_rate_factor(self) -> float:
        """The multiplier of the schedule's learning rate in the last optimizer step."""
        return self._optimizer.applied

    # -- life --------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the optimizer and search no more; for a loop that goes on without the
        look-ahead, or with a new one. The history and `state_dict` can still be read. Safe to call
        twice."""
        self._closed = True
        self._optimizer.close()

    def __enter__(self) -> EffOPD:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reanchor(self, step: int) -> None:
        """Start the displacement anew from the present weights, without a search.

        For a training loop that changes its objective on the way (another loss, data or rollout
        length): a displacement must not span two objectives. Observations of a fit start anew too.
        """
        self.weights.begin()
        self.weights.commit()
        self.anchor_step = step
        if self.predictor is not None:
            self.predictor.forget()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this look-ahead was closed: build a new EffOPD to go on looking ahead.")

    def _assert_same(self, step: int) -> None:
        if world_size() > 1:
            assert_same_on_ranks(
                "(step, anchor's step, searches so far, checksum of the weights)",
                (step, self.anchor_step, len(self.history), self.weights.checksum()),
            )

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Anchor (fp32 tensors by name), its step, observations, history, learning-rate factor, and
        the settings they belong to.
        """
        return {
            "anchor": self.weights.state_dict(),
            "observations": None if self.predictor is None else self.predictor.observations.state_dict(),
            "anchor_step": self.anchor_step,
            "history": [record.to_row() for record in self.history],
            "learning_rate_factor": self.learning_rate_factor,
            "fingerprint": fingerprint(self.config, self.scorer, self._host),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            CheckpointError: the state belongs to other settings or other validation prompts.
            WeightsError: the anchor does not fit the model.
        """
        check_same(state["fingerprint"], self.config, self.scorer, self._host)
        self.weights.load_state_dict(state["anchor"])
        if self.predictor is not None:
            self.predictor.observations.load_state_dict(state["observations"])
        self.anchor_step = int(state["anchor_step"])
        self.history = [SearchRecord.from_row(row) for row in state["history"]]
        self._optimizer.factor = float(state["learning_rate_factor"])

    def save(self, folder: str | Path) -> None:
        """Write the state into a checkpoint folder; the JSON file comes last, so its presence means
        "complete".

        With several processes every rank calls this: sharded parameters are written by the rank
        that holds them, the rest by rank 0.
        """
        write_state(Path(folder), self.state_dict(), self.weights.sharded)

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the folder has no complete look-ahead state, or one of other settings.
        """
        self.load_state_dict(load_state(Path(folder), self.weights.sharded))
