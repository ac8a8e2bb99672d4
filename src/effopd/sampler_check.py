"""Does `generate` sample from the distributions that losses and scores are computed with?

Two measurements on a few tokens, each made once per model: whether left padding, which batches of unequal prompts get in
`generate`, changes a row's distributions (recurrent models that do not read the mask, position tables without position
ids), and whether the sampler's distributions are those of `logit_path`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from effopd.errors import CompatibilityError
from effopd.logit_path import (
    LENGTH,
    SHORT,
    at_rest,
    completion_hidden_states,
    core_of,
    float_logits,
    is_whole,
    logit_path,
    rounding,
    typed,
    usual_tokens,
)

#: Tokens that the sampler adds in a measurement.
_NEW = 3

_PADS_EXACTLY: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def same_length_groups(model: Any, prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of the prompts that `generate` may be given as one batch: all of them or, where left padding changes what the
    model predicts, those of one length at a time.

    Raises:
        CompatibilityError: the latter, with weights that are sharded (ranks would make unequal numbers of forwards); or
            `generate` fails.
    """
    everything = [list(range(len(prompt_ids)))]
    lengths = sorted({len(ids) for ids in prompt_ids})
    whole = is_whole(model)
    if (whole and len(lengths) < 2) or pads_exactly(model):
        return everything
    if not whole:
        raise CompatibilityError(
            f"{type(core_of(model)).__name__}: left padding changes its predictions, so prompts of unequal length cannot share a "
            "batch; with sharded weights expected a model that reads the padding mask. Use DDP, or another model."
        )
    return [[i for i, ids in enumerate(prompt_ids) if len(ids) == length] for length in lengths]


@torch.no_grad()
def pads_exactly(model: Any) -> bool:
    """Whether `generate` gives a left-padded prompt what it gives the prompt alone.

    Raises:
        CompatibilityError: `generate` fails.
    """
    core = core_of(model)
    if core not in _PADS_EXACTLY:
        with at_rest(core), typed(core, "`generate` with prompts of unequal length"):
            _PADS_EXACTLY[core] = _measured(core)
    return _PADS_EXACTLY[core]


def remember_padding(model: Any, exact: bool) -> None:
    """Take `exact` for what `pads_exactly` says of `model`: another rank has measured it."""
    _PADS_EXACTLY[core_of(model)] = exact


def _measured(core: Any) -> bool:
    row = usual_tokens(core, LENGTH)
    short, left = row[:, :SHORT], LENGTH - SHORT
    mask = torch.ones_like(row).repeat(2, 1)
    mask[0, :left] = 0
    first, second = (
        _generated(core, torch.cat([torch.cat([row[:, i, None].expand(1, left), short], dim=1), row]), mask)[1][0]
        for i in (0, -1)  # the same, padded with other tokens
    )
    alone = _generated(core, short, torch.ones_like(short))[1][0]
    exact = rounding(core) < 1e-6
    # what stands in the padding must not matter at all; where a row begins may cost rounding
    return _gap(first, second) <= (1e-5 if exact else 0.05) and _gap(first, alone) <= (1e-4 if exact else 0.5)


def _gap(a_TV: Tensor, b_TV: Tensor) -> float:
    """Largest |Δ log p| of the first token's distributions."""
    return float((a_TV[0].log_softmax(-1) - b_TV[0].log_softmax(-1)).abs().max())


def _generated(core: Any, prompts_BP: Tensor, mask_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts and greedy answers [B, P + T], and the sampler's own logits [B, T, V] in float32."""
    config = GenerationConfig(
        max_new_tokens=_NEW, do_sample=False, num_beams=1, use_cache=True, output_logits=True,
        return_dict_in_generate=True, disable_compile=True, pad_token_id=int(prompts_BP[0, 0]),
    )  # fmt: skip
    out = core.generate(input_ids=prompts_BP, attention_mask=mask_BP, generation_config=config)
    return out.sequences, torch.stack(out.logits, dim=1).float()


@torch.no_grad()
def check_sampler(model: Any) -> float:
    """Compare the distributions that `generate` samples from with those of `logit_path`, on one prompt.

    Returns:
        The largest |Δ log p|, in nats.

    Raises:
        CompatibilityError: they differ by more than rounding, or `generate` fails; or as `logit_path`.
    """
    core, path = core_of(model), logit_path(model)
    prompt = usual_tokens(core, SHORT)
    with at_rest(core), typed(core, "`generate`"):
        ids, real = _generated(core, prompt, torch.ones_like(prompt))
        hidden = completion_hidden_states(core, ids, torch.ones_like(ids), real.shape[1])
        made = float_logits(core.get_output_embeddings(), path, hidden)
    gap = float((made.log_softmax(-1) - real.to(made.device).log_softmax(-1)).abs().max())
    allowed = 1e-3 if rounding(core) < 1e-6 else 0.5
    if not gap <= allowed:
        raise CompatibilityError(
            f"{type(core).__name__}: `generate` samples from log-probabilities that differ by {gap:.3g} nats from those of a "
            f"forward of prompt and answer (expected at most {allowed:.2g}), so answers would not be the student's own. Use "
            "another student."
        )
    return gap
