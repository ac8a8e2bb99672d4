"""A scan in memory: one base model is loaded, put at every point in turn, measured, and put back bit for bit.

Undoing re-reads the tensors that were touched from the base's files rather than keeping clones of them: that takes the
memory of one tensor instead of a second model, and it is exact because loading is checked first: every parameter must
equal its tensor on disk, cast to the parameter's dtype.

Left out: models whose parameters are not the checkpoint's tensors under another name, such as Mixture-of-Experts models
whose experts transformers merges on loading. For those, write the points as checkpoints and evaluate each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effopd.analysis.plan import seed_names
from effopd.common.float64 import for_float64, has_float64
from effopd.common.isolation import evaluating
from effopd.common.progress import Counted
from effopd.common.statistics import ratio_with_error
from effopd.distill.divergence import reverse_kl_of_completions, shared_vocab_size
from effopd.errors import CompatibilityError, NonFiniteWeightsError
from effopd.interventions.options import ScanOptions
from effopd.interventions.points import BASE, Point, Study
from effopd.interventions.results import Results
from effopd.models.logit_path import logit_path
from effopd.tasks.base import Task
from effopd.tasks.evaluate import EvalResult, evaluate
from effopd.weights.difference import Difference, open_differences
from effopd.weights.naming import Part
from effopd.weights.reader import Checkpoint
from effopd.weights.trajectory import Snapshot, find_snapshots
from effopd.weights.writer import write_checkpoint


class Sources:
    """The base and the kept checkpoints of every run.

    Names, shapes and architecture of all of them are checked here, before any tensor is read.

    Args:
        base: checkpoint folder.
        trained: label → folders; several folders are seeds and become the runs `label#0`, `label#1`, ….
        steps: use these steps of a trajectory only; the last of them is the trained model.

    Raises:
        EffOPDError: a folder that cannot be used or does not belong to the base; the message names it.
    """

    def __init__(
        self, base: str | Path, trained: Mapping[str, Sequence[str | Path]], steps: Sequence[int] | None = None
    ):
        self.base = Checkpoint(base)
        self.snapshots: dict[str, list[Snapshot]] = {
            name: find_snapshots(Path(path), steps)
            for label, paths in trained.items()
            for name, path in zip(seed_names(label, len(paths)), paths, strict=True)
        }
        paths = [[snapshot.path for snapshot in snapshots] for snapshots in self.snapshots.values()]
        self._differences = dict(zip(self.snapshots, open_differences(self.base, paths), strict=True))
        self.parts_of: dict[str, list[Part]] = {}
        for part in self.base.parts():
            self.parts_of.setdefault(part.tensor, []).append(part)
        self._norms: dict[str, dict[Part, float]] = {}

    def difference(self, point: Point) -> Difference | None:
        """The update that `point` is made of; the base has none."""
        return self._differences[point.run][point.snapshot] if point.run in self._differences else None

    def step(self, point: Point) -> int | None:
        """The training step of that update, where it is known."""
        return self.snapshots[point.run][point.snapshot].step if point.run in self.snapshots else None

    def norms(self, run: str) -> dict[Part, float]:
        """‖ΔW_T‖ of every part at the end of `run`; one pass over the files, remembered."""
        if run not in self._norms:
            final = self._differences[run][-1]
            self._norms[run] = {}
            with Counted(len(final.parts), f"norms of {run}", "matrix", leave=False) as bar:
                for update in final.updates():
                    self._norms[run][update.part] = update.norm()
                    bar.update()
        return self._norms[run]

    def study(self, options: ScanOptions) -> Study:
        """What the scans are planned from."""
        steps = {run: [snapshot.step for snapshot in found] for run, found in self.snapshots.items()}
        return Study(self.base.parts(), steps, self.norms, options)


@torch.no_grad()
def rewrite(target: Tensor, parts: Sequence[Part], point: Point, difference: Difference) -> float:
    """Turn a base tensor into the point's, in place; one part at a time, float64, rounded once.

    Args:
        target: the whole stored tensor, holding the base's values.
        parts: the parts of that tensor.

    Returns:
        ‖new − base‖² after rounding.

    Raises:
        NonFiniteWeightsError: the new tensor has a NaN or an infinity; `target` may be changed in part.
    """
    device = target.device if has_float64(target.device) else "cpu"
    square = 0.0
    for part in parts:
        if not point.selects(part):
            continue
        update = difference.update(part, device)  # kept while its tensor's other parts are read
        new = point.edit(update)
        if new is None:
            continue
        view, new = part.view(target), new.to(target.device, target.dtype)
        if not bool(torch.isfinite(new).all()):
            raise NonFiniteWeightsError(
                f"point {point.id}: '{part.place}' ({part.tensor}) is not finite in {target.dtype}. Expected finite "
                "weights: use smaller factors, or --dtype float32."
            )
        square += float(torch.linalg.vector_norm(for_float64(new).double() - for_float64(view)) ** 2)
        part.put(target, new)
    return square


class LiveBase:
    """A loaded base model that can be put at a point and comes back bit for bit.

    Raises:
        CompatibilityError: the model's parameters are not the checkpoint's tensors, in name, shape or value.
    """

    def __init__(self, model: PreTrainedModel, sources: Sources):
        self.model = model
        self._sources = sources
        _untie(model, sources)
        self._live = _match(model, sources)
        self._check_values()

    @contextmanager
    def at(self, point: Point) -> Iterator[float]:
        """The model is at `point` within the block and back at the base after it, whatever happens.

        Yields:
            ‖W − W0‖ of the model as it stands, after rounding to its dtype.
        """
        touched: list[str] = []
        try:
            yield self._apply(point, touched)
        finally:
            self._restore(touched)

    def _apply(self, point: Point, touched: list[str]) -> float:
        difference = self._sources.difference(point)
        if difference is None:
            return 0.0
        square = 0.0
        for name, parts in self._sources.parts_of.items():
            if any(map(point.selects, parts)):
                touched.append(name)
                square += rewrite(self._live[name], parts, point, difference)
        return square**0.5

    @torch.no_grad()
    def _restore(self, names: Sequence[str]) -> None:
        for name in names:
            live = self._live[name]
            live.copy_(self._sources.base.load(name).to(live.dtype))

    def _check_values(self) -> None:
        for name, live in self._live.items():
            stored = self._sources.base.load(name).to(live.dtype)
            if not torch.equal(live.detach().cpu(), stored):
                raise CompatibilityError(
                    f"parameter '{name}' of the loaded {type(self.model).__name__} differs from the tensor in "
                    f"{self._sources.base.files[name]}: expected equal values, so that edits can be undone exactly. "
                    "The library changes this tensor on loading. " + _WAY_OUT
                )


_WAY_OUT = "Write the points with --save_dir DIR (without --task) and evaluate each of them with `effopd eval`."


def _untie(model: PreTrainedModel, sources: Sources) -> None:
    """Give the loaded model a head of its own where one of the checkpoints has one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and sources.base.own_head and head.weight is embedding.weight:
        head.register_parameter("weight", torch.nn.Parameter(embedding.weight.detach().clone()))
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _match(model: PreTrainedModel, sources: Sources) -> dict[str, Tensor]:
    """Stored name → live parameter or buffer, for every tensor that has parts. All are checked before any is used."""
    live: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    prefix = model.base_model_prefix  # checkpoints of a bare backbone leave it out
    found: dict[str, Tensor] = {}
    for name in sources.parts_of:
        tensor = live.get(name, live.get(f"{prefix}.{name}"))
        shape = sources.base.shapes[name]
        if tensor is None or tuple(tensor.shape) != tuple(shape):
            got = "has no such parameter" if tensor is None else f"has it with shape {tuple(tensor.shape)}"
            raise CompatibilityError(
                f"the base has a tensor '{name}' of shape {tuple(shape)}, but the loaded {type(model).__name__} {got}: "
                f"the library renames or merges tensors on loading (as with merged experts). {_WAY_OUT}"
            )
        found[name] = tensor
    return found


def save_point(point: Point, sources: Sources, out: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the model of a point as a checkpoint, one tensor at a time.

    Args:
        dtype: of the floating tensors; `None` keeps the base's. With the dtype of a scan in memory, the checkpoint is
            the model that was measured, bit for bit.
    """
    difference = sources.difference(point)
    # a head that is stored although it is tied must stay equal to the embeddings
    tied = [part for part in sources.base.parts() if str(part.place) == "embedding.tokens"]

    def edit(name: str, tensor: Tensor) -> Tensor:
        target = tensor.to(dtype or tensor.dtype, copy=True)
        if difference is not None:
            rewrite(target, sources.parts_of.get(name, tied), point, difference)
        return target

    return write_checkpoint(sources.base, edit, out, dtype=dtype)


@dataclass
class Evaluator:
    """How every point is measured: the same prompts, the same sampling noise.

    `settings` are keyword arguments of `effopd.tasks.evaluate.evaluate`, with at least `seed` and `max_new_tokens`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    settings: Mapping[str, Any]
    teacher: PreTrainedModel | None = None
    _vocab_size: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.teacher is not None:
            self._vocab_size = shared_vocab_size(self.model, self.teacher, len(self.tokenizer))
            for model in (self.model, self.teacher):
                logit_path(model)  # raises before anything is sampled

    def measure(self) -> dict[str, Any]:
        """Accuracy with its 95 % interval over prompts, per-prompt accuracies, lengths, cost; KL if there is a teacher."""
        n = self.settings.get("n", 1)
        with Counted(n * len(self.task), "answers", "answer", leave=False) as bar:
            result = evaluate(
                self.model,
                self.tokenizer,
                self.task,
                progress=bar.update,
                vocab_size=self._vocab_size,
                **self.settings,
            )
        interval = result.accuracy
        measured = {
            "accuracy": interval.mean,
            "accuracy_low": interval.low,
            "accuracy_high": interval.high,
            "n": interval.n,
            "mean_score": result.mean_score,
            "response_length": float(np.mean(result.lengths)),
            "truncated_share": result.truncated_share,
            **({} if result.answers_found is None else {"answers_found": result.answers_found}),
            "answers_cut": result.answers_cut,
            "answers_empty": result.answers_empty,
            "generated_tokens": result.generated_tokens,
            "accuracies": [float(np.mean(row)) for row in result.correct],
        }
        if self.teacher is not None:
            measured |= self._kl(result, self.teacher)
        return measured | {"seconds": result.seconds}

    def _kl(self, result: EvalResult, teacher: PreTrainedModel) -> dict[str, float]:
        """Exact reverse KL(model ‖ teacher), at temperature 1, on the answers just sampled: nats per token.

        The interval is over prompts: ratio of sums, delta method, normal quantile, cut at 0.
        """
        answers = [answer for row in result.completions for answer in row]
        assert self._vocab_size is not None, "there is a teacher"
        with evaluating(self.model, teacher):
            sums, counts = reverse_kl_of_completions(
                self.model,
                teacher,
                [answer.prompt_ids for answer in answers],
                [answer.completion_ids for answer in answers],
                vocab_size=self._vocab_size,
                pad_token_id=self.tokenizer.pad_token_id or 0,
                batch_size=self.settings.get("batch_size", 64),
            )
        prompts = len(result.examples)
        by_prompt = [np.asarray(values).reshape(prompts, -1).sum(axis=1).tolist() for values in (sums, counts)]
        mean, error = ratio_with_error(*by_prompt)
        return {"kl": mean, "kl_low": max(0.0, mean - 1.96 * error), "kl_high": mean + 1.96 * error}


def run_scan(
    points: Sequence[Point], live: LiveBase, sources: Sources, evaluator: Evaluator, results: Results
) -> None:
    """Measure every point that has no result yet. A model met before, under whatever name, is not measured again."""
    todo = [point for point in points if point.id not in results]
    with Counted(len(points), "points", "point", done=len(points) - len(todo)) as bar:
        for point in todo:
            bar.about(point.id)
            _measure(point, live, sources, evaluator, results)
            bar.update()


def _measure(point: Point, live: LiveBase, sources: Sources, evaluator: Evaluator, results: Results) -> None:
    known = results.of_model(point.same_model)
    if known is not None:
        results.add(point, sources.step(point), known["update_norm"], known["measured"])
        return
    with live.at(point) as norm:
        base = results.of_model(BASE) if norm == 0.0 else None
        measured = evaluator.measure() if base is None else base["measured"]
    results.add(point, sources.step(point), norm, measured)
