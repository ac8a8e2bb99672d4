"""The program in an answer: the last fenced block, or the whole answer if there is none."""

from __future__ import annotations

import re

from effopd.tasks.reasoning import answer_part

#: Longest program, in characters.
MAX_PROGRAM = 200_000
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([\w+.#-]*)")
#: Labels of blocks with Python; a block without a label counts too.
_PYTHON = ("", "python", "python3", "py", "python2", "pypy", "pypy3", "sage", "code")


def extract_program(completion: str) -> str | None:
    r"""Program of a completion, or `None`: an empty answer, or only blocks in other languages.

    Takes the last block labeled as Python or without a label, after the reasoning. A last block
    that is not closed counts up to the end.

    Example:
        >>> extract_program("First:\n```python\nx = 1\n```\nBetter:\n```python\nx = 2\n```\nDone.")
        'x = 2\n'
        >>> extract_program("print(1)")
        'print(1)'
    """
    text = answer_part(completion).replace("\r\n", "\n")
    blocks = _blocks(text)
    if not blocks:
        return text if text.strip() else None
    python = [code for label, code in blocks if label.lower() in _PYTHON and code.strip()]
    return python[-1] if python else None


def _blocks(text: str) -> list[tuple[str, str]]:
    """(label, content) of the fenced blocks, in order. Takes linear time.

    Lines lose the indentation of their fence, as in Markdown, where blocks are part of lists.
    """
    blocks: list[tuple[str, str]] = []
    opening: tuple[str, str, str] | None = None  # fence, label and indentation
    content: list[str] = []
    for line in _LINE.findall(text):
        match = _FENCE.match(line)
        indent, fence, label = match.groups() if match and "`" not in line[match.end(2) :] else ("", "", "")
        if opening is None:
            if fence:
                opening, content = (fence, label, indent), []
            continue
        closes = fence[:1] == opening[0][0] and len(fence) >= len(opening[0]) and not label
        reopens = bool(label) and fence == opening[0]  # a new block where the last one was not closed
        if closes or reopens:
            blocks.append((opening[1], _without(opening[2], content)))
            opening, content = ((fence, label, indent) if reopens else None), []
        else:
            content.append(line)
    if opening is not None:
        blocks.append((opening[1], _without(opening[2], content)))
    return blocks


def _without(indent: str, lines: list[str]) -> str:
    """Text of the lines without the indentation, if all but blank ones have it."""
    if not all(line.startswith(indent) or not line.strip() for line in lines):
        return "".join(lines)
    return "".join(line.removeprefix(indent) for line in lines)


def completed(prompt: str, program: str, entry: str) -> str | None:
    """Prompt with the function's body that continues it; `None`: the program is no such body.

    The body ends before the first line that is not indented.

    Example:
        >>> completed("def f():\\n", "    return 1\\n\\nprint(f())", "f")
        'def f():\\n    return 1\\n'
    """
    own = rf"^(?:async\s+def|def|class)\s+{re.escape(entry)}\b|^{re.escape(entry)}\s*[=:]"
    lines = [line for line in program.split("\n") if line.strip()]
    if re.search(own, program, re.MULTILINE) or not lines or lines[0][:1] not in " \t":
        return None
    end = re.search(r"^\S", program, re.MULTILINE)
    return prompt + (program[: end.start()].rstrip("\n") + "\n" if end else program)


def refusal(program: str | None) -> str:
    """Why a program is not run; "" if it is."""
    if program is None:
        return "no program in the answer"
    if len(program) > MAX_PROGRAM:
        return f"a program of {len(program)} characters (limit {MAX_PROGRAM})"
    return ""
