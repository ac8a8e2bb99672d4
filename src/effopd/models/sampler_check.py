"""Does `generate` sample from the distributions that losses and scores are computed with?

Two measurements on a few tokens, each made once per model: which prompts `generate` may be given at
once, so that none changes another's distributions (through padding or otherwise), and whether the
sampler's distributions are those of `logit_path`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from effopd.errors import CompatibilityError
from effopd.models.logit_path import (
    LENGTH,
    SHORT,
    at_rest,
    coarse,
    completion_hidden_states,
    core_of,
    float_logits,
    is_whole,
    logit_path,
    rounding,
    typed,
    usual_tokens,
)

#: What of a model's own `generation_config` stays in force: token ids and how the cache is kept;
#: nothing that picks a token.
_KEPT = (
    "bos_token_id",
    "pad_token_id",
    "cache_implementation",
    "cache_config",
    "compile_config",
    "disable_compile",
    "prefill_chunk_size",
)
#: Tokens that the sampler adds in a measurement.
_NEW = 3

#: What `generate` may be given at once: any prompts, prompts of one length, or one prompt.
Batching = Literal["any", "length", "single"]

_BATCHING: WeakKeyDictionary[nn.Module, Batching] = WeakKeyDictionary()


@contextmanager
def ignore_sampling_defaults(model: nn.Module) -> Iterator[None]:
    """In this block `model.generate` samples by its arguments alone; the model's
    `generation_config` comes back after it, whatever happens.

    Without this, `generate` takes every setting that the caller leaves at None from the model's
    `generation_config`, even a repetition penalty in greedy decoding, and None is how many of the
    settings are switched off.
    """
    # an adapter around the model, or a compiled one, may hold it in another module than `model`
    holders: list[Any] = [module for module in model.modules() if "generation_config" in vars(module)]
    configs = [module.generation_config for module in holders]
    mine = getattr(model, "generation_config", None)
    plain = GenerationConfig(**{name: getattr(mine, name, None) for name in _KEPT})
    try:
        for module in holders:
            module.generation_config = plain
        yield
    finally:
        for module, config in zip(holders, configs, strict=True):
            module.generation_config = config


def generate_groups(model: Any, prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of the prompts that `generate` may be given as one batch, so that each has the
    predictions that it has alone.

    Raises:
        CompatibilityError: not all of them, with weights that are sharded (ranks would make unequal
            numbers of forwards); or `generate` fails.
    """
    whole, lengths = is_whole(model), sorted({len(ids) for ids in prompt_ids})
    if whole and len(prompt_ids) == 1:
        return [[0]]
    how = batching(model)
    if how == "any" or (how == "length" and len(lengths) == 1 and whole):
        return [list(range(len(prompt_ids)))]
    if not whole:
        raise CompatibilityError(
            f"{type(core_of(model)).__name__}: prompts of unequal length change each other's "
            "predictions in a batch; with sharded "
            "weights expected a model that reads the padding mask. Use DDP, or another model."
        )
    if how == "single":
        return [[i] for i in range(len(prompt_ids))]
    return [[i for i, ids in enumerate(prompt_ids) if len(ids) == length] for length in lengths]


@torch.no_grad()
def batching(model: Any) -> Batching:
    """Which prompts `generate` may be given at once: a batch must give each what it gives the
    prompt alone.

    "length": left padding changes predictions (recurrent models that do not read the mask, tables
    of positions without position ids). "single": so do other rows (RWKV's cache in transformers
    5.23).

    Raises:
        CompatibilityError: `generate` fails.
    """
    core = core_of(model)
    if core not in _BATCHING:
        with at_rest(core), typed(core, "`generate` with several prompts"):
            _BATCHING[core] = _measured(core)
    return _BATCHING[core]


def remember_batching(model: Any, how: Batching) -> None:
    """Take `how` for what `batching` says of `model`: another rank has measured it."""
    _BATCHING[core_of(model)] = how


def _measured(core: Any) -> Batching:
    row = usual_tokens(core, LENGTH)
    short, left = row[:, :SHORT], LENGTH - SHORT
    ones, mask = torch.ones_like(short), torch.ones_like(row).repeat(2, 1)
    mask[0, :left] = 0
    first, second = (
        _generated(core, torch.cat([torch.cat([row[:, i, None].expand(1, left), short], dim=1), row]), mask)
        for i in (0, -1)  # the same, padded with other tokens
    )
    alone = _generated(core, short, ones)
    loose = _allowed(core, alone[1])
    # what stands in the padding must not matter at all; where a row begins may cost rounding
    if _gap(first, second) <= loose / (10 if coarse(core) else 100) and _gap(first, alone) <= loose:
        return "any"
    pair = _generated(core, torch.cat([short, short.flip(1)]), ones.repeat(2, 1))
    return "length" if _gap(pair, alone) <= loose else "single"


def _allowed(core: Any, logits: Tensor) -> float:
    """What log-probabilities may differ by through rounding alone, in nats; in half precision
    rounding grows with the logits, while shifted positions and the like move them by a large part
    of their size."""
    if not coarse(core):
        return 1e-3
    top = float(logits.abs().max())
    return min(0.2 * top, 0.5 + 2 * rounding(core) * top)


def _gap(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Largest |Δ log p| of the first rows' distributions, as long as the tokens before are the
    same.
    """
    (tokens, logits_TV), (others, other_logits_TV) = (
        (ids[0, -logits.shape[1] :], logits[0]) for ids, logits in (a, b)
    )
    gap = 0.0
    for step in range(min(len(logits_TV), len(other_logits_TV))):
        gap = max(gap, float((logits_TV[step].log_softmax(-1) - other_logits_TV[step].log_softmax(-1)).abs().max()))
        if tokens[step] != others[step]:
            break
    return gap


def _generated(core: Any, prompts_BP: Tensor, mask_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts and greedy answers [B, P + T], and the sampler's own logits [B, T, V] in float32."""
    config = GenerationConfig(
        max_new_tokens=_NEW, do_sample=False, num_beams=1, use_cache=True, output_logits=True,
        return_dict_in_generate=True, disable_compile=True, pad_token_id=int(prompts_BP[0, 0]),
    )  # fmt: skip
    with ignore_sampling_defaults(core):
        out = core.generate(input_ids=prompts_BP, attention_mask=mask_BP, generation_config=config)
    return out.sequences, torch.stack(out.logits, dim=1).float()


@torch.no_grad()
def check_sampler(model: Any) -> float:
    """Compare the distributions that `generate` samples from with those of `logit_path`, on one
    prompt.

    Returns:
        The largest |Δ log p|, in nats.

    Raises:
        CompatibilityError: they differ by more than rounding, or `generate` fails; or as
            `logit_path`.
    """
    core, path = core_of(model), logit_path(model)
    prompt = usual_tokens(core, SHORT)
    with at_rest(core), typed(core, "`generate`"):
        ids, real = _generated(core, prompt, torch.ones_like(prompt))
        hidden = completion_hidden_states(core, ids, torch.ones_like(ids), real.shape[1])
        made = float_logits(core.get_output_embeddings(), path, hidden)
    gap = float((made.log_softmax(-1) - real.to(made.device).log_softmax(-1)).abs().max())
    allowed = _allowed(core, real)
    if not gap <= allowed:
        raise CompatibilityError(
            f"{type(core).__name__}: `generate` samples from log-probabilities that differ by "
            f"{gap:.3g} nats from those of a "
            f"forward of prompt and answer (expected at most {allowed:.2g}), so answers would "
            "not be the student's own. Use "
            "another student."
        )
    return gap
