"""Peak memory of training a model with the shape of SmolLM2-135M, by how its teacher is held.

    python benchmarks/teacher_memory.py

Student and teacher are random and have 134.5 million parameters each. Every arm trains two steps of
2 rollouts × 8 tokens in a process of its own: with the teacher in float32, bfloat16, 8 and 4 bits
(bitsandbytes, if installed), behind a server in another process (the tests' server, top 64), and
with stored rollouts (`effopd cache`). The numbers are the peak resident memory of the training
process, and the bytes of the teacher's weights in it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from effopd import OPDConfig, OPDTrainer
from effopd.common.optional import is_available
from effopd.distill.offline_cache import collect
from effopd.distill.offline_store import Header, ModelIdentity, RolloutStore, prompts_sha256
from effopd.distill.offline_trainer import OfflineOPDTrainer
from effopd.distill.served.trainer import ServedOPDTrainer
from effopd.models.fingerprint import tokenizer_sha256
from effopd.tasks import TaskConfig, load_task
from effopd.tasks.builtin_models import student_path
from effopd.tasks.generate import encode_prompts

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.teacher_server import TeacherServer

#: Arm → settings of `OPDConfig`.
ARMS: dict[str, dict[str, Any]] = {
    "float32": {"teacher_dtype": "float32"},
    "bfloat16": {"teacher_dtype": "bfloat16"},
    "8 bits": {"teacher_dtype": "bfloat16", "teacher_load_in_8bit": True},
    "4 bits": {"teacher_dtype": "bfloat16", "teacher_load_in_4bit": True},
    "served": {"teacher_top_k": 64},
    "cached": {},
}
LENGTH, BATCH, STEPS = 8, 2, 2


def build(folder: Path) -> None:
    """Write a random student and teacher of SmolLM2-135M's shape, and the stored rollouts."""
    tokenizer = AutoTokenizer.from_pretrained(student_path(), padding_side="left")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=100_000,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    models = {}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        models[name] = LlamaForCausalLM(config)
        models[name].save_pretrained(folder / name)
    task = load_task(TaskConfig(task="testbed:chain_sum", train_size=BATCH * STEPS), "train")
    prompts = encode_prompts(tokenizer, [example.prompt for example in task.examples])
    header = Header(
        teacher=ModelIdentity("teacher", None, "-"), student=ModelIdentity("student", None, "-"), sft_teacher=None,
        tokenizer=tokenizer_sha256(tokenizer), vocab_size=config.vocab_size, temperature=1.0,
        max_completion_length=LENGTH, seed=0, batch_size=BATCH, dtype="float32", top_k=0, prompts=len(prompts),
        prompts_sha256=prompts_sha256(prompts), rows_per_file=len(prompts),
    )  # fmt: skip
    store = RolloutStore(folder / "rollouts")
    store.open(header)
    collect(store, header, models["student"].eval(), models["teacher"].eval(), tokenizer, task)


def train(arm: str, folder: Path) -> None:
    """Train `STEPS` steps in this process; print its peak memory and the teacher's bytes, in MB."""
    tokenizer = AutoTokenizer.from_pretrained(student_path(), padding_side="left")
    task = load_task(TaskConfig(task="testbed:chain_sum", train_size=BATCH * STEPS), "train")
    shared: dict[str, Any] = {
        "output_dir": str(folder / arm), "max_steps": STEPS, "per_device_train_batch_size": BATCH,
        "max_completion_length": LENGTH, "save_strategy": "no", "eval_strategy": "no", "use_cpu": True,
        "report_to": "none", "activation_checkpointing": False, "disable_tqdm": True, "health_tokens": 0,
        "loss_type": "sampled",
    }  # fmt: skip
    trainer: Any
    if arm == "cached":
        args = OPDConfig(rollouts=str(folder / "rollouts"), **shared)
        trainer = OfflineOPDTrainer(str(folder / "student"), args, processing_class=tokenizer)
    elif arm == "served":
        args = OPDConfig(teacher_server=(folder / "url").read_text(), **shared, **ARMS[arm])
        trainer = ServedOPDTrainer(
            str(folder / "student"), args, train_dataset=task.to_dataset(), processing_class=tokenizer
        )
    else:
        args = OPDConfig(**shared, **ARMS[arm])
        trainer = OPDTrainer(
            str(folder / "student"), str(folder / "teacher"), args, train_dataset=task.to_dataset(),
            processing_class=tokenizer,
        )  # fmt: skip
    with redirect_stdout(sys.stderr):  # the console lines of training
        trainer.train()
    teacher = getattr(trainer, "teacher_model", None)
    size = 0 if teacher is None else sum(p.nbytes for p in teacher.parameters()) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({"arm": arm, "peak_mb": round(peak), "teacher_mb": round(size)}), flush=True)


def in_process(work: Callable[[], None]) -> None:
    """Run `work` in a fork of this process, whose memory is that of the imported libraries.

    Raises:
        SystemExit: it failed.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if status := os.waitpid(child, 0)[1]:
        raise SystemExit(f"a part of the measurement failed with status {status}.")


@contextmanager
def served(folder: Path) -> Iterator[None]:
    """In this block, another process serves the teacher at the address in `folder`/url."""
    child = os.fork()
    if child == 0:
        try:
            model = LlamaForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(student_path(), padding_side="left")
            server = TeacherServer(model, tokenizer)
            (folder / "url.part").write_text(server.url)
            (folder / "url.part").rename(folder / "url")
            signal.pause()
        finally:
            os._exit(1)
    try:
        while not (folder / "url").exists():
            time.sleep(0.1)
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork cannot use the threads of its parent
    with tempfile.TemporaryDirectory() as scratch:
        in_process(lambda: build(Path(scratch)))
        for name in ARMS:
            if "bits" not in name or is_available("bitsandbytes"):
                with served(Path(scratch)) if name == "served" else nullcontext():
                    in_process(lambda name=name: train(name, Path(scratch)))  # type: ignore[misc]
