"""Valid values of the training flags: ranges of numbers, lists of names, keys of JSON objects.

The host libraries accept many invalid values and fail only after the models are loaded, or never.
`check_values` checks them without a model. A message names the flag, its value and the expected
values.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from effopd.errors import ConfigError

#: Largest whole number for flags without an upper limit: the maximum of a signed 32-bit integer.
LARGEST = 2**31 - 1


class Range(NamedTuple):
    """The finite numbers from `low` to `high`, and the numbers in `also`.

    `above` excludes `low` itself, `below` excludes `high` itself.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    also: tuple[float, ...] = ()
    #: Numbers below 1 are shares; numbers above 1 must be whole.
    share: bool = False

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < math.inf:
            return False
        if value in self.also:
            return True
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return low and high and not (self.share and value > 1 and value != int(value))

    def text(self, whole: bool) -> str:
        """'a number in (0, 1]', 'a whole number of at least 1', …"""
        kind = "a whole number" if whole else "a finite number"
        if self.high < math.inf and self.low > -math.inf:
            kind += f" in {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"
        elif self.low > -math.inf:
            kind += f" above {self.low:g}" if self.above else f" of at least {self.low:g}"
        if self.share:
            kind += " (below 1: a share; otherwise a whole number)"
        return kind + "".join(f", or {other:g}" for other in self.also)


_ANY, _FROM_0, _FROM_1, _ABOVE_0 = Range(), Range(0), Range(1), Range(0, above=True)
_SHARE, _STEPS = Range(0, 1), Range(0, above=True, share=True)
_BELOW_1, _PART, _PORT, _SEED = Range(0, 1, below=True), Range(0, 1, above=True), Range(1, 65535), Range(0, 2**32 - 1)

#: Field → its valid numbers.
RANGES: dict[str, Range] = {
    # TRL's ModelConfig
    "lora_r": _FROM_1, "lora_alpha": _FROM_1, "lora_dropout": _BELOW_1,
    # transformers' TrainingArguments
    "per_device_train_batch_size": _FROM_1, "per_device_eval_batch_size": _FROM_1,
    "gradient_accumulation_steps": _FROM_1,
    "num_train_epochs": _ABOVE_0, "max_steps": Range(1, also=(-1,)), "learning_rate": _FROM_0,
    "warmup_steps": Range(0, share=True), "weight_decay": _FROM_0, "label_smoothing_factor": _BELOW_1,
    "adam_beta1": _BELOW_1, "adam_beta2": _BELOW_1,
    "adam_epsilon": _ABOVE_0, "max_grad_norm": _FROM_0, "neftune_noise_alpha": _FROM_0,
    "torch_empty_cache_steps": _FROM_1,
    "logging_steps": _STEPS, "eval_steps": _STEPS, "save_steps": _STEPS, "eval_delay": _FROM_0,
    "eval_accumulation_steps": _FROM_1,
    "save_total_limit": _FROM_0, "seed": _SEED, "data_seed": _SEED, "dataloader_num_workers": _FROM_0,
    "dataloader_prefetch_factor": _FROM_1, "ddp_bucket_cap_mb": _FROM_1, "ddp_timeout": _FROM_1,
    "local_rank": Range(0, also=(-1,)),
    # TRL's configurations
    "max_completion_length": _FROM_1, "temperature": _ABOVE_0, "top_p": _PART, "top_k": _FROM_0, "min_p": _SHARE,
    "repetition_penalty": _ABOVE_0, "vllm_server_port": _PORT, "vllm_group_port": _PORT,
    "vllm_server_timeout": _ABOVE_0,
    "vllm_gpu_memory_utilization": _PART, "vllm_max_model_length": _FROM_1, "vllm_tensor_parallel_size": _FROM_1,
    "max_tool_calling_iterations": _FROM_0, "num_completions_to_print": _FROM_0, "pad_to_multiple_of": _FROM_1,
    "router_aux_loss_coef": _FROM_0, "num_generations": Range(2), "num_generations_eval": _FROM_1,
    "generation_batch_size": _FROM_1,
    "steps_per_generation": _FROM_1, "num_iterations": _FROM_1, "beta": _FROM_0, "epsilon": _FROM_0,
    "epsilon_high": _FROM_0,
    "delta": Range(1, above=True), "sapo_temperature_neg": _ABOVE_0, "sapo_temperature_pos": _ABOVE_0,
    "vespo_k_pos": _FROM_0,
    "vespo_lambda_pos": _FROM_0, "vespo_k_neg": _FROM_0, "vespo_lambda_neg": _FROM_0, "ref_model_mixup_alpha": _SHARE,
    "ref_model_sync_steps": _FROM_1, "top_entropy_quantile": _PART, "entropy_coef": _FROM_0,
    "entropy_coef_min": _FROM_0,
    "entropy_coef_max": _FROM_0, "entropy_coef_delta": _FROM_0, "entropy_target": _FROM_0,
    "vllm_importance_sampling_clip_max": _ABOVE_0, "vllm_importance_sampling_clip_min": _FROM_0,
    "vllm_importance_sampling_cap": _ABOVE_0, "off_policy_mask_threshold": _FROM_0, "reward_weights": _ANY,
    # this package's
    "task_seed": _SEED, "effopd.seed": _SEED,
    "eval_temperature": _FROM_0, "eval_seed": _SEED, "overlong_cache": _BELOW_1, "lambda_extrapolation": _ABOVE_0,
    "horizon_fraction": _PART, "horizon_start": _PART, "horizon_stages": _FROM_1, "horizon_growth": _PART,
    "prune_top_k": _FROM_1, "prune_threshold": _SHARE, "prune_drop": _SHARE, "prune_base_weight": _FROM_0,
    "prune_start_length": _FROM_1, "prune_min_length": _FROM_1, "prune_step": _FROM_1, "prune_margin": _FROM_0,
    "curriculum_stages": _FROM_1, "prune_hit_share": _PART, "prune_patience": _FROM_1,
    "health_tokens": _FROM_0, "horizon_tokens": _FROM_1, "horizon_whole_share": _BELOW_1,
    "updates_per_rollouts": _FROM_1, "num_mini_batches": _FROM_1, "replay_batches": Range(2, also=(0,)),
    "discord_temperature": _ABOVE_0, "lmbda": _SHARE, "teacher_mixed_alpha": _BELOW_1,
    "advantage_clip": _ABOVE_0, "max_drift": Range(0, 1, above=True, below=True),
    # this package's objectives
    "baseline_top_k": _FROM_0, "samples_per_prefix": _FROM_1, "teacher_top_k": Range(2),
    "teacher_server_timeout": _ABOVE_0, "teacher_server_retries": _FROM_0, "teacher_server_concurrency": _FROM_1,
    "highest_entropy_share": _PART, "negative_advantage": _ABOVE_0, "lowest_logp_share": _PART,
    "beta_decay": _FROM_0, "beta_min": _FROM_0,
    "k_step_lookahead": Range(2, also=(0,)), "k_step_lookahead_alpha": _PART,
    "average_decay": _BELOW_1, "average_power": _FROM_0, "average_bias_power": _FROM_0, "average_lag": _FROM_1,
}  # fmt: skip

_DTYPES = ("auto", "bfloat16", "float16", "float32")
#: Field → its valid names. `loss_type` is not included: GRPO and OPD have different choices.
NAMES: dict[str, tuple[str, ...]] = {
    "dtype": _DTYPES,
    "teacher_dtype": _DTYPES,
    "lora_task_type": ("CAUSAL_LM",),
    "bnb_4bit_quant_type": ("fp4", "nf4"),
    "bnb_4bit_quant_storage": ("uint8", "float16", "bfloat16", "float32"),
    "cache_implementation": ALL_CACHE_IMPLEMENTATIONS,
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("auto", "vllm", "transformers"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none"),
}
GRPO_LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")

#: Fields that are JSON objects → an example.
MAPPINGS = {
    "model_init_kwargs": '{"dtype": "bfloat16"}',
    "teacher_model_init_kwargs": '{"dtype": "bfloat16"}',
    "generation_kwargs": '{"suppress_tokens": [0]}',
    "chat_template_kwargs": '{"enable_thinking": false}',
    "optimizer_args": '{"betas": [0.9, 0.95]}',
    "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}',
    "activation_checkpointing_kwargs": '{"use_reentrant": false}',
    "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
    "liger_kernel_config": '{"rope": true}',
    "transformers_continuous_batching_config": '{"use_cuda_graph": false}',
}
#: Fields that are a JSON object or the path of a JSON file.
_FILES = ("accelerator_config", "fsdp_config", "deepspeed")


def check_values(config: Any, prefix: str = "") -> None:
    """Check all numbers against their ranges, names against their lists, and JSON objects' keys.

    Args:
        config: dataclass whose fields are flags. Surrounding whitespace of JSON text is stripped.
        prefix: prefix of its flags, for example "effopd." for `--effopd.seed`.

    Raises:
        ConfigError: the first invalid field.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if not field.init or field.name.startswith("_"):
            continue
        value, kinds, name = getattr(config, field.name), _kinds(hints[field.name]), prefix + field.name
        if value is None or value == field.default:
            if value is None and field.default is not None and kinds <= {bool, int, float}:
                raise ConfigError(f"--{name}: expected {_kind_text(kinds)}, got nothing.")
            continue
        if name in MAPPINGS:
            _check_mapping(config, name, value)
        elif name in _FILES:
            _check_file(name, value)
        elif name in NAMES:
            check_name(name, value, NAMES[name])
        elif list in kinds and float in kinds:
            for one in value if isinstance(value, list | tuple) else [value]:
                _check_number(name, one, False, False)
        elif kinds & {int, float} and bool not in kinds:
            _check_number(name, value, float not in kinds, str in kinds)
        elif kinds <= {bool, types.NoneType} and not isinstance(value, bool):
            raise ConfigError(f"--{name}: expected true or false, got {value!r}.")


def _kinds(hint: Any) -> set[Any]:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if any(part in (list[float], list[int]) for part in parts):
        return {list, float}
    if any(typing.get_origin(part) in (list, tuple) for part in parts):
        return {list}
    return set(parts)


def _kind_text(kinds: Iterable[Any]) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return " or ".join(words[kind] for kind in (bool, int, float, str) if kind in kinds) or "a value"


def _check_number(name: str, value: Any, whole: bool, text_too: bool) -> None:
    allowed = RANGES.get(name, _ANY)
    if text_too and isinstance(value, str):  # pad_to_multiple_of: 'auto', 'none' or a number in a string
        if value.lower() in ("auto", "none", "null"):
            return
        value = int(value) if value.isdecimal() else value
    if whole and isinstance(value, float) and value.is_integer():
        value = int(value)
    fits = value in allowed and not (whole and not isinstance(value, int))
    if whole and fits and allowed.high == math.inf and value > LARGEST:
        raise ConfigError(f"--{name}: expected a whole number of at most {LARGEST}, got {value}.")
    if not fits:
        raise ConfigError(f"--{name}: expected {allowed.text(whole)}, got {value!r}.")


def check_name(name: str, value: Any, names: Iterable[str]) -> None:
    """Check that `value` is one of `names`.

    Raises:
        ConfigError: `value` is not one of `names`.
    """
    if value not in names:
        raise ConfigError(f"--{name}: expected one of {', '.join(names)}; got {value!r}.")


def _object(name: str, value: Any, example: str) -> Mapping[str, Any]:
    """A JSON object as a mapping."""
    mapping = value
    if isinstance(value, str):
        try:
            mapping = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"--{name}: expected a JSON object such as '{example}' (double quotes inside single quotes), got "
                f"{value!r} ({error})."
            ) from error
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"--{name}: expected a JSON object such as '{example}', got {value!r}.")
    return mapping


def _check_mapping(config: Any, name: str, value: Any) -> None:
    mapping = _object(name, value, MAPPINGS[name])
    if isinstance(value, str):
        setattr(config, name, value.strip())  # the host recognizes JSON by its first character
    if name.endswith("init_kwargs"):
        check_init_kwargs(name, mapping)
    elif known := _KEYS.get(name):
        names = known()
        if name == "generation_kwargs" and getattr(config, "use_vllm", False):
            return  # the keys are vLLM's
        for key in mapping:
            if key not in names:
                raise ConfigError(f"--{name}: expected keys among {', '.join(sorted(names))}; got {key!r}.")


def _check_file(name: str, value: Any) -> None:
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        path = Path(value)
        if not path.is_file():
            raise ConfigError(f"--{name}: expected a JSON file or a JSON object, got {value!r}, which is no file.")
        _object(name, path.read_text(), "{}")
    elif isinstance(value, str | Mapping):
        _object(name, value, "{}")


def _checkpoint_keys() -> set[str]:
    """Keyword arguments of torch's `checkpoint`, and those that transformers handles itself."""
    torch_keys = {
        name
        for name, parameter in inspect.signature(checkpoint).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and name != "function"
    }
    return torch_keys | {"preserve_rng_state", "every_n_layers", "offload"}


_KEYS: dict[str, Callable[[], set[str]]] = {
    "generation_kwargs": lambda: {name for name in vars(GenerationConfig()) if not name.startswith("_")},
    "activation_checkpointing_kwargs": _checkpoint_keys,
    "gradient_checkpointing_kwargs": _checkpoint_keys,
    "transformers_continuous_batching_config": lambda: {f.name for f in dataclasses.fields(ContinuousBatchingConfig)},
}
#: Loading arguments that `from_pretrained` accepts without listing them in its signature.
_LOADING = {
    "dtype", "torch_dtype", "device_map", "max_memory", "offload_folder", "offload_buffers", "quantization_config",
    "subfolder",
    "variant", "trust_remote_code", "code_revision", "attn_implementation", "experts_implementation", "use_kernels",
    "kernel_config", "allow_all_kernels", "key_mapping", "tp_plan", "tp_size", "device_mesh", "distributed_config",
    "proxies",
    "local_files_only", "low_cpu_mem_usage",
}  # fmt: skip


def check_init_kwargs(name: str, arguments: Mapping[str, Any], settings: Iterable[str] = ()) -> None:
    """Check the loading arguments for `from_pretrained`.

    Args:
        name: the flag.
        arguments: the loading arguments.
        settings: names of the model's settings, which are also accepted. Empty: the model's
            configuration is not known yet and unknown keys are accepted.

    Raises:
        ConfigError: a dtype or key is unknown, a quantization flag is used, or
            `attn_implementation` is not a name.
    """
    for key in ("dtype", "torch_dtype"):
        if key in arguments and arguments[key] not in _DTYPES:
            raise ConfigError(f'--{name}: expected "{key}" to be one of {", ".join(_DTYPES)}; got {arguments[key]!r}.')
    for key in ("load_in_8bit", "load_in_4bit"):
        if key in arguments:
            way = f"--{key} true (with --use_peft true)" if name == "model_init_kwargs" else (
                f'"quantization_config": {{"quant_method": "bitsandbytes", "{key}": true}}'
            )  # fmt: skip
            raise ConfigError(f"--{name}: transformers no longer accepts {key!r} as a loading argument. Use {way}.")
    known = _LOADING | set(inspect.signature(PreTrainedModel.from_pretrained).parameters) | set(settings)
    for key in arguments:
        if settings and key not in known:
            raise ConfigError(
                f"--{name}: expected loading arguments of from_pretrained or settings of the model's "
                f"configuration, got {key!r}."
            )
    attention = arguments.get("attn_implementation")
    if attention is not None and not isinstance(attention, str | Mapping):
        raise ConfigError(f'--{name}: expected "attn_implementation" to be a name, got {attention!r}.')
