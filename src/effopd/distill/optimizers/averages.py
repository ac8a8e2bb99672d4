r"""EMA and BEMA of the trained weights, in fp32.

$$ \mathrm{EMA}_t = (1 - β_t)\,\mathrm{EMA}_{t-1} + β_t θ_t, \qquad \mathrm{EMA}_0 = θ_0 $$

BEMA adds $(ρ + t)^{-η} (θ_t - θ_0)$, and has $β_t = \max((ρ + t)^{-κ}, 1 - d)$; EMA has
$β_t = 1 - d$ with the decay d.

Differs from TRL's `BEMACallback`: it averages LoRA adapters too, holds no second model, evaluates
and saves the average, and resumes bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from effopd.common.files import write_atomically
from effopd.errors import CheckpointError
from effopd.extrapolate.weight_copies import kept

AVERAGE_FILE = "weight_average.safetensors"


def average_weight(step: int, decay: float, power: float | None = None, lag: int = 10) -> float:
    """β_t, the weight of step t ≥ 1 in the average.

    Args:
        power: κ; `None`: EMA.
    """
    return 1 - decay if power is None else max((lag + step) ** -power, 1 - decay)


class WeightAverage:
    """Running average of a model's trainable parameters.

    LoRA factors are averaged factor by factor. Memory: one fp32 copy of the parameters for EMA, two
    for BEMA, and one copy while the average is in place.

    Args:
        parameters: name → parameter; θ_0 are their present values.
        bias_corrected: BEMA instead of EMA.
        decay: d.
        power: κ of BEMA.
        bias_power: η of BEMA.
        lag: ρ of BEMA.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        bias_corrected: bool = False,
        decay: float = 0.99,
        power: float = 0.5,
        bias_power: float = 0.2,
        lag: int = 10,
    ):
        self._parameters = dict(parameters)
        self._bias_corrected, self._decay, self._lag = bias_corrected, decay, lag
        self._power, self._bias_power = power if bias_corrected else None, bias_power
        self.step = 0
        self._mean = self._present()
        self._start = self._present() if bias_corrected else {}
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._in_place = False

    def _present(self) -> dict[str, Tensor]:
        return {name: each.detach().to(torch.float32, copy=True) for name, each in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights as those of the next step."""
        self.step += 1
        beta = average_weight(self.step, self._decay, self._power, self._lag)
        for name, parameter in self._parameters.items():
            self._mean[name].mul_(1 - beta).add_(parameter.detach().float(), alpha=beta)

    def value(self, name: str) -> Tensor:
        """The average of one parameter, fp32."""
        mean = self._mean[name]
        if not self._bias_corrected or self.step == 0:
            return mean
        alpha = (self._lag + self.step) ** -self._bias_power
        return mean + alpha * (self._parameters[name].detach().float() - self._start[name])

    @torch.no_grad()
    def settle(self) -> None:
        """Replace the weights by their average for good."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.value(name))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In this block, the weights are the average; afterwards they return bit for bit."""
        if self._in_place:
            yield
            return
        with kept(self._parameters.values()):
            self.settle()
            self._in_place = True
            try:
                yield
            finally:
                self._in_place = False

    @torch.no_grad()
    def translate(self, parameter: Tensor, change: Tensor) -> None:
        """Add a jump's change of one parameter to its average, and to θ_0."""
        name = self._names.get(id(parameter))
        if name is not None:
            self._mean[name].add_(change.float())
            if name in self._start:
                self._start[name].add_(change.float())

    def save(self, folder: Path) -> None:
        """Write the average and its step into a checkpoint folder."""
        tensors = {f"mean.{name}": each for name, each in self._mean.items()}
        tensors |= {f"start.{name}": each for name, each in self._start.items()}
        write_tensors(folder / AVERAGE_FILE, tensors, {"step": str(self.step)})

    def load(self, folder: Path) -> None:
        """Load the state that `save` wrote.

        Raises:
            CheckpointError: the folder has no average, or that of other parameters.
        """
        names = {f"{part}.{name}" for part, tensors in self._parts() for name in tensors}
        tensors, metadata = read_tensors(folder / AVERAGE_FILE, names)
        for part, own in self._parts():
            for name, tensor in own.items():
                tensor.copy_(tensors[f"{part}.{name}"])
        self.step = int(metadata["step"])

    def _parts(self) -> list[tuple[str, dict[str, Tensor]]]:
        return [("mean", self._mean), ("start", self._start)]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as one safetensors file, atomically."""
    whole = {name: each.detach().contiguous() for name, each in tensors.items()}
    write_atomically(path, lambda staged: safetensors.torch.save_file(whole, staged, {"format": "pt", **metadata}))


def read_tensors(path: Path, names: set[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: the file is missing or unreadable, or its tensors are not `names`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            if found != names:
                raise CheckpointError(
                    f"{path} has {len(found)} tensors, expected the {len(names)} of this run "
                    f"({', '.join(sorted(found ^ names)[:3])} differ). Resume with the run's model and settings."
                )
            return {name: file.get_tensor(name) for name in names}, file.metadata()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). It holds the weights of a run with average_weights or a schedule-free "
            "optimizer. Resume from another checkpoint."
        ) from error
