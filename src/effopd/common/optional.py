"""Checks for optional packages, with the `pip install` line for each missing one."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from effopd.errors import MissingDependencyError

#: Importable module → (feature that needs it, package to install).
_NEEDS = {
    "matplotlib": ("drawing figures", "effopd[plots]"),
    "math_verify": ("verifying math answers", "math-verify"),
    "reasoning_gym": ("reasoning-gym tasks", "effopd[gym]"),
    "gguf": ("reading GGUF files", "effopd[gguf]"),
    "peft": ("--use_peft", "effopd[peft]"),
    "bitsandbytes": ("--load_in_4bit or _8bit, --teacher_load_in_… or this --optim", "effopd[quantization]"),
    "vllm": ("--use_vllm", "effopd[vllm]"),
    "liger_kernel": ("--use_liger_kernel", "liger-kernel"),
    "torchao": ("--optim adamw_torch_4bit or adamw_torch_8bit", "torchao"),
    "torch_xla": ("--optim adamw_torch_xla", "torch_xla"),
    "torch_npu": ("--optim adamw_torch_npu_fused", "torch-npu"),
    "torchdistx": ("--optim adamw_anyprecision", "torchdistx"),
    "galore_torch": ("--optim galore_…", "galore-torch"),
    "apollo_torch": ("--optim apollo_…", "apollo-torch"),
    "lomo_optim": ("--optim lomo or adalomo", "lomo-optim"),
    "grokadamw": ("--optim grokadamw", "grokadamw"),
    "schedulefree": ("--optim schedule_free_… or --optimizer_class schedulefree:…", "schedulefree"),
    "prodigyopt": ("--optimizer_class prodigyopt:…", "prodigyopt"),
    "dadaptation": ("--optimizer_class dadaptation:…", "dadaptation"),
    "dog": ("--optimizer_class dog:…", "dog-optimizer"),
    "optimi": ("--optim stable_adamw", "torch-optimi"),
    "deepspeed": ("--deepspeed", "deepspeed"),
    "clearml": ("--report_to clearml", "clearml"),
    "codecarbon": ("--report_to codecarbon", "codecarbon"),
    "comet_ml": ("--report_to comet_ml", "comet-ml"),
    "dvclive": ("--report_to dvclive", "dvclive"),
    "mlflow": ("--report_to mlflow", "mlflow"),
    "neptune": ("--report_to neptune", "neptune"),
    "swanlab": ("--report_to swanlab", "swanlab"),
    "tensorboard": ("--report_to tensorboard", "tensorboard"),
    "trackio": ("--report_to trackio", "trackio"),
    "wandb": ("--report_to wandb", "wandb"),
}
#: Values of `--report_to` that equal the name of their package.
TRACKERS = frozenset(name for name, (purpose, _) in _NEEDS.items() if purpose == f"--report_to {name}")


def is_available(module: str) -> bool:
    """Whether `module` is installed. It is not imported."""
    return importlib.util.find_spec(module) is not None


def require(module: str) -> ModuleType:
    """Import and return an optional module.

    Raises:
        MissingDependencyError: the module cannot be imported. The message gives the `pip install`
            line.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing(module, f"could not be imported ({error})") from error


def ensure(module: str) -> None:
    """Check that `module` is installed, without importing it.

    Raises:
        MissingDependencyError: the module is not installed.
    """
    if not is_available(module):
        raise missing(module, "is not installed")


def missing(module: str, how: str, *, purpose: str | None = None) -> MissingDependencyError:
    """The error for a missing package.

    Args:
        how: what is wrong, for example "is not installed".
        purpose: feature that needs a module of the user; its package is assumed to have its name.
    """
    name = module.partition(".")[0]
    feature, package = _NEEDS.get(name, (purpose or name, name.replace("_", "-")))
    return MissingDependencyError(
        f"{purpose or feature} needs the package '{name}', which {how}. Install it with: pip install '{package}'"
    )
