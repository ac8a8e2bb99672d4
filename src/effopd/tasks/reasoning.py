"""Separation of reasoning and answer: only the text after a completion's reasoning is graded.

Models mark their reasoning with tags: `<think>…</think>` and similar, `[THINK]…[/THINK]`, the
channels of gpt-oss and Gemma. A guess inside the reasoning is not an answer, and a completion that
is cut inside the reasoning has no answer.

If the chat template opens the reasoning (`…assistant\\n<think>\\n`), the completion has no opening
tag. `opened_by` finds the tag at the end of the prompt; evaluation and rewards prepend it to the
text passed to a verifier.

Left out: reasoning without tags, such as "Here is my thought process:".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = r"(?:seed:|longcat_)?(?:think|thinking|thoughts?|reason|reasoning)"
#: (opening tag, closing tag) as patterns; a closing tag only ends reasoning of its own kind.
_KINDS = tuple(
    (re.compile(opening, re.IGNORECASE), re.compile(closing, re.IGNORECASE))
    for opening, closing in (
        *((rf"<{name}>", rf"</{name}>") for name in ("think", "thinking", "thoughts?", "reason", "reasoning")),
        (r"<seed:think>", r"</seed:think>"),
        (r"<longcat_think>", r"</longcat_think>"),
        (r"\[THINK\]", r"\[/THINK\]"),
        (r"◁think▷", r"◁/think▷"),
        (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
        (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
        (r"<\|channel>thought", r"<channel\|>"),
        (r"<\|channel\|>(?:analysis|commentary)", r"<\|channel\|>final[^<]*<\|message\|>"),
    )
)
_OPENED = re.compile(
    rf"(?:{'|'.join(opening.pattern for opening, _ in _KINDS)})(?:<\|message\|>)?\s*\Z", re.IGNORECASE
)
#: Tokens of the tags. In some tokenizers they are special tokens, which decoding skips.
_TOKENS = re.compile(
    rf"</?{_NAMES}>|\[/?THINK\]|◁/?think▷|<\|(?:begin|end)_of_thought\|>|<\|(?:START|END)_THINKING\|>"
    r"|<\|channel\|?>|<channel\|>|<\|message\|>",
    re.IGNORECASE,
)
#: Characters (or tokens) at the end of a prompt searched for an opening tag.
_TAIL = 80


def answer_part(text: str) -> str:
    """Text after the last closing tag; "" if reasoning is still open at the end.

    Without tags the whole text is the answer. Opening tags in quotation marks or backticks are
    ignored.

    Example:
        >>> answer_part("<think>perhaps 7</think> It is 8."), answer_part("<think>perhaps 7")
        (' It is 8.', '')
        >>> answer_part("It is 8.")
        'It is 8.'
    """
    start = 0
    for opening, closing in _KINDS:
        closed = max((match.end() for match in closing.finditer(text)), default=0)
        if any(not _quoted(match) for match in opening.finditer(text, closed)):
            return ""
        start = max(start, closed)
    return text[start:]


def _quoted(mark: re.Match[str]) -> bool:
    """Whether a tag is in quotation marks or backticks, as in a text about tags."""
    before, after = mark.string[: mark.start()][-1:], mark.string[mark.end() :][:1]
    return (before, after) in (("'", "'"), ('"', '"'), ("`", "`"), ("“", "”"), ("‘", "’"))


def opened_by(prompt: str) -> str:
    r"""Opening tag at the end of a prompt, with the whitespace after it; "" if there is none.

    Args:
        prompt: full prompt, including chat template and generation prompt.

    Example:
        >>> opened_by("<|im_start|>assistant\n<think>\n"), opened_by("<|im_start|>assistant\n")
        ('<think>\n', '')
    """
    match = _OPENED.search(prompt[-_TAIL:])
    return match.group() if match else ""


def opened_by_ids(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> str:
    """`opened_by` for a prompt's token ids."""
    return opened_by(tokenizer.decode(list(prompt_ids[-_TAIL:]), skip_special_tokens=False))


def decode_marked(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[int]]) -> list[str]:
    """Decoded texts without special tokens, but with reasoning tags that are special tokens."""
    marks = _mark_tokens(tokenizer)
    texts = []
    for row in rows:
        parts: list[list[int]] = [[]]
        shown_marks: list[str] = [""]
        for token in row:
            if token in marks:
                shown_marks.append(marks[token])
                parts.append([])
            else:
                parts[-1].append(token)
        decoded = tokenizer.batch_decode(parts, skip_special_tokens=True)
        texts.append("".join(mark + text for mark, text in zip(shown_marks, decoded, strict=True)))
    return texts


def _mark_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id → text of the special tokens that are reasoning tags."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    return _marks_among(
        tuple((i, str(t)) for i, t in added.items() if getattr(t, "special", False) or str(t) in special)
    )


@lru_cache(maxsize=8)
def _marks_among(tokens: tuple[tuple[int, str], ...]) -> dict[int, str]:
    return {i: text for i, text in tokens if _TOKENS.fullmatch(text)}
