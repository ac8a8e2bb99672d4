"""Parameter counts of models from their configuration or name, without loading or downloading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from effopd.errors import EffOPDError
from effopd.extrapolate.parameter_rules import select
from effopd.launch.meta_model import model_of

_IN_A_NAME = re.compile(r"(?<![a-z\d.])(\d+(?:\.\d+)?)([bm])(?![a-z\d])", re.IGNORECASE)


@dataclass(frozen=True)
class ModelSize:
    """Size of a model.

    Attributes:
        parameters: number of parameters.
        source: source of this number, 'configuration' or 'name'.
        layers: number of layers; 0 without a configuration.
        names: parameter name → number of elements; empty without a configuration.
        model: the model, which can be on the meta device. `None`: not available.
    """

    parameters: int
    source: str
    layers: int = 0
    names: Mapping[str, int] = field(default_factory=dict, repr=False)
    model: PreTrainedModel | None = field(default=None, repr=False, compare=False)

    @property
    def config(self) -> Any:
        """The configuration. `None`: not available."""
        return None if self.model is None else self.model.config

    def selected(self, rule: str) -> int:
        """Number of parameters moved by the look-ahead's `parameters` rule.

        All parameters are counted if their names are unknown.

        Raises:
            ConfigError: the rule selects no parameters, or none of one kind of block.
        """
        if not self.names:
            return self.parameters
        return sum(self.names[name] for name in select(self.names, rule, "the student"))


def model_size(name: str, **load: Any) -> ModelSize | None:
    """Size of a model folder or of a Hub id in the local cache. The network is never used.

    Without a readable configuration the size comes from the name (…-1.7B-…). `None`: unknown.

    Args:
        load: passed to `AutoConfig.from_pretrained`: `revision`, `trust_remote_code`.
    """
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True, **load)
    except (OSError, ValueError, KeyError, ImportError, EffOPDError):
        sizes = _IN_A_NAME.findall(name.rstrip("/").rsplit("/", 1)[-1])
        if not sizes:
            return None
        number, unit = sizes[0]
        return ModelSize(round(float(number) * {"b": 1e9, "m": 1e6}[unit.lower()]), "name")
    return size_of(config)


def size_of(config: Any) -> ModelSize:
    """Size of the model that a configuration describes. Sets its `architectures` if it has none."""
    config.architectures = config.architectures or [_causal_class(config)]
    return size_of_model(model_of("model", config.model_type, config))


def _causal_class(config: Any) -> str:
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type))


def size_of_model(model: PreTrainedModel) -> ModelSize:
    """Size of a model, which can be on the meta device."""
    names = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers = model.config.get_text_config().num_hidden_layers
    return ModelSize(model.num_parameters(), "configuration", layers, names, model)
