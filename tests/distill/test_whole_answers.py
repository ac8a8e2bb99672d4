"""A share of whole answers among cut ones: weights, rows, scores, and resuming."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_run import make_trainer
from helpers.traces import parameters, same

from effopd import EffOPDConfig, OPDConfig
from effopd.common.files import read_rows
from effopd.distill.scoring import WHOLE, check_rollouts, text_batch
from effopd.distill.trl_host.hooks import DistillationHooks
from effopd.distill.whole_answers import TOKEN_WEIGHT, WholeAnswersMixin, whole_first
from effopd.errors import ConfigError

END, HORIZON, FULL = 9, 2, 5
ESR = {"rollout_horizon": "esr", "horizon_tokens": HORIZON, "horizon_whole_share": 0.5}
#: Prompt → its answer; the last two end before the horizon, and at it.
ANSWERS = {1: [1, 2, 3, 4, 5], 2: [6, 7, 8, END], 3: [END], 4: [5, END]}


class Sampler(DistillationHooks):
    """A host that answers every prompt with its entry of `ANSWERS`, up to the limit."""

    def around_turn(self, generate, prompt_ids, *, multimodal):
        self.sampler_rows = [[0.1] * 2 for _ in prompt_ids]
        return [self._rest(prompt)[: self.max_completion_length] for prompt in prompt_ids]

    @staticmethod
    def _rest(prompt):
        return ANSWERS[prompt[0]][len(prompt) - 1 :]

    def around_rollouts(self, sample):
        answers = self.around_turn(None, [[prompt] for prompt in ANSWERS], multimodal=False)
        width = max(map(len, answers))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in answers])
        prompts = torch.tensor([[prompt] for prompt in ANSWERS])
        return {
            "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": ids,
            "completion_mask": (ids != 0).long(), "num_items_in_batch": (ids != 0).sum(),
        }  # fmt: skip


class Host(WholeAnswersMixin, Sampler):
    def __init__(self, share: float):
        self.args = SimpleNamespace(horizon_whole_share=share, max_completion_length=FULL, seed=0)
        self.state, self.model = SimpleNamespace(global_step=0), SimpleNamespace(training=True)
        self.accelerator = SimpleNamespace(gather=lambda x: x)
        self.max_completion_length, self.use_vllm = HORIZON, False
        self.generation_config = SimpleNamespace(eos_token_id=END, max_new_tokens=HORIZON)


def test_the_weighted_sum_has_the_mean_of_whole_answers():
    """Exactly: over all choices of two rows of four, for any values of the tokens."""
    host, value_V = Host(0.5), torch.rand(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = sum(float(value_V[row].sum()) for row in ANSWERS.values())
    sums, items = {}, {}
    for step in range(200):
        host.state.global_step = step
        out = host.around_rollouts(None)
        rows = tuple(out[WHOLE].nonzero()[:, 0].tolist())
        weight_BT = out[TOKEN_WEIGHT] * out["completion_mask"]
        sums[rows] = float((weight_BT.double() * value_V[out["completion_ids"]]).sum())
        items[rows] = float(out["num_items_in_batch"])
    assert set(sums) == set(itertools.combinations(range(4), 2))
    assert sum(sums.values()) / 6 == pytest.approx(whole)
    assert sum(items.values()) / 6 == pytest.approx(sum(map(len, ANSWERS.values())))
    assert host.max_completion_length == host.generation_config.max_new_tokens == HORIZON


def test_a_whole_row_is_its_answer_and_the_others_are_cut():
    out = Host(0.5).around_rollouts(None)
    for row, (answer, whole) in enumerate(zip(ANSWERS.values(), out[WHOLE].tolist(), strict=True)):
        wanted = answer if whole else answer[:HORIZON]
        assert out["completion_ids"][row, : len(wanted)].tolist() == wanted
        assert int(out["completion_mask"][row].sum()) == len(wanted)


def test_log_probabilities_continue_with_the_answer():
    host = Host(0.5)
    answers = host.around_turn(None, [[prompt] for prompt in ANSWERS], multimodal=False)
    for answer, logps in zip(answers, host.sampler_rows, strict=True):
        assert len(logps) == (4 if len(answer) > HORIZON else 2)


@pytest.mark.parametrize("change", [{"share": 0.0}, {"length": FULL}, {"training": False}])
def test_off_nothing_is_added(change):
    host = Host(change.get("share", 0.5))
    host.max_completion_length = change.get("length", HORIZON)
    host.model.training = change.get("training", True)
    out = host.around_rollouts(None)
    assert WHOLE not in out and TOKEN_WEIGHT not in out


def test_searches_score_whole_answers_only():
    batch = {
        "prompt_ids": torch.ones(4, 1, dtype=torch.long), "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.arange(8).view(4, 2), "completion_mask": torch.ones(4, 2, dtype=torch.long),
        WHOLE: torch.tensor([False, True, False, True]), "names": ["a", "b", "c", "d"], "num": torch.tensor(8),
    }  # fmt: skip
    whole_first(batch)
    assert batch["names"] == ["b", "d", "a", "c"] and batch["completion_ids"][:, 0].tolist() == [2, 6, 0, 4]
    assert text_batch(batch).ids_BL[:, 1].tolist() == [2, 6]
    before = dict(batch)
    whole_first(batch)
    assert all(batch[name] is before[name] for name in batch)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rollout_horizon": "full"}, "topd, esr and popd"),
        ({"loss_weighting": "answer"}, "not known for a cut one"),
        ({"loss_type": "teacher_top_k", "highest_entropy_share": 0.5}, "each answer's tokens"),
        ({"horizon_whole_share": 1.0}, r"\[0, 1\)"),
        ({"teacher_mixed_alpha": 0.2}, "student's own tokens"),
    ],
)
def test_settings_that_it_refuses(flags, message):
    with pytest.raises(ConfigError, match=message):
        OPDConfig(use_cpu=True, **{"rollout_horizon": "esr", "horizon_whole_share": 0.5} | flags)


def test_too_few_whole_answers_for_a_search():
    args = OPDConfig(use_cpu=True, per_device_train_batch_size=8, **ESR | {"horizon_whole_share": 0.1})
    with pytest.raises(ConfigError, match="--horizon_whole_share"):
        check_rollouts(args, 0.25)
    args.horizon_whole_share = 0.25
    check_rollouts(args, 0.25)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_resumed_is_uninterrupted_and_evaluations_are_whole(tmp_path, accumulation):
    settings = {
        "max_steps": 6, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3,
        "per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation,
        "effopd": EffOPDConfig("newton_search"), **ESR,
    }  # fmt: skip
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    make_trainer(tmp_path / "parts", **settings | {"max_steps": 3}).train()
    resumed = make_trainer(tmp_path / "parts", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(parameters(whole), parameters(resumed))
    rows = list(read_rows(tmp_path / "whole" / "metrics.jsonl"))
    assert all(row["horizon"] == HORIZON < row["completions/max_length"] for row in rows)
    assert max(row["eval_response_length"] for row in read_rows(tmp_path / "whole" / "evals.jsonl")) > HORIZON
    assert list(read_rows(tmp_path / "whole" / "searches.jsonl"))
