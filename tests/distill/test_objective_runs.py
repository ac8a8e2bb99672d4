"""Every objective in a run: rejected candidates and an interruption leave no trace; masks count in
the divisor and not in scores.
"""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_run import make_trainer
from helpers.traces import Interrupt, with_rejecting_search

from effopd.common.files import read_rows
from effopd.distill.scoring import token_batch

RUN = {"max_steps": 4, "eval_strategy": "no", "learning_rate": 1e-3, "max_completion_length": 10}
OBJECTIVES = {
    "top_k": {
        "loss_type": "teacher_top_k", "teacher_top_k": 4, "top_p": 0.9, "token_mask": "first_special",
        "highest_entropy_share": 0.5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4,
    },
    "sampled": {"loss_type": "sampled", "baseline": "optimal", "samples_per_prefix": 3},
    "negative": {
        "loss_type": "negative_advantage", "entropy_advantage": True, "logging_steps": 2, "loss_weighting": "answer",
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_rejected_jumps_and_an_interruption_leave_no_trace(tmp_path, name):
    settings = OBJECTIVES[name]
    plain = make_trainer(tmp_path / "plain", **RUN, **settings)
    teacher = {key: tensor.clone() for key, tensor in plain.teacher_model.state_dict().items()}
    plain.train()
    assert all(torch.equal(tensor, teacher[key]) for key, tensor in plain.teacher_model.state_dict().items())
    part = with_rejecting_search(make_trainer(tmp_path / "part", **RUN, **settings))
    part.add_callback(Interrupt(3))
    with pytest.raises(KeyboardInterrupt):
        part.train()
    resumed = with_rejecting_search(make_trainer(tmp_path / "part", **RUN, **settings))
    resumed.train(resume_from_checkpoint=True)
    searches = list(read_rows(tmp_path / "part" / "searches.jsonl"))
    assert [row["step"] for row in searches] == [1, 2, 4] and not any(row["accepted_scale"] for row in searches)
    end = dict(plain.model.named_parameters())
    assert all(torch.equal(p, end[key]) for key, p in resumed.model.named_parameters())


@pytest.mark.slow
def test_a_mask_counts_in_the_divisor_and_not_in_scores(tmp_path):
    trainer = make_trainer(tmp_path, **RUN | {"max_steps": 1}, **OBJECTIVES["top_k"])
    seen, real = [], trainer._generate_and_score_completions

    def spied(inputs):
        seen.append(real(inputs))
        return seen[-1]

    trainer._generate_and_score_completions = spied
    trainer.train()
    batch, scored = seen[0], token_batch(seen[0]).scored_BT
    ids, masked = batch["completion_ids"], scored & ~batch["train_mask"]
    special = [trainer.text_tokenizer.get_vocab()["<"], 2]  # '<' and the end token; 'think' is no token here
    for row, answer in enumerate(ids.tolist()):
        firsts = {answer.index(token) for token in special if token in answer and scored[row, answer.index(token)]}
        assert set(masked[row].nonzero()[:, 0].tolist()) == firsts
    assert masked.any() and scored.equal(batch["completion_mask"].bool())  # scores use all tokens
    lengths = batch["train_mask"].sum(1)
    assert int(batch["num_items_in_batch"]) == int(sum(-(-int(n) // 2) for n in lengths))
    (logged,) = read_rows(tmp_path / "metrics.jsonl")
    assert 0 < logged["health/support_mass"] <= 1 and 0 <= logged["health/outside_support"] <= 1


@pytest.mark.slow
def test_the_control_runs_no_teacher_in_steps_that_are_not_measured(tmp_path):
    trainer, calls = make_trainer(tmp_path, **RUN, **OBJECTIVES["negative"], save_strategy="no"), []
    real = trainer._frozen
    trainer._frozen = lambda *args: calls.append(trainer.state.global_step) or real(*args)
    trainer.train()
    assert calls == [1, 3]  # steps 2 and 4 are logged
