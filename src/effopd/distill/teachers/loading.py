"""Dtype and quantization with which a teacher is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_torch_bf16_gpu_available

from effopd.distill.teachers.settings import TeacherArguments


def on_accelerator(args: Any) -> bool:
    """Whether the run computes on an accelerator."""
    return torch.accelerator.is_available() and not getattr(args, "use_cpu", False)


def resolved_dtype(args: Any, student_dtype: str | None = None) -> str:
    """Dtype of the teacher's weights by name; "auto": as stored.

    Args:
        args: an `OPDConfig`.
        student_dtype: `--dtype`, which `teacher_dtype` "auto" follows if it is not float32.
    """
    if args.teacher_dtype != "auto":
        return args.teacher_dtype
    if student_dtype not in (None, "float32"):
        return str(student_dtype)
    return "bfloat16" if on_accelerator(args) and is_torch_bf16_gpu_available() else "float32"


def teacher_loading(args: TeacherArguments, init: Mapping[str, Any]) -> dict[str, Any]:
    """Loading arguments of the teacher: `init`, with what `args` sets beside it."""
    load = {"dtype": resolved_dtype(args)} | revision_argument(args) | dict(init)
    if args.quantization is not None:
        load["quantization_config"] = quantization_config(args.quantization, load["dtype"])
    return load


def teacher_revision(args: Any) -> str | None:
    """Revision of the teacher on the Hub, from its loading arguments or its flag."""
    init = getattr(args, "teacher_model_init_kwargs", None) or {}
    return init.get("revision", getattr(args, "teacher_model_revision", None))


def revision_argument(args: Any) -> dict[str, str]:
    """The teacher's revision as a loading argument; empty without one."""
    revision = teacher_revision(args)
    return {} if revision is None else {"revision": revision}


def quantization_config(kind: str, dtype: str) -> BitsAndBytesConfig:
    """Configuration of bitsandbytes for `kind` '8bit' or '4bit'.

    Args:
        dtype: name of the dtype in which 4-bit layers compute; "auto": bfloat16.
    """
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype in ("auto", None) else getattr(torch, str(dtype).removeprefix("torch."))
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
