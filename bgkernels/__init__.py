"""Hybrid distillation losses from hidden states, never holding ``[tokens, vocab]``.

Hard and soft labels are mixed per token, as the teacher's distribution of the token suggests.
The public names are below; ``bgkernels.divergences`` and ``bgkernels.routing`` hold the registries.
"""

from importlib import import_module
from types import ModuleType

from bgkernels import distributed, divergences, routing
from bgkernels.backends import show_config
from bgkernels.functional import (
    hybrid_distillation,
    linear_hybrid_distillation,
    linear_row_stats,
    plan,
)
from bgkernels.loss.capture import SoftLabels, capture
from bgkernels.loss.forecast import StepPlan
from bgkernels.modules import HybridDistillationLoss, LinearHybridDistillationLoss
from bgkernels.rows.extras import Mixture, Tempered, Tilt, TotalVariation
from bgkernels.rows.stats import RowStats
from bgkernels.streaming.memory import empty_cache
from bgkernels.teachers import (
    LinearTeacher,
    LogitsTeacher,
    MatchedTeacher,
    MixtureTeacher,
    TopKTeacher,
)

__version__ = "0.2.0"

__all__ = [
    "HybridDistillationLoss",
    "LinearHybridDistillationLoss",
    "LinearTeacher",
    "LogitsTeacher",
    "MatchedTeacher",
    "Mixture",
    "MixtureTeacher",
    "RowStats",
    "SoftLabels",
    "StepPlan",
    "Tempered",
    "Tilt",
    "TopKTeacher",
    "TotalVariation",
    "capture",
    "distributed",
    "divergences",
    "empty_cache",
    "hybrid_distillation",
    "linear_hybrid_distillation",
    "linear_row_stats",
    "plan",
    "routing",
    "show_config",
    "vocabularies",
]


def __getattr__(name: str) -> ModuleType:
    """Import ``bgkernels.vocabularies`` at its first use: few calls need it."""
    if name == "vocabularies":
        return import_module("bgkernels.vocabularies")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
