"""Only what follows the reasoning is graded, whichever way a model or its template marks it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers.tiny_models import TEMPLATE, make_model, make_tokenizer

from effopd.distill.rl import correct_reward
from effopd.tasks import Example, MathVerifier, ReasoningGymVerifier, Task
from effopd.tasks import testbed_families as families
from effopd.tasks.evaluate import evaluate
from effopd.tasks.reasoning import answer_part, decode_marked, opened_by, opened_by_ids
from effopd.tasks.sampling import Sampling

#: (opening mark, closing mark) as models and templates write them.
MARKS = [
    ("<think>", "</think>"),
    ("<think>\n", "\n</think>\n\n"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
]


@pytest.fixture(scope="module")
def math():
    verifier = MathVerifier()
    yield verifier
    verifier.worker.close()


@pytest.fixture(scope="module")
def gym():
    verifier = ReasoningGymVerifier("chain_sum")
    yield verifier
    verifier.worker.close()


@pytest.mark.parametrize(("opening", "closing"), MARKS)
def test_every_kind_of_mark(opening, closing):
    assert answer_part(f"{opening}try 7{closing}8").strip() == "8"
    assert answer_part(f"{opening}try 7").strip() == ""
    assert answer_part(f"{opening}a{closing}7{opening}b") == ""
    assert answer_part(f"{opening}a{closing}7{opening}b{closing}8").strip() == "8"
    assert answer_part(f"try 7{closing}8").strip() == "8", "the template had opened it"
    assert opened_by(f"assistant\n{opening}") == opening
    assert opened_by(f"reason in {opening}…{closing} please") == ""
    assert opened_by(f"assistant\n{opening}{closing}") == ""


def test_text_without_marks_is_all_answer():
    for text in ("", "so 7", "a < b > c", "[thin] 7", "x/think 7", "<thinker> 7"):
        assert answer_part(text) == text
    assert answer_part("<think>" * 100_000) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "score"),
    [
        (r"<think>try \boxed{7}, check", 0.0),
        (r"<think>\boxed{7}</think> I do not know", 0.0),
        (r"<think>\boxed{7}</think> so \boxed{8}", 0.0),
        (r"<think>\boxed{8}</think> so \boxed{7}", 1.0),
        (r"\boxed{8}</think>\boxed{7}", 1.0),
        (r"\boxed{7}</think>", 0.0),
        (r"<reasoning>\boxed{7}", 0.0),
        (r"[THINK]\boxed{7}[/THINK]\boxed{6}", 0.0),
        (r"so \boxed{7}", 1.0),
    ],
)
def test_built_in_verifiers_ignore_the_reasoning(text, score, math, gym):
    row = Example("e", "?", "7", {"family": "chain_sum", "entry": {"answer": "7"}})
    tagged = text.replace(r"\boxed{", "<answer>").replace("}", "</answer>")
    found = "{7}" in answer_part(text) or "{8}" in answer_part(text) or "{6}" in answer_part(text)
    for verifier, written in ((math, text), (families.verify, tagged)):
        assert verifier(written, row) == score
        assert verifier.answer_found(written) == found
    assert gym.answer_found(tagged) == found
    assert gym(tagged, row) == pytest.approx(score, abs=0.05)  # the library gives a little for a wrong number


def thinking_tokenizer(special: bool):
    """The tests' tokenizer with a template that opens the reasoning."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["[THINK]", "[/THINK]"], special_tokens=special)
    tokenizer.chat_template = TEMPLATE.replace("{{ '<s>' }}{% endif %}", "{{ '<s>[THINK]' }}{% endif %}")
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
def test_marks_survive_decoding(special):
    tokenizer = thinking_tokenizer(special)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "[THINK]", "a", "[/THINK]", "b", "<e>")]
    assert decode_marked(tokenizer, [ids, ids[2:3]]) == ["[THINK]a[/THINK]b", "a"]
    assert opened_by_ids(tokenizer, ids[:2]) == "[THINK]" and opened_by_ids(tokenizer, ids) == ""


def test_verifiers_learn_that_the_prompt_opened_the_reasoning():
    tokenizer, seen = thinking_tokenizer(True), []

    def verify(completion, example):
        seen.append(completion)
        return 0.0

    task = Task("t", (Example("a", [{"role": "user", "content": "1+1"}], "2"),), verify)
    result = evaluate(make_model(0), tokenizer, task, Sampling(max_new_tokens=3))
    ((answer,),) = result.completions
    assert seen == ["[THINK]" + answer.text] and answer.opened == "[THINK]"
    assert result.answers_found is None

    trainer = SimpleNamespace(text_tokenizer=tokenizer, chat_template_kwargs={}, model=make_model(0).eval())
    assert correct_reward(task, trainer)(completions=[], id=["a"], completion_ids=[answer.completion_ids]) == [0.0]
    assert seen[1] == seen[0]


def test_answers_are_counted(student, tokenizer, task):
    class Letters:
        def __call__(self, completion, example):
            return 0.0

        def answer_found(self, completion):
            return "a" in completion

    counted = Task("t", task.examples, Letters())
    result = evaluate(student, tokenizer, counted, Sampling(max_new_tokens=3, n=2))
    texts = [answer for row in result.completions for answer in row]
    assert result.answers_found == sum("a" in answer.text for answer in texts) > 0
    assert result.answers_cut == sum(answer.truncated for answer in texts)
    assert result.answers_empty == sum(not answer.text.strip() for answer in texts)
    assert result.summary()["answers_found"] == result.answers_found


@pytest.mark.parametrize("quotes", ["''", '""', "``", "“”", "‘’"])
def test_a_quoted_mark_opens_no_reasoning(quotes):
    quoted = f"{quotes[0]}<think>{quotes[1]} is a tag: \\boxed{{7}}"
    assert answer_part(quoted) == quoted
    assert answer_part(f"<think>a</think>{quoted}") == quoted
    assert answer_part(f"{quoted} <think>") == ""
