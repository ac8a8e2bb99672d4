"""Early checks of settings that the host libraries reject only during setup of a run.

They cover generation, attention, and the packages that these need. Nothing is loaded.
`optimizer_checks` covers optimizer and schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from accelerate.utils import DynamoBackend
from transformers import AttentionInterface, GenerationConfig
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
from trl import ModelConfig

from effopd.common import optional
from effopd.common.host_values import (
    ANY_EVALUATION_ONLY,
    EVALUATION_BY_STEPS_ONLY,
    EVALUATION_ONLY,
    VLLM_ONLY,
    name_of,
)
from effopd.common.optional import TRACKERS, ensure
from effopd.distill.rl_config import TaskGRPOConfig
from effopd.distill.values import GRPO_LOSSES, check_name, check_values
from effopd.errors import ConfigError, MissingDependencyError
from effopd.launch.optimizer_checks import OPTIMIZER_PACKAGES, check_optimizer


def check_host_settings(model: ModelConfig, args: Any) -> None:
    """Check values and packages, and pass the settings to the host libraries' own checks.

    Args:
        model: as parsed.
        args: a training configuration of this package.

    Raises:
        MissingDependencyError: a package is missing.
        ConfigError: a value is out of range or rejected by a host library.
    """
    check_values(model)
    check_unread(model, args)
    if not str(args.output_dir).strip():
        raise ConfigError("--output_dir: expected a folder, got nothing.")
    if isinstance(args, TaskGRPOConfig):
        check_name("loss_type", args.loss_type, GRPO_LOSSES)
    require_packages(model, args)
    _check_quantization(model)
    for flag, name in (
        ("--attn_implementation", model.attn_implementation),
        ("--model_init_kwargs", (args.model_init_kwargs or {}).get("attn_implementation")),
        ("--teacher_model_init_kwargs", (getattr(args, "teacher_model_init_kwargs",
        None) or {}).get("attn_implementation")),
    ):  # fmt: skip
        if isinstance(name, str):
            _check_attention(flag, name)
    check_optimizer(args)
    _check_generation(args)
    if args.torch_compile_backend is not None and args.torch_compile_backend.upper() not in DynamoBackend.list():
        check_name(
            "torch_compile_backend", args.torch_compile_backend, [name.lower() for name in DynamoBackend.list()]
        )
    _check_rl(model, args)


def require_packages(model: ModelConfig, args: Any) -> None:
    """Check that the packages needed by the flags are installed.

    Raises:
        MissingDependencyError: a package is missing.
        ConfigError: transformers does not know a tracker of `--report_to`.
    """
    quantized = [
        kwargs.get("quantization_config")
        for kwargs in (args.model_init_kwargs or {}, getattr(args, "teacher_model_init_kwargs", None) or {})
    ]
    bits = any(isinstance(q, Mapping) and (q.get("load_in_8bit") or q.get("load_in_4bit")) for q in quantized)
    for module, wanted in (
        ("peft", model.use_peft),
        ("bitsandbytes", model.load_in_4bit or model.load_in_8bit or bits or getattr(args, "quantization", None)),
        ("vllm", args.use_vllm),
        ("liger_kernel", args.use_liger_kernel),
        *((module, name_of(args.optim).startswith(start)) for start, module in OPTIMIZER_PACKAGES.items()),
    ):
        if wanted:
            ensure(module)
    try:
        get_reporting_integration_callbacks(args.report_to)
    except ValueError as error:
        raise ConfigError(f"--report_to: {error}") from error
    for tracker in TRACKERS.intersection(args.report_to):
        if tracker != "tensorboard" or not optional.is_available("tensorboardX"):  # either is enough
            ensure(tracker)


def check_unread(model: ModelConfig, args: Any) -> None:
    """Refuse settings that have no effect because another one is off.

    Raises:
        ConfigError: a setting differs from its default and is not read.
    """
    evaluation = name_of(args.eval_strategy)
    evaluates, by_steps = evaluation != "no", evaluation == "steps"
    for reader, wanted, config, start in (
        ("--use_peft true", model.use_peft, model, ("lora_", "use_rslora", "use_dora")),
        ("--load_in_4bit true", model.load_in_4bit, model, ("bnb_4bit_", "use_bnb_nested_quant")),
        ("--use_vllm true", args.use_vllm, args, VLLM_ONLY),
        ("--eval_strategy steps", by_steps, args, EVALUATION_BY_STEPS_ONLY),
        ("--eval_strategy steps", evaluates, args, EVALUATION_ONLY),
        ("--eval_strategy steps", evaluates or bool(args.eval_on_start), args, ANY_EVALUATION_ONLY),
    ):
        given = [
            f"--{field.name}"
            for field in fields(config)
            if field.name.startswith(start) and getattr(config, field.name) != field.default
        ]
        if "--metric_for_best_model" in given:  # which sets the other
            given = [name for name in given if name != "--greater_is_better"]
        if given and not wanted:
            raise ConfigError(f"{', '.join(given)}: no effect without {reader}. Add {reader}, or leave it out.")


def _check_quantization(model: ModelConfig) -> None:
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(model, name) and not model.use_peft:
            raise ConfigError(
                f"--{name} true: quantized weights cannot be trained. Add --use_peft true to train adapters on them."
            )


def _check_attention(flag: str, name: str) -> None:
    """Check an attention implementation: known to transformers or a Hub kernel, and installed."""
    bare = name.removeprefix("paged|")
    version = bare.removeprefix("flash_attention_")
    if version.isdecimal() and int(version) in FLASH_ATTENTION_COMPATIBILITY_MATRIX:
        installed = FLASH_ATTENTION_COMPATIBILITY_MATRIX[int(version)]["general_availability_check"]()
        if not installed and not optional.is_available("kernels"):
            raise MissingDependencyError(
                f"{flag} {name} needs the package 'flash_attn' or 'kernels'; neither is installed. Install one with "
                "pip install flash-attn or pip install kernels, or use sdpa."
            )
        return
    if "/" in bare:
        if not optional.is_available("kernels"):
            raise MissingDependencyError(
                f"{flag} {name} is a Hub kernel and needs the package 'kernels'. Install it with: pip install kernels"
            )
        return
    known = ["eager", *AttentionInterface().valid_keys()]
    if name not in known:
        raise ConfigError(f"{flag}: expected one of {', '.join(known)}; got {name!r}.")


def _check_generation(args: Any) -> None:
    """Validate the sampling settings in the combination that TRL builds."""
    extra = args.generation_kwargs or {}
    if args.use_vllm or not extra:
        return
    settings = {
        "max_new_tokens": args.max_completion_length, "do_sample": True, "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k, "min_p": args.min_p, "repetition_penalty": args.repetition_penalty,
    } | dict(extra)  # fmt: skip
    try:
        GenerationConfig(**settings).validate(strict=True)
        if not settings["temperature"] or settings["temperature"] < 0:
            raise ValueError(f"temperature must be above 0, got {settings['temperature']}")
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--generation_kwargs {extra}: {' '.join(str(error).split())}") from error


def _check_rl(model: ModelConfig, args: Any) -> None:
    """Checks that TRL's GRPO and RLOO trainers make only after they load the model."""
    weights = getattr(args, "reward_weights", None)
    rewards = 1 + bool(getattr(args, "overlong_cache", 0))
    if weights is not None and len(weights) != rewards:
        raise ConfigError(
            f"--reward_weights: expected {rewards} number(s), for correct answers"
            + (" and the overlong penalty" if rewards > 1 else "")
            + f"; got {len(weights)}."
        )
    if getattr(args, "sync_ref_model", False):
        if args.beta == 0:
            raise ConfigError(
                "--sync_ref_model true: --beta 0 loads no reference model. Leave one of the two flags out."
            )
        if model.use_peft:
            raise ConfigError(
                "--sync_ref_model true: --use_peft loads no separate reference model. Leave --sync_ref_model out."
            )
    if getattr(args, "loss_type", None) == "vespo" and args.use_vllm and args.vllm_importance_sampling_correction:
        check_name(
            "vllm_importance_sampling_mode", args.vllm_importance_sampling_mode, ("token_truncate", "token_mask")
        )
