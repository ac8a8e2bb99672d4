"""Contract of the look-ahead with TRL's trainers: which score which way, and which are refused.

docs/hosts.md has the table.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from helpers import trl_hosts
from helpers.tiny_models import contains

from effopd import EffOPDCallback, EffOPDConfig
from effopd.common.files import read_rows
from effopd.distill.host_rules import RULES
from effopd.errors import ConfigError
from effopd.runs.records import SEARCHES

ONE_CANDIDATE = EffOPDConfig(
    "effopd", schedule="every_step", parameters="all", score_rollouts=4, args={"scales": [2.0]}
)
SHORT = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
#: Host → its settings under which the loss on the next batch ranks weights.
NEXT_BATCH = {
    "GKDTrainer": (trl_hosts.gkd, {}),
    "GOLDTrainer": (trl_hosts.gold, {}),
    "IWOPDTrainer": (trl_hosts.iw_opd, {"distillation_objective": "jsd"}),
    "SDFTTrainer": (trl_hosts.sdft, {}),
    "SDPOTrainer": (trl_hosts.sdpo, {}),
    "ServerDistillationTrainer": (trl_hosts.server, {}),
}
#: Host → settings under which it is refused, and the reason.
REFUSED = {
    "AsyncDistillationTrainer": (lambda out: trl_hosts.asynchronous(out), "another process"),
    "GRPOTrainer": (lambda out: trl_hosts.grpo(out), "policy-gradient surrogate"),
    "IWOPDTrainer": (lambda out: trl_hosts.iw_opd(out), "distillation_objective='iw_opd'"),
    "SDPOTrainer": (lambda out: trl_hosts.sdpo(out, distillation_mode="sampled_token"), "'sampled_token'"),
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.slow
@pytest.mark.parametrize("host", NEXT_BATCH)
def test_the_score_is_the_loss_of_the_next_step(host, tmp_path):
    build, settings = NEXT_BATCH[host]
    trainer = build(tmp_path / "run", **SHORT | settings)
    assert type(trainer).__name__ == host
    trainer.add_callback(EffOPDCallback(trainer, ONE_CANDIDATE, scorer="next_batch_loss"))
    trainer.train()
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    rows = list(read_rows(tmp_path / "run" / SEARCHES))
    assert [row["step"] for row in rows] == [2, 3]
    for row in rows:
        last = [t for t in row["trials"] if t["scale"] == row["accepted_scale"]][-1]
        assert len(last["per_example"]) == 4
        assert -last["score"] == pytest.approx(losses[row["step"]], rel=1e-4, abs=1e-7)
        assert row["forward_tokens"] > row["teacher_tokens"] > 0
    if host == "ServerDistillationTrainer":  # one request per example of a search and per step, none per candidate
        assert trainer.teacher_client.requests == 2 * 4 + 3
    with pytest.raises(ConfigError, match="expected an OPDTrainer"):
        EffOPDCallback(trainer, EffOPDConfig("line_search"))  # the default scorer is of DistillationTrainer alone


@pytest.mark.slow
@pytest.mark.parametrize("host", REFUSED)
def test_refused_before_training(host, tmp_path):
    build, why = REFUSED[host]
    trainer = build(tmp_path / "run")
    assert type(trainer).__name__ == host
    with pytest.raises(ConfigError, match=why):
        EffOPDCallback(trainer, EffOPDConfig("line_search"), scorer="next_batch_loss")
    with pytest.raises(ConfigError, match=r"next_batch_loss|scorer="):
        EffOPDCallback(trainer, EffOPDConfig("line_search"))


@pytest.mark.slow
def test_answers_score_any_host_with_a_task(tmp_path):
    """GRPO's loss ranks no weights, but accuracy does."""
    trainer = trl_hosts.grpo(tmp_path, **SHORT | {"max_steps": 2})
    config = EffOPDConfig("effopd", validation_size=4, args={"scales": [2.0]})
    trainer.add_callback(EffOPDCallback(trainer, config, verify=contains))
    trainer.train()
    assert [row["step"] for row in read_rows(tmp_path / SEARCHES)] == [1, 2]


@pytest.mark.slow
def test_the_recipe_of_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text()
    script = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[-1]
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    (row,) = read_rows(tmp_path / "runs" / "sdft" / SEARCHES)
    assert row["step"] == 2 and len(row["trials"]) >= 3 and len(row["trials"][0]["per_example"]) == 4


def test_the_table_of_the_page_has_every_tested_host():
    page = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text()
    assert all(f"`{host}`" in page for host in {*NEXT_BATCH, *REFUSED, *RULES})
