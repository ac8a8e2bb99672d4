"""Requests for a teacher's top-k log-probabilities, and vLLM's replies, read and checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from effopd.distill.served.client import UnusableReplyError

COMPLETIONS, MODELS, TOKENIZE = "/v1/completions", "/v1/models", "/tokenize"
#: vLLM's stand-in for a log-probability of −∞, which JSON does not have.
_LOWEST = -9999.0
#: Tolerance of a sum of probabilities that must not exceed 1.
_SLACK = 1e-3


class Scored(NamedTuple):
    """The teacher at the n answer tokens of one sequence.

    Attributes:
        ids: [n, K] int64, its K likeliest tokens, the likeliest first.
        logq: [n, K] float32, their log-probabilities in nats; −∞ outside the vocabulary.
        sampled: [n] float32, log-probability of the answer's own token.
    """

    ids: np.ndarray
    logq: np.ndarray
    sampled: np.ndarray


def completion_request(model: str, sequences: Sequence[Sequence[int]], top_k: int) -> dict[str, Any]:
    """Body that asks for the `top_k` likeliest tokens at every position of token sequences.

    One token is sampled, because vLLM has no request without sampling. All sampling settings are
    neutral, so that raw and processed log-probabilities are the same.
    """
    return {
        "model": model,
        "prompt": [list(sequence) for sequence in sequences],
        "prompt_logprobs": top_k,
        "max_tokens": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


def read_completions(
    reply: Any, sequences: Sequence[Sequence[int]], starts: Sequence[int], top_k: int, vocab_size: int
) -> list[Scored]:
    """The teacher's log-probabilities from a reply, one entry per sequence.

    Args:
        starts: number of prompt tokens of each sequence; later tokens are read.
        top_k: number of tokens asked for.
        vocab_size: tokens from this id on are left out, and the rest is renormalized.

    Raises:
        UnusableReplyError: a log-probability is missing, NaN or above 0, or a length is wrong.
    """
    choices = sorted(reply["choices"], key=lambda choice: choice.get("index", 0))
    if len(choices) != len(sequences):
        raise UnusableReplyError(f"{len(choices)} choices for {len(sequences)} sequences")
    return [
        _read_choice(choice.get("prompt_logprobs"), sequence, start, top_k, vocab_size)
        for choice, sequence, start in zip(choices, sequences, starts, strict=True)
    ]


def _read_choice(rows: Any, sequence: Sequence[int], start: int, top_k: int, vocab_size: int) -> Scored:
    if not isinstance(rows, list) or len(rows) != len(sequence):
        got = "none" if not isinstance(rows, list) else f"those of {len(rows)}"
        raise UnusableReplyError(f"expected prompt_logprobs of {len(sequence)} tokens, got {got}")
    count = len(sequence) - start
    ids, logq = np.zeros((count, top_k), np.int64), np.full((count, top_k), -np.inf, np.float32)
    sampled = np.zeros(count, np.float32)
    for place, position in enumerate(range(start, len(sequence))):
        kept, values, sampled[place] = _read_position(rows[position], sequence[position], position, top_k, vocab_size)
        ids[place, : len(kept)], logq[place, : len(kept)] = kept, values
    return Scored(ids, logq, sampled)


def _read_position(
    row: Any, own: int, position: int, top_k: int, vocab_size: int
) -> tuple[list[int], list[float], float]:
    """Likeliest tokens, their log-probabilities, and that of the sequence's own token."""
    if not isinstance(row, dict):
        raise UnusableReplyError(f"no log-probabilities at position {position}")
    found = {int(token): _value(entry, position) for token, entry in row.items()}
    if own not in found:
        raise UnusableReplyError(f"the log-probability of token {own} at position {position} is missing")
    # the server adds the sequence's own token; among equals it comes last
    top = sorted(found, key=lambda token: (-found[token], token == own, token))[:top_k]
    if len(top) < top_k:
        raise UnusableReplyError(f"{len(top)} log-probabilities at position {position}, expected {top_k}")
    if (mass := sum(math.exp(found[token]) for token in top)) > 1 + _SLACK:
        raise UnusableReplyError(f"the probabilities at position {position} sum to {mass:.3f}")
    kept = [token for token in top if token < vocab_size]
    dropped = sum(math.exp(found[token]) for token in top if token >= vocab_size)
    shift = math.log1p(-min(dropped, 1 - 1e-9)) if dropped else 0.0
    return kept, [found[token] - shift for token in kept], found[own] - shift


def _value(entry: Any, position: int) -> float:
    value = entry["logprob"]
    if not isinstance(value, int | float) or math.isnan(value) or value > _SLACK:
        raise UnusableReplyError(f"log-probability {value} at position {position}")
    return max(float(value), _LOWEST)
