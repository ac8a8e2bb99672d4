"""Private names of the installed hosts, and where a source file of ours uses one."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_jit_checkpoint import CheckpointManager
from trl import DistillationTrainer, GRPOTrainer, RLOOTrainer
from trl.experimental.gold import GOLDTrainer
from trl.experimental.iw_opd import IWOPDTrainer
from trl.generation.vllm_generation import VLLMGeneration

HOSTS = ("trl", "transformers", "accelerate", "peft", "datasets")
CLASSES = (
    DistillationTrainer,
    GRPOTrainer,
    RLOOTrainer,
    GOLDTrainer,
    IWOPDTrainer,
    Trainer,
    TrainingArguments,
    CallbackHandler,
    CheckpointManager,
    Accelerator,
    PartialState,
    AcceleratorState,
    GradientState,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    GenerationMixin,
    PeftModel,
    Dataset,
    IterableDataset,
    VLLMGeneration,
)
#: Parts of TRL that it documents.
PUBLIC_TRL = ("trl", "trl.rewards")
#: Set by torch, though a host reads it.
TORCHS = {"_orig_mod", *dir(torch.nn.Module)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


@cache
def host_names() -> frozenset[str]:
    """What the classes of the hosts define privately, set on themselves, or set on a model."""
    names: set[str] = set()
    for cls in {base for kind in CLASSES for base in kind.__mro__ if base.__module__.split(".")[0] in HOSTS}:
        names |= set(vars(cls)) | set(re.findall(r"\b(?:self|cls|model)\.(_[a-z]\w*)", inspect.getsource(cls)))
    return frozenset(name for name in names if is_private(name)) - TORCHS


def uses(path: Path) -> set[tuple[str, int]]:
    """(private host name, line) in a file: attributes, methods, class variables, strings that are
    such a name, and imports.
    """
    found: set[tuple[str, int]] = set()
    tree = ast.parse(path.read_text())
    pieces = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
            names = [node.value]
        elif isinstance(node, ast.ClassDef):
            names = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
            targets = [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
            targets += [target for each in node.body if isinstance(each, ast.Assign) for target in each.targets]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in HOSTS:
            hidden = any(map(is_private, node.module.split(".")))
            hidden = hidden or (node.module.startswith("trl.") and node.module not in PUBLIC_TRL)
            found |= {(each.name, node.lineno) for each in node.names if hidden or is_private(each.name)}
        found |= {(name, node.lineno) for name in names if name in host_names()}
    return found
