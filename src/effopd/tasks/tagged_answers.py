"""Answers between `<answer>` tags: write them, and find them in a completion."""

from __future__ import annotations

import re

_CLOSE_TAG = "</answer>"
_TAGGED = re.compile(r"<answer>\s?(.*?)\s?</answer>", re.DOTALL)


def render_tagged(answer: str) -> str:
    """Completion with an answer in the format of reasoning-gym tasks: `<answer>…</answer>`."""
    return f"<answer>{answer}</answer>"


def extract_tagged(completion: str) -> str | None:
    """Stripped text in the last `<answer>` tags, as by reasoning-gym; `None`: no tags.

    Example:
        >>> extract_tagged("<answer>1</answer> no: <answer> 2 </answer>.")
        '2'
    """
    end = completion.rfind(_CLOSE_TAG)
    if end < 0:
        return None
    # cut after the last closing tag, because unclosed tags make the search quadratic
    answers = _TAGGED.findall(completion[: end + len(_CLOSE_TAG)])
    return answers[-1].strip() if answers else None
