"""Token ids of prompts, encoded as TRL's trainers do, and checks of unusable prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effopd.errors import CompatibilityError, TaskError
from effopd.tasks.base import Prompt, Task
from effopd.tasks.row_faults import ORIGIN, RowFaults

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    origin: str = "a prompt",
) -> list[int]:
    """Token ids of one prompt.

    Chat messages get the chat template and the generation prompt; plain text gets the tokenizer's
    special tokens.

    Args:
        tokenizer: the student's.
        prompt: text or chat messages.
        chat_template_kwargs: passed to `apply_chat_template`.
        origin: source of the prompt, for messages.

    Raises:
        TaskError: the tokenizer has no chat template, or the template rejects the messages.
        CompatibilityError: a special token ends the plain text, so the model cannot continue it.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        _check_end(tokenizer, prompt, ids, origin)
        return ids
    text = _rendered(tokenizer, prompt, chat_template_kwargs or {}, origin)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_prompt_lengths(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Length of every prompt in tokens, including the chat template and generation prompt.

    Args:
        task: task whose prompts are measured.
        tokenizer: the student's.
        max_prompt_length: longest prompt allowed, in tokens; `None`: no limit.
        chat_template_kwargs: passed to `apply_chat_template`.

    Returns:
        Example id → number of tokens.

    Raises:
        TaskError: prompts are too long (the message lists them), or the chat template is missing or
            rejects a prompt.
        CompatibilityError: a special token ends a plain-text prompt.
    """
    lengths: dict[str, int] = {}
    faults = RowFaults(task.name)
    for example in task.examples:
        origin = f"{example.metadata.get(ORIGIN, task.name)} (id {example.id})"
        lengths[example.id] = len(prompt_ids(tokenizer, example.prompt, chat_template_kwargs, origin=origin))
        if max_prompt_length is not None and lengths[example.id] > max_prompt_length:
            fix = "Raise max_prompt_length, or shorten or remove the row."
            faults.add(origin, f"at most {max_prompt_length} prompt tokens", str(lengths[example.id]), fix)
    faults.raise_if_any()
    return lengths


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], kwargs: Mapping[str, Any], origin: str
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise TaskError(
            f"{origin}: expected a tokenizer with a chat template for chat messages, got none in "
            f"'{tokenizer.name_or_path}'. Set as_chat to false for a base model, or add a template."
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs))
    except Exception as error:  # a template can raise anything; the cause is chained
        system = messages[0].get("role") == "system"
        fix = (
            "Remove --system_prompt (or the row's system message), or put its text into the prompts."
            if system
            else "Write messages that the template accepts, or set as_chat to false."
        )
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise TaskError(
            f"{origin}: the chat template of '{tokenizer.name_or_path}' rejects this prompt (roles: {roles}): "
            f"{str(error) or type(error).__name__}. {fix}"
        ) from error


def _check_end(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int], origin: str) -> None:
    """Reject plain text that ends with an end token, whether added by the tokenizer or typed."""
    if len(ids) < 2 or ids[-1] not in _special_ids(tokenizer):
        return
    token = tokenizer.convert_ids_to_tokens(ids[-1])
    bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if len(bare) < len(ids) and list(bare) != ids[-len(bare) :]:
        raise CompatibilityError(
            f"{origin}: the tokenizer of '{tokenizer.name_or_path}' ends every text with {token!r}, so the model "
            "cannot continue the prompt. Set add_eos_token to false in tokenizer_config.json, remove the token from "
            "the post-processor in tokenizer.json, or use chat prompts."
        )
    if ids[-1] == tokenizer.eos_token_id:
        raise CompatibilityError(
            f"{origin}: the prompt ends with the end token {token!r}, so the model cannot continue it. Remove the "
            "token from the prompt or from --prompt_suffix."
        )


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = set(getattr(tokenizer, "all_special_ids", ()))
    return named | {index for index, token in added.items() if getattr(token, "special", False)}
