"""Tiny models for property tests: a character tokenizer, a random Qwen3 pair, a task that needs no
skill.
"""

from __future__ import annotations

import copy
import os
from functools import cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would wait for each other, and spin

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from effopd.tasks.base import Example, Task

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz +-=?<>/"
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['content'] + '<e>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "<e>"]
    vocabulary = {token: i for i, token in enumerate([*special, "<unk>", *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="<e>", unk_token="<unk>"
    )
    tokenizer.padding_side = "left"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(seed: int, vocab_size: int = 64, hidden: int = 16) -> Qwen3ForCausalLM:
    """A model of its own; torch's random state is then what initializing it leaves."""
    model, state = _made(seed, vocab_size, hidden)
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@cache
def _made(seed: int, vocab_size: int, hidden: int) -> tuple[Qwen3ForCausalLM, torch.Tensor]:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=128,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model, torch.get_rng_state()


def contains(completion: str, example: Example) -> float:
    """Right if the completion holds the answer's character: a random model is right now and
    then.
    """
    return float(example.answer is not None and example.answer in completion)


def make_task(size: int = 32) -> Task:
    examples = tuple(
        Example(str(i), [{"role": "user", "content": f"{i % 10} + {i // 10} = ?"}], "abcdefgh"[i % 8])
        for i in range(size)
    )
    return Task("letters", examples, contains)


def small_scores(strategy: str, size: int = 8) -> dict[str, int]:
    """The setting that makes a strategy score on `size` examples, if it scores."""
    from effopd import EffOPDConfig

    scorer = EffOPDConfig(strategy).scorer
    return {"accuracy": {"validation_size": size}, "teacher_kl": {"score_rollouts": size}}.get(scorer, {})


def of_type(kind, seed, **config):
    """A random model of a transformers type; large weights make its distributions uneven."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, **config)
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    return model
