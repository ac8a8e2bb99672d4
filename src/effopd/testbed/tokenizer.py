"""Tokenizer of the testbed: bytes, a few pairs, and one token per constant question phrase.

Every byte is a token, so any text round-trips. Merges exist only for a space followed by a letter,
digit or sign. The common beginning of a family's training questions becomes one token. Digits and
letters stay single tokens, which makes arithmetic and spelling learnable for a tiny model.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
#: Ordinary added tokens: they survive decoding with `skip_special_tokens=True`.
TAGS = ("<answer>", "</answer>")
_ROLES = ("user\n", "assistant\n")
_AFTER_SPACE = string.digits + string.ascii_letters + "+-="

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(questions: Sequence[Sequence[str]]) -> PreTrainedTokenizerFast:
    """Tokenizer for the given training questions, one list per family.

    `<|im_end|>` is the end token and `<|endoftext|>` the padding token; padding is on the left.
    """
    space = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(" ")[0][0]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(space, character) for character in _AFTER_SPACE]
    tokens = [*alphabet, *(a + b for a, b in pairs)]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (PAD, START, END)])
    plain = [*TAGS, *_ROLES, *(constant_phrase(family) for family in questions)]
    inner.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain if token])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def constant_phrase(questions: Sequence[str]) -> str:
    """Common prefix of all questions, cut after its last space; empty if there is none."""
    first, last = min(questions), max(questions)  # their common prefix is that of all questions
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: first.rfind(" ", 0, length) + 1]
