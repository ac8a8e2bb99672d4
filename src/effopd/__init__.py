"""On-policy distillation with look-ahead along the weight update, and tools to analyze updates.

`import effopd` is light: each public name is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "OPDConfig": "effopd.distill.config",
    "OPDTrainer": "effopd.distill.trainer",
    "EffOPDConfig": "effopd.extrapolate.config",
    "EffOPDCallback": "effopd.distill.callback",
    "EffOPD": "effopd.extrapolate.effopd",
    "AccuracyScorer": "effopd.extrapolate.scorers.accuracy",
    "Score": "effopd.extrapolate.search",
    "Task": "effopd.tasks.base",
    "Example": "effopd.tasks.base",
    "TaskConfig": "effopd.tasks",
    "load_task": "effopd.tasks",
    "evaluate": "effopd.tasks.evaluate",
    "Sampling": "effopd.tasks.sampling",
    "analyze": "effopd.analysis.analyze",
}

if TYPE_CHECKING:
    from effopd.analysis.analyze import analyze as analyze
    from effopd.distill.callback import EffOPDCallback as EffOPDCallback
    from effopd.distill.config import OPDConfig as OPDConfig
    from effopd.distill.trainer import OPDTrainer as OPDTrainer
    from effopd.extrapolate.config import EffOPDConfig as EffOPDConfig
    from effopd.extrapolate.effopd import EffOPD as EffOPD
    from effopd.extrapolate.scorers.accuracy import AccuracyScorer as AccuracyScorer
    from effopd.extrapolate.search import Score as Score
    from effopd.tasks import TaskConfig as TaskConfig
    from effopd.tasks import load_task as load_task
    from effopd.tasks.base import Example as Example
    from effopd.tasks.base import Task as Task
    from effopd.tasks.evaluate import evaluate as evaluate
    from effopd.tasks.sampling import Sampling as Sampling

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'effopd' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
