"""A rollout engine with its own copy of the weights: what it serves must be what is trained,
whatever the look-ahead does.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer, small_scores
from trl import DistillationConfig, DistillationTrainer

from effopd import EffOPDCallback, EffOPDConfig, OPDConfig, OPDTrainer
from effopd.common.files import read_rows

pytestmark = pytest.mark.slow


class Engine:
    """Stands in for TRL's `vllm_generation`: samples from the weights of its last sync, and notes
    when they are stale.
    """

    max_completion_length = 4

    def __init__(self, trainer):
        self._live = trainer.accelerator.unwrap_model(trainer.model)
        self._own = copy.deepcopy(self._live)
        self.served, self.stale, self.synced = [], [], 0
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, self, -1

    def sync_weights(self):
        self.synced += 1
        self._own.load_state_dict(self._live.state_dict())

    @torch.no_grad()
    def generate(self, prompts, images, num_generations, profiler):
        own, live = self._own.state_dict(), self._live.state_dict()
        self.stale.append(any(not torch.equal(own[name], live[name]) for name in live))
        self.served.append(torch.cat([value.flatten() for value in own.values()]).clone())
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in prompts])
        out = self._own.generate(
            input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=self.max_completion_length, do_sample=True
        )
        return None, [row.tolist() for row in out[:, width:]], None, None


def with_engine(tmp_path, strategy, *, ours=True, engine=Engine):
    arguments = {
        "output_dir": str(tmp_path),
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "max_completion_length": 4,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "bf16": False,
    }
    host, config = (OPDTrainer, OPDConfig) if ours else (DistillationTrainer, DistillationConfig)
    task = make_task(32)
    trainer = host(
        make_model(0),
        make_model(1),
        config(**arguments),
        train_dataset=task.to_dataset(),
        processing_class=make_tokenizer(),
    )
    double = engine(trainer)
    look = EffOPDConfig(strategy, **small_scores(strategy))
    trainer.add_callback(EffOPDCallback(trainer, look, task=task))
    trainer.train()
    return double, [row for row in read_rows(tmp_path / "searches.jsonl") if row["accepted_scale"]]


@pytest.mark.parametrize(
    ("strategy", "ours"), [("effopd", True), ("effopd", False), ("line_search", True), ("line_search", False)]
)
def test_after_every_jump_the_engine_serves_the_new_weights(strategy, ours, tmp_path):
    engine, jumps = with_engine(tmp_path, strategy, ours=ours)
    assert jumps and len(engine.served) == 6
    assert not any(engine.stale)
    assert all(not torch.equal(a, b) for a, b in zip(engine.served, engine.served[1:], strict=False))


def test_the_double_notices_an_engine_that_is_never_synced_again(tmp_path):
    class Forgetful(Engine):
        def sync_weights(self):
            if not self.synced:
                super().sync_weights()

    engine, _ = with_engine(tmp_path, "effopd", engine=Forgetful)
    assert not engine.stale[0] and all(engine.stale[1:])
