"""Checks of a teacher's server before training: model, tokenizer, vocabulary, top k and length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effopd.distill.served.client import TeacherClient
from effopd.distill.served.config import ServedArguments
from effopd.distill.served.protocol import COMPLETIONS, MODELS, TOKENIZE, completion_request, read_completions
from effopd.distill.served.teacher import ServedTeacher
from effopd.errors import CompatibilityError, ConfigError, TeacherServerError

#: Texts whose token ids are compared; the tokenizer's special tokens and a part of its vocabulary
#: are added.
KNOWN = (
    "What is 12 + 345? Let us think step by step.\n\n\\boxed{357}",
    "def f(x):\n    return [x ** 2, -1.5e-3]  # comment\t",
    "Größe, naïve, 東京, привет, 🙂",
)
#: Number of vocabulary entries that are compared.
_ENTRIES = 256


def reachable(args: ServedArguments) -> bool:
    """Whether the server answers a single attempt within 5 seconds."""
    try:
        TeacherClient(str(args.teacher_server), timeout=min(5.0, args.teacher_server_timeout), retries=0).call(MODELS)
    except TeacherServerError:
        return False
    return True


def open_teacher(
    args: Any,
    tokenizer: Any,
    vocab_size: int,
    *,
    prompt: int | None = None,
) -> ServedTeacher:
    """The teacher of a run, after all checks of its server.

    Args:
        args: an `OPDConfig` with `teacher_server`.
        tokenizer: the student's.
        vocab_size: rows of the student's vocabulary.
        prompt: tokens of the longest prompt; `None`: not known.

    Raises:
        TeacherServerError: the server gave no usable reply.
        CompatibilityError: the server's tokenizer or vocabulary differs from the student's, or the
            server refuses the number of log-probabilities.
        ConfigError: the server accepts shorter sequences than those of the run.
    """
    client = TeacherClient(
        str(args.teacher_server), timeout=args.teacher_server_timeout, retries=args.teacher_server_retries
    )
    model, longest = client.call(MODELS, read=lambda reply: _served(reply))
    _check_tokenizer(client, model, tokenizer)
    wanted = (prompt or 1) + args.max_completion_length + 1
    if longest is not None and wanted > longest:
        raise ConfigError(
            f"--teacher_server {client.url} accepts {longest} tokens per sequence (max_model_len), but prompts of "
            f"{prompt or 1} and answers of {args.max_completion_length} tokens, plus one sampled token, take "
            f"{wanted}. Lower --max_completion_length, or start the server with --max-model-len {wanted}."
        )
    size = _shared_vocabulary(client, model, tokenizer, vocab_size, args.teacher_top_k)
    return ServedTeacher(
        client, model, vocab_size=size, top_k=args.teacher_top_k, workers=args.teacher_server_concurrency
    )


def _served(reply: Any) -> tuple[str, int | None]:
    """Name and length limit of the first model that the server lists."""
    first = reply["data"][0]
    return str(first["id"]), first.get("max_model_len")


def _check_tokenizer(client: TeacherClient, model: str, tokenizer: Any) -> None:
    for text in known_texts(tokenizer):
        ours = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        theirs = client.call(TOKENIZE, body, read=lambda reply: [int(token) for token in reply["tokens"]])
        if ours != theirs:
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
            at = min(len(ours), len(theirs)) if at is None else at
            raise CompatibilityError(
                f"--teacher_server {client.url}: the tokenizer of its model {model!r} differs from the student's. For "
                f"the text {text[:60]!r} token {at} is {theirs[at : at + 1]} at the server and {ours[at : at + 1]} "
                "for the student. Token-level distillation compares equal ids. Serve a teacher of the student's "
                "family."
            )


def known_texts(tokenizer: Any) -> list[str]:
    """The compared texts: `KNOWN`, special tokens, and entries spread over the vocabulary."""
    ids = sorted(set(tokenizer.get_vocab().values()))
    some = ids[:: max(1, len(ids) // _ENTRIES)]
    return [*KNOWN, "".join(tokenizer.all_special_tokens), " ".join(tokenizer.decode([one]) for one in some)]


def _shared_vocabulary(client: TeacherClient, model: str, tokenizer: Any, vocab_size: int, top_k: int) -> int:
    """`vocab_size` if the server takes its last id, otherwise the number of the tokenizer's ids."""
    text = tokenizer(KNOWN[0], add_special_tokens=False)["input_ids"]
    known = max(tokenizer.get_vocab().values()) + 1
    for size in sorted({vocab_size, known}, reverse=True):
        try:
            _probe(client, model, [*text, size - 1], min(top_k, size), size)
        except CompatibilityError as error:
            if size > known and "vocabulary" in str(error):  # a padding row that the teacher lacks
                continue
            if "vocabulary" in str(error):
                raise CompatibilityError(
                    f"the model {model!r} of --teacher_server {client.url} has fewer vocabulary rows than the "
                    f"student's tokenizer has tokens ({known}): {error} Serve a teacher of the student's family."
                ) from error
            raise CompatibilityError(
                f"--teacher_server {client.url} does not give {min(top_k, size)} log-probabilities per token: {error} "
                f"Start it with --max-logprobs {min(top_k, size)} (vLLM's default is 20; -1: no limit), or lower "
                "--teacher_top_k."
            ) from error
        return size
    raise AssertionError("the last size returns or raises")


def _probe(client: TeacherClient, model: str, ids: Sequence[int], top_k: int, size: int) -> None:
    body = completion_request(model, [ids], top_k)
    client.call(COMPLETIONS, body, read=lambda reply: read_completions(reply, [ids], [1], top_k, size))
