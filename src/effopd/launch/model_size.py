"""How many parameters a model has, from its configuration or its name: nothing is loaded or
downloaded.
"""

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
    """What the estimate needs to know of a model.

    Attributes:
        parameters: how many.
        source: where that is from: 'configuration' or 'name'.
        layers: of the configuration; 0 if it is not at hand.
        names: size of every parameter by name, if the configuration is at hand.
        config: the configuration, if it is at hand.
    """

    parameters: int
    source: str
    layers: int = 0
    names: Mapping[str, int] = field(default_factory=dict, repr=False)
    config: Any = field(default=None, repr=False, compare=False)

    def selected(self, rule: str) -> int:
        """How many parameters the look-ahead's `parameters` rule moves; all, if their names are not
        known.

        Raises:
            ConfigError: it moves none, or none of one kind of block.
        """
        if not self.names:
            return self.parameters
        return sum(self.names[name] for name in select(self.names, rule, "the student"))


def model_size(name: str, **load: Any) -> ModelSize | None:
    """Size of a model folder or of a Hub id in the local cache, else what its name says (…-1.7B-…),
    else `None`.

    Never goes to the network.
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
    """Size of the model that a configuration describes, built without memory."""
    config.architectures = config.architectures or [_causal_class(config)]
    return size_of_model(model_of("model", config.model_type, config))


def _causal_class(config: Any) -> str:
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type))


def size_of_model(model: PreTrainedModel) -> ModelSize:
    """Size of a model that is built, on the meta device for instance."""
    names = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers = model.config.get_text_config().num_hidden_layers
    return ModelSize(model.num_parameters(), "configuration", layers, names, model.config)
