"""Rules that select the parameters that the look-ahead moves, and their checks.

    names of the trained parameters, without wrappers → rule → names of the parameters that move

`attention+mlp` moves the matrices and biases of

- attention blocks, and modules that mix positions in their place: state-space models, linear
  attention, recurrences, short convolutions;
- MLPs, including experts and routers.

It leaves embeddings, heads and norms where they are, and modules on the residual stream between
blocks: hyper-connections, residual scales and convolutions, AltUp, LAuReL, per-layer inputs,
adapters. `benchmarks/parameter_rules.py` checks it on 179 of 189 decoders of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from effopd.errors import ConfigError

_ATTENTION = r"\w*(?:attn|attention)(?:s|_layers?|_block)?"
#: Replacements of attention in hybrid and recurrent models.
_MIXER = r"mamba|mixer|(?:short_)?conv|mlstm_layer|temporal_block"
_MLP = r"\w*mlps?(?:_block)?|\w*ffns?|feed_forward(?:_in|_out)?|ff|(?:\w+_)?moe|experts|shared_experts?|fc\d|lin\d"
#: BERT's MLP has no module of its own.
_BERT_MLP = r"(?:intermediate|output)\.dense"
#: A name component that is a norm. DBRX's `norm_attn_norm` is a block and is excluded below.
_NORM = r"(?:\w*norm\w*|(?:\w+_)?ln(?:_\w+|\d+)?)(?:\.|$)"
_NO_NORM_IN_THE_BLOCK = rf"^(?!(?:.*\.)?\d+\.(?:.*\.)?(?!norm_attn_norm\.){_NORM})"

#: Named rules for which parameters move, as regular expressions searched in parameter names.
PARAMETER_RULES = {
    # norms inside the blocks (q_norm, k_norm, BERT's LayerNorm) stay
    "attention+mlp": rf"(?i){_NO_NORM_IN_THE_BLOCK}(?:.*\.)?"
    rf"(?:{_ATTENTION}|{_MIXER}|{_MLP}|{_BERT_MLP})\.(?!(?:.*\.)?{_NORM})",
    "all": r"",
    # The authors' public code searches 13 substrings in lower-case names. `attn` and `attention`
    # also match q_norm and k_norm (inside `self_attn`) and `post_attention_layernorm`.
    "released-code": r"(?i)attn|attention|[qkvo]_proj|mlp|feed_forward|ffn|(?:gate|up|down)_proj",
}

#: Wrapper modules of torch, as they appear in parameter names.
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: Biases and norms, which do not make a block by themselves.
_SMALL = re.compile(rf"(?i)bias$|(?:^|\.){_NORM}")
_NUMBERED = re.compile(r"^(.*?\b)\d+\.(.+)$")


def compile_rule(rule: str) -> re.Pattern[str]:
    """Regular expression of a rule in `PARAMETER_RULES`, or of `rule` itself.

    Raises:
        ConfigError: the rule is neither a known name nor a valid regular expression.
    """
    try:
        return re.compile(PARAMETER_RULES.get(rule, rule))
    except re.error as error:
        raise ConfigError(
            f"EffOPDConfig.parameters={rule!r} is neither one of {', '.join(PARAMETER_RULES)} nor a valid regular "
            f"expression ({error})."
        ) from error


def plain_name(name: str) -> str:
    """Name of a parameter or module without `torch.compile`, FSDP1 and checkpoint wrappers.

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
    """Parameters with `requires_grad`, by name; the names do not depend on wrappers."""
    return {plain_name(name): p for name, p in inside(model).named_parameters() if p.requires_grad}


def select(names: Iterable[str], rule: str, model: str, what: str = "trained parameter") -> list[str]:
    """Names that `rule` selects.

    Args:
        names: names of the trained parameters.
        rule: a rule of `PARAMETER_RULES` or a regular expression.
        model, what: terms for the model and for the named objects in error messages.

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
                    "EffOPDConfig.parameters='attention+mlp' finds neither attention nor MLP in the blocks "
                    f"{container} of {model}, which hold {', '.join(matrices[:3])}: these blocks would never move. "
                    "Use 'all', or a regular expression that matches."
                )
    return chosen


def _blocks(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """(container, names of one block) per kind of numbered block; a kind shares its names."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        if match := _NUMBERED.match(name):
            blocks.setdefault(name[: match.start(2)], []).append(name)
    kinds: dict[tuple[str, frozenset[str]], list[str]] = {}
    for block, members in blocks.items():
        container = re.sub(r"\d+\.$", "*", block)
        kinds.setdefault((container, frozenset(re.sub(r"\d+", "*", n[len(block) :]) for n in members)), members)
    for (container, _), members in kinds.items():
        yield container, members
