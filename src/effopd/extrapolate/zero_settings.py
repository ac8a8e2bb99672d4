"""DeepSpeed settings with which the look-ahead cannot move weights, refused before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effopd.errors import ConfigError

#: Optimizers of a DeepSpeed config whose moments can be reset.
_OPTIMIZERS = ("adam", "adamw")
#: Path of a setting → (values that change nothing, reason and fix).
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "zero_optimization.offload_optimizer.device": (
        ("none",),
        "the master weights are not in the accelerator's memory. Leave it out; ZeRO-3 on more processes also saves "
        "memory.",
    ),
    "zero_optimization.offload_param.device": (
        ("none",),
        "the weights are not in the accelerator's memory. Leave it out; ZeRO-3 on more processes also saves memory.",
    ),
    "zero_optimization.cpu_offload": ((False,), "the master weights are in host memory. Leave it out."),
    "zero_optimization.cpu_offload_param": ((False,), "the weights are in host memory. Leave it out."),
    "zero_optimization.zenflow": ((), "the optimizer steps parts of the weights at other times. Leave it out."),
    "zero_optimization.zero_hpz_partition_size": (
        (0, 1), "hpZ keeps a second copy of the shards, which a jump does not reach. Leave it out."
    ),
    "zero_optimization.mics_shard_size": (
        (0, -1), "MiCS shards over some of the processes only. Leave it out."
    ),
    "zero_optimization.zero_quantized_weights": (
        (False,), "the shards of the model are quantized, and a jump cannot write them. Leave it out."
    ),
    "zero_optimization.zero_quantized_nontrainable_weights": (
        (False,), "the shards of the model are quantized, and a jump cannot write them. Leave it out."
    ),
    "zero_optimization.elastic_checkpoint": (
        (False,), "the optimizer's state is saved in another form. Leave it out."
    ),
    "fp16.fp16_master_weights_and_grads": (
        (False,), "there are no float32 master weights, and rounding loses most of an update. Leave it out."
    ),
    "bf16.bf16_master_weights_and_grads": (
        (False,), "there are no float32 master weights, and rounding loses most of an update. Leave it out."
    ),
    "bf16.bf16_optimizer_states": ((False,), "Adam's moments are not float32. Leave it out."),
    "scheduler": (
        (), "the look-ahead needs the schedule of the trainer. Leave it out, and set --lr_scheduler_type and "
        "--warmup_steps."
    ),
    "tensor_parallel.autotp_size": ((0, 1), "tensor parallelism splits matrices between processes. Leave it out."),
    "sequence_parallel_size": ((0, 1), "sequence parallelism splits answers between processes. Leave it out."),
    "pipeline": ((), "pipeline parallelism splits the model between processes. Leave it out."),
    "hybrid_engine.enabled": ((False,), "the hybrid engine holds other copies of the weights. Leave it out."),
    "compression_training": ((), "compression changes the weights between steps. Leave it out."),
    "amp.enabled": ((False,), "Apex holds the master weights. Use bf16."),
}  # fmt: skip


def deepspeed_config(args: Any) -> Mapping[str, Any] | None:
    """The DeepSpeed config of a run, given by `--deepspeed` or accelerate; `None`: none."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return None if plugin is None else plugin.hf_ds_config.config


def check_zero(config: Mapping[str, Any]) -> None:
    """Check that the look-ahead can move the weights under a DeepSpeed config.

    Args:
        config: the config's JSON; the value "auto" counts as unset.

    Raises:
        ConfigError: the ZeRO stage is not 1, 2 or 3; ZeRO-3 saves no whole model; or a setting or
            optimizer is not supported.
    """
    stage = _value(config, "zero_optimization.stage")
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"DeepSpeed's zero_optimization.stage={stage}: expected 1, 2 or 3. Without ZeRO, launch with DDP "
            "(accelerate launch --multi_gpu)."
        )
    for path, (harmless, why) in _REFUSED.items():
        value = _value(config, path)
        if value is not None and value not in harmless:
            raise ConfigError(f"DeepSpeed's {path}={value!r} cannot be combined with a look-ahead: {why}")
    kind = _value(config, "optimizer.type")
    if kind is not None and str(kind).lower() not in _OPTIMIZERS:
        raise ConfigError(
            f"DeepSpeed's optimizer.type={kind!r} cannot be combined with a look-ahead: expected Adam or AdamW. Leave "
            "out the section, and set --optim adamw_torch."
        )
    if stage == 3 and _value(config, "zero_optimization.stage3_gather_16bit_weights_on_model_save") is not True:
        raise ConfigError(
            "DeepSpeed's zero_optimization.stage3_gather_16bit_weights_on_model_save: expected true, because the "
            "trajectory and the final model need whole weights. Set it to true."
        )


def check_zero_optimizer(optim: str, config: Mapping[str, Any]) -> None:
    """Check `--optim` under DeepSpeed, unless the config chooses the optimizer.

    Raises:
        ConfigError: it is not PyTorch's AdamW.
    """
    if "optimizer" not in config and optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ConfigError(
            f"optim={optim!r}: the look-ahead under DeepSpeed needs Adam or AdamW, whose moments it can reset. Use "
            "--optim adamw_torch."
        )


def _value(config: Mapping[str, Any], path: str) -> Any:
    """Value at a dotted path; `None`: unset, or "auto"."""
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return None if value == "auto" else value
