"""Checks that `generate` samples from the distributions that losses and scores use.

Two measurements on a few tokens, once per model: which prompts can share a batch of `generate`
without changing each other's distributions, and whether the sampler's distributions equal those of
`logit_path`.
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

#: Fields of a model's `generation_config` that stay in force: token ids and cache settings, but
#: nothing that affects the choice of tokens.
_KEPT = (
    "bos_token_id",
    "pad_token_id",
    "cache_implementation",
    "cache_config",
    "compile_config",
    "disable_compile",
    "prefill_chunk_size",
)
#: Tokens generated per measurement.
_NEW = 3

#: Prompts that can share a batch of `generate`: any, those of one length, or a single one.
Batching = Literal["any", "length", "single"]

_BATCHING: WeakKeyDictionary[nn.Module, Batching] = WeakKeyDictionary()


@contextmanager
def ignore_sampling_defaults(model: nn.Module) -> Iterator[None]:
    """Make `model.generate` in the block ignore the model's `generation_config`.

    `generate` fills every setting that is None from the model's `generation_config`, even a
    repetition penalty in greedy decoding, and None is how many settings are turned off. The
    `generation_config` is restored afterwards, also after an exception.
    """
    # in PEFT or compiled models, another module than `model` can hold it
    holders: list[Any] = [module for module in model.modules() if "generation_config" in vars(module)]
    configs = [module.generation_config for module in holders]
    defaults = getattr(model, "generation_config", None)
    plain = GenerationConfig(**{name: getattr(defaults, name, None) for name in _KEPT})
    try:
        for module in holders:
            module.generation_config = plain
        yield
    finally:
        for module, config in zip(holders, configs, strict=True):
            module.generation_config = config


def generate_groups(model: Any, prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups of prompt indices that can share a batch of `generate` without changing predictions.

    Raises:
        CompatibilityError: more than one group is needed but the weights are sharded, so ranks
            could run unequal numbers of forward passes; or `generate` fails.
    """
    whole, lengths = is_whole(model), sorted({len(ids) for ids in prompt_ids})
    if whole and len(prompt_ids) == 1:
        return [[0]]
    how = batching(model)
    if how == "any" or (how == "length" and len(lengths) == 1 and whole):
        return [list(range(len(prompt_ids)))]
    if not whole:
        raise CompatibilityError(
            f"{type(core_of(model)).__name__}: prompts of unequal length change each other's predictions in a batch. "
            "With sharded weights, expected a model that reads the padding mask. Use DDP, or another model."
        )
    if how == "single":
        return [[i] for i in range(len(prompt_ids))]
    return [[i for i, ids in enumerate(prompt_ids) if len(ids) == length] for length in lengths]


@torch.no_grad()
def batching(model: Any) -> Batching:
    """Which prompts can share a batch of `generate` and keep the predictions they have alone.

    - "any": all prompts.
    - "length": prompts of one length, because left padding changes predictions (recurrent models
      that ignore the mask, position tables without position ids).
    - "single": one prompt, because other rows change predictions (RWKV's cache in transformers
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
    """Set the result of `batching` for `model` to that of another rank."""
    _BATCHING[core_of(model)] = how


def _measured(core: Any) -> Batching:
    row = usual_tokens(core, LENGTH)
    short, left = row[:, :SHORT], LENGTH - SHORT
    ones, mask = torch.ones_like(short), torch.ones_like(row).repeat(2, 1)
    mask[0, :left] = 0
    first, second = (
        _generated(core, torch.cat([torch.cat([row[:, i, None].expand(1, left), short], dim=1), row]), mask)
        for i in (0, -1)  # the same prompts, padded with other tokens
    )
    alone = _generated(core, short, ones)
    loose = _allowed(core, alone[1])
    # the padding's tokens must have no effect; the offset of a row can cause rounding errors
    if _gap(first, second) <= loose / (10 if coarse(core) else 100) and _gap(first, alone) <= loose:
        return "any"
    pair = _generated(core, torch.cat([short, short.flip(1)]), ones.repeat(2, 1))
    return "length" if _gap(pair, alone) <= loose else "single"


def _allowed(core: Any, logits: Tensor) -> float:
    """Allowed difference of log-probabilities through rounding, in nats.

    In half precision it grows with the logits. Real faults, such as shifted positions, change them
    by a large part of their size.
    """
    if not coarse(core):
        return 1e-3
    top = float(logits.abs().max())
    return min(0.2 * top, 0.5 + 2 * rounding(core) * top)


def _gap(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Largest |Δ log p| of the first rows, up to the first token that differs."""
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
        # rank 0 is alone: under ZeRO-3, transformers waits for all ranks even if the model is whole
        alone = {"synced_gpus": False} if is_whole(core) else {}
        out = core.generate(input_ids=prompts_BP, attention_mask=mask_BP, generation_config=config, **alone)
    return out.sequences, torch.stack(out.logits, dim=1).float()


@torch.no_grad()
def check_sampler(model: Any) -> float:
    """Largest |Δ log p| between the sampler and `logit_path` on one prompt, in nats.

    Raises:
        CompatibilityError: the distributions differ by more than rounding, or `generate` fails; see
            also `logit_path`.
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
            f"{type(core).__name__}: `generate` samples from log-probabilities that differ by {gap:.3g} nats from "
            f"those of a forward pass (expected at most {allowed:.2g}), so answers would be sampled from another "
            "distribution than that of the loss. Use another model."
        )
    return gap
