"""`PruneCallback`: Prune-OPD's token weights and rollout length in a training run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from effopd.common.distributed import all_gather_object, rank
from effopd.common.files import write_atomically
from effopd.distill.divergence import Answers, Predictions
from effopd.distill.horizon import HorizonCallback, look_aheads
from effopd.distill.prune import (
    Controller,
    Limits,
    reliability,
    reliable_lengths,
    token_weights,
    top_k_overlap,
)
from effopd.distill.trl_host.state import log_metrics
from effopd.errors import CheckpointError
from effopd.runs.checkpoints import reading

PRUNE_FILE = "effopd_prune.json"
#: Relative change of the rollout length beyond which the look-ahead takes a new anchor.
REANCHOR = 0.2


@dataclasses.dataclass
class _Tally:
    """Sums over the answers and tokens of one step on this process."""

    answers: int = 0
    hits: int = 0
    reliable: int = 0
    tokens: int = 0
    bad: int = 0
    overlap: float = 0.0
    weight: float = 0.0


class PruneCallback(HorizonCallback):
    """Weights tokens, counts reliable answers, and sets the next step's rollout length.

    Differs from `HorizonCallback`: the length depends on the answers, so it is saved with
    checkpoints, and the look-ahead takes a new anchor only when the length has changed by more
    than 20 % since its anchor.
    """

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        args = trainer.args
        self._limits = Limits(
            args.prune_min_length, args.max_completion_length, args.prune_step, args.prune_margin,
            args.prune_hit_share, args.prune_patience,
        )  # fmt: skip
        self._restart()

    def _restart(self) -> None:
        self._controller, self._tally = Controller(self._args.prune_start_length), _Tally()
        self._anchor = (0, self._controller.length)  # the look-ahead's anchor step, and the length after it

    def length(self, step: int, total_steps: int) -> int:
        """Maximum number of tokens per rollout in the present step."""
        return self._controller.length

    def _changed(self, step: int, total_steps: int) -> bool:
        length = self._controller.length
        for look_ahead in look_aheads(self._trainer):
            if self._anchor[0] != look_ahead.anchor_step:
                self._anchor = (look_ahead.anchor_step, length)
        if abs(length - self._anchor[1]) <= REANCHOR * self._anchor[1]:
            return False
        self._anchor = (step, length)
        return True

    # -- a step ------------------------------------------------------------------------------------

    def weigh(self, student: Predictions, teacher: Predictions, answers: Answers) -> Answers:
        """The same answers with token weights; counts them for the controller.

        Answers that an earlier step trained on get weights and are not counted again.
        """
        args, valid_BT = self._args, answers.mask_BT != 0
        overlap_N = top_k_overlap(
            student.hidden_BTH.detach()[valid_BT], teacher.hidden_BTH[valid_BT], student.head, teacher.head,
            args.prune_top_k,
        )  # fmt: skip
        bad_BT = torch.zeros_like(valid_BT)
        bad_BT[valid_BT] = overlap_N < args.prune_threshold
        reliability_BT = reliability(bad_BT, args.prune_drop)
        weight_BT = token_weights(reliability_BT, args.prune_base_weight, normalize=args.prune_normalize)
        if not self._trainer.reuses_rollouts():
            reliable_B = reliable_lengths(reliability_BT, valid_BT)
            tally = self._tally
            tally.answers += len(reliable_B)
            tally.hits += int((reliable_B >= self._limits.hit_length(self._controller.length)).sum())
            tally.reliable += int(reliable_B.sum())
            tally.tokens += int(valid_BT.sum())
            tally.bad += int(bad_BT.sum())
            tally.overlap += float(overlap_N.sum())
            tally.weight += float(weight_BT[valid_BT].sum())
        return answers._replace(weight_BT=weight_BT)

    def on_step_end(self, args, state, control, **kwargs):
        """Restore the full length, choose the next step's length, and log the step's counts."""
        super().on_step_end(args, state, control, **kwargs)
        parts = [dataclasses.asdict(part) for part in all_gather_object(self._tally)]
        total = _Tally(**{name: sum(part[name] for part in parts) for name in parts[0]})
        self._tally = _Tally()
        if not total.answers:
            return
        hit_share, tokens = total.hits / total.answers, max(1, total.tokens)
        self._controller = self._controller.next(hit_share, self._limits)
        metrics = {
            "hit_share": hit_share,
            "reliable_length": total.reliable / total.answers,
            "bad_share": total.bad / tokens,
            "overlap": total.overlap / tokens,
            "weight": total.weight / tokens,
        }
        log_metrics(self._trainer, {f"prune/{name}": value for name, value in metrics.items()})

    # -- checkpoints -------------------------------------------------------------------------------

    def save_state(self, folder: Path) -> None:
        """Write the controller into a checkpoint folder."""
        if rank() == 0:
            state = dataclasses.asdict(self._controller) | {"anchor": self._anchor}
            write_atomically(folder / PRUNE_FILE, lambda path: path.write_text(json.dumps(state)))

    def check_resume(self, checkpoint: Path) -> None:
        """Check that the checkpoint has the controller's state.

        Raises:
            CheckpointError: it has none, or the file is damaged.
        """
        _read(checkpoint)

    def on_train_begin(self, args, state, control, **kwargs):
        """Start at the first length, or continue from the resumed checkpoint's state."""
        self._restart()
        if self._trainer.resumed_from is not None:
            self._controller, self._anchor = _read(self._trainer.resumed_from)


def _read(checkpoint: Path) -> tuple[Controller, tuple[int, int]]:
    if not (checkpoint / PRUNE_FILE).is_file():
        raise CheckpointError(
            f"{checkpoint} has no rollout length of Prune-OPD ({PRUNE_FILE}): it was written without "
            "--rollout_horizon prune. Resume with the run's rollout_horizon, or start a new run from its weights."
        )
    with reading(checkpoint, PRUNE_FILE):
        state = json.loads((checkpoint / PRUNE_FILE).read_text())
        step, length = state["anchor"]
        return Controller(int(state["length"]), int(state["misses"])), (int(step), int(length))
