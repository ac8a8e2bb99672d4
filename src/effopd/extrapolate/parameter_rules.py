"""Which parameters the look-ahead moves: named rules, and what every rule must hold for.

    names of the trained parameters, without wrappers → rule → what moves

Architectures name their parts differently, so `attention+mlp` is checked against every decoder that
transformers knows (`benchmarks/parameter_rules.py`). It moves the matrices and biases inside
attention blocks, MLPs (experts and routers included) and whatever mixes positions in the place of
attention: state spaces, linear attention, recurrences, short convolutions. Left where they are:
embeddings, heads, norms, and what acts on the residual stream between the blocks
(hyper-connections, residual scales and convolutions, AltUp, LAuReL, inputs per layer, adapters).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from effopd.errors import ConfigError

_ATTENTION = r"\w*(?:attn|attention)(?:s|_layers?|_block)?"
#: What takes the place of attention in hybrid and recurrent models.
_MIXER = r"mamba|mixer|(?:short_)?conv|mlstm_layer|temporal_block"
_MLP = r"\w*mlps?(?:_block)?|\w*ffns?|feed_forward(?:_in|_out)?|ff|(?:\w+_)?moe|experts|shared_experts?|fc\d|lin\d"
#: BERT's MLP has no module of its own.
_BERT_MLP = r"(?:intermediate|output)\.dense"
#: A part that is a norm, and DBRX's block, which is none.
_NORM = r"(?:\w*norm\w*|(?:\w+_)?ln(?:_\w+|\d+)?)(?:\.|$)"
_NO_NORM_IN_THE_BLOCK = rf"^(?!(?:.*\.)?\d+\.(?:.*\.)?(?!norm_attn_norm\.){_NORM})"

#: Named rules for which parameters move, as regular expressions searched in parameter names.
PARAMETER_RULES = {
    # norms inside the blocks (q_norm, k_norm, BERT's LayerNorm) stay
    "attention+mlp": rf"(?i){_NO_NORM_IN_THE_BLOCK}(?:.*\.)?"
    rf"(?:{_ATTENTION}|{_MIXER}|{_MLP}|{_BERT_MLP})\.(?!(?:.*\.)?{_NORM})",
    "all": r"",
    # the authors' public code looks for 13 substrings in lower-cased names; `self_attn` contains
    # `attn`. So `post_attention_layernorm`, q_norm and k_norm move too
    "released-code": r"(?i)attn|attention|[qkvo]_proj|mlp|feed_forward|ffn|(?:gate|up|down)_proj",
}

#: Modules that torch puts around others, as they appear in parameter names.
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: Biases and norms alone make no block.
_SMALL = re.compile(rf"(?i)bias$|(?:^|\.){_NORM}")
_NUMBERED = re.compile(r"^(.*?\b)\d+\.(.+)$")


def compile_rule(rule: str) -> re.Pattern[str]:
    """The regular expression of a rule of `PARAMETER_RULES`, or of `rule` read as one itself.

    Raises:
        ConfigError: the rule is neither a known name nor a valid regular expression.
    """
    try:
        return re.compile(PARAMETER_RULES.get(rule, rule))
    except re.error as error:
        raise ConfigError(
            f"EffOPDConfig.parameters={rule!r} is neither one of {', '.join(PARAMETER_RULES)} "
            "nor a valid regular expression "
            f"({error})."
        ) from error


def plain_name(name: str) -> str:
    """A parameter's or module's name without `torch.compile`, FSDP1 and activation-checkpoint
    wrappers.

    Example:
        >>> plain_name("_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
        'model.layers.0.mlp.up_proj.weight'
    """
    return _WRAPPER.sub("", name)


def inside(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel`, `DataParallel` and `torch.compile`."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif "_orig_mod" in dict(model.named_children()):  # not `getattr`: PEFT looks through to its base
            model = model.get_submodule("_orig_mod")
        else:
            return model


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with `requires_grad` by name; the same names however the model is wrapped."""
    return {plain_name(name): p for name, p in inside(model).named_parameters() if p.requires_grad}


def select(names: Iterable[str], rule: str, model: str, what: str = "trained parameter") -> list[str]:
    """Those of `names` that `rule` moves.

    Args:
        names: of the trained parameters.
        rule: a rule of `PARAMETER_RULES` or a regular expression.
        model, what: what the message calls the model, and a thing with a name.

    Raises:
        ConfigError: nothing matches, or `attention+mlp` matches nothing in one kind of block.
    """
    pattern, names = compile_rule(rule), list(names)
    chosen = [name for name in names if pattern.search(name)]
    if not chosen:
        raise ConfigError(
            f"EffOPDConfig.parameters={rule!r} matches no {what} of {model} (their names look like: "
            f"{', '.join(names[:3]) or 'none, all are frozen'}). Use 'all', or a regular expression that matches."
        )
    if rule == "attention+mlp":
        moved = set(chosen)
        for container, members in _blocks(names):
            matrices = [name for name in members if not _SMALL.search(name)]
            if len(matrices) > 1 and not moved.intersection(members):
                raise ConfigError(
                    "EffOPDConfig.parameters='attention+mlp' finds neither attention nor MLP "
                    f"in the blocks {container} of {model}, "
                    f"which hold {', '.join(matrices[:3])}: they would never move. Use 'all', "
                    "or a regular expression that matches."
                )
    return chosen


def _blocks(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """(container, names of one block) of every kind of numbered block: blocks of a kind hold the
    same names.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        if match := _NUMBERED.match(name):
            found.setdefault(name[: match.start(2)], []).append(name)
    kinds: dict[tuple[str, frozenset[str]], list[str]] = {}
    for block, members in found.items():
        container = re.sub(r"\d+\.$", "*", block)
        kinds.setdefault((container, frozenset(re.sub(r"\d+", "*", n[len(block) :]) for n in members)), members)
    for (container, _), members in kinds.items():
        yield container, members
