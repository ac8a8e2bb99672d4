"""Memory estimate of the dry run against the peak memory of real two-step runs on the CPU.

    python benchmarks/memory_estimate.py --sizes 20M 60M 135M --out runs/memory_estimate

For every size, with and without activation checkpointing, a random Llama-shaped pair is written and
`effopd train` runs two steps in its own process. Prints its peak resident memory (`ru_maxrss`) and
the estimate. One run at a time; the largest takes about 12 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from effopd.commands.train import parse_train
from effopd.launch.memory_estimate import estimate_memory
from effopd.launch.preflight import load_tokenizer
from effopd.launch.prompts import load_prompts

#: hidden, layers, MLP, heads, key-value heads, vocabulary
SIZES = {
    "20M": (256, 8, 704, 4, 2, 49152),
    "60M": (512, 12, 1408, 8, 4, 49152),
    "135M": (576, 30, 1536, 9, 3, 49152),
}


def write_pair(folder: Path, size: str) -> None:
    """Write a student and a teacher of that size, a byte tokenizer, and 64 problems."""
    hidden, layers, inner, heads, key_values, vocab = SIZES[size]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inside = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inside.pre_tokenizer, inside.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inside.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inside, eos_token="<end>", pad_token="<end>")
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=key_values,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=256,
            pad_token_id=256,
        )
        LlamaForCausalLM(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    rows = [{"problem": f"{i} + {i + 1} = ?", "answer": str(2 * i + 1)} for i in range(64)]
    (folder / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(folder: Path, *, checkpointing: bool, rows: int, answer: int) -> list[str]:
    """Flags of a run."""
    return [
        "--model_name_or_path",
        str(folder / "student"),
        "--teacher_model_name_or_path",
        str(folder / "teacher"),
        "--task",
        f"math:{folder / 'math.jsonl'}",
        "--as_chat",
        "false",
        "--prompt_suffix",
        "",
        "--per_device_train_batch_size",
        str(rows),
        "--max_completion_length",
        str(answer),
        "--max_steps",
        "2",
        "--save_strategy",
        "no",
        "--report_to",
        "none",
        "--use_cpu",
        "true",
        "--activation_checkpointing",
        str(checkpointing).lower(),
        "--output_dir",
        str(folder / "run"),
    ]


def estimate(flags: list[str]) -> int:
    """The dry run's estimated peak memory on one device, in bytes."""
    settings = parse_train(flags)
    tokenizer = load_tokenizer(str(settings.model.model_name_or_path))
    memory = estimate_memory(settings, load_prompts(settings.task, settings.opd, tokenizer, "").longest)
    assert memory is not None, "the models are on disk"
    return memory.peaks[0]


def peak(flags: list[str]) -> int:
    """Peak resident memory of `effopd train` with these flags, in bytes."""
    code = (
        "import resource, sys; from effopd.commands.main import main; status = main(['train', *sys.argv[1:]]);"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); sys.exit(status)"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return int(next(line for line in done.stdout.splitlines() if line.startswith("peak ")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rows", type=int, default=32, help="rollouts per step")
    parser.add_argument("--answer", type=int, default=48, help="tokens per answer")
    parser.add_argument("--out", type=Path, default=Path("runs/memory_estimate"))
    arguments = parser.parse_args()
    for size in arguments.sizes:
        for checkpointing in (True, False):
            folder = arguments.out / size
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_pair(folder, size)
            flags = command(folder, checkpointing=checkpointing, rows=arguments.rows, answer=arguments.answer)
            estimated, measured = estimate(flags), peak(flags)
            print(
                f"{size} {'with' if checkpointing else 'without'} checkpointing: estimated {estimated / 1e9:.2f} GB, "
                f"measured {measured / 1e9:.2f} GB, {estimated / measured - 1:+.0%}",
                flush=True,
            )
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
