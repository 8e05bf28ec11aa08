"""The options of a loss are one list of names, defaults and checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.distributed import ProcessGroup

from bgkernels.loss.objective import Divergence, Policy, Weights
from bgkernels.rows.caching import lazy, remembered
from bgkernels.rows.spec import Cap, cap_of
from bgkernels.streaming import checks

Routing = str | Policy | Weights


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options are everything about a loss except its tensors.

    Their meaning is that of the arguments of ``linear_hybrid_distillation``.

    Raises:
        TypeError, ValueError: an option has the wrong type or range; the message names it.
    """

    divergence: str | Divergence = "forward_kl"
    routing: Routing = "entropy"
    temperature: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    vocab_size: int | None = None
    vocab_group: ProcessGroup | None = None
    memory_budget: int | None = None
    mode: str = "auto"
    backend: str = "auto"
    seed: int | None = None

    def __post_init__(self) -> None:
        checks.number("temperature", self.temperature, low=0, open_low=True)
        checks.number("label_smoothing", self.label_smoothing, low=0, high=1)
        checks.number("z_loss", self.z_loss, low=0)
        checks.cap("", self.logit_scale, self.logit_softcap)
        checks.choice("reduction", self.reduction, ("mean", "sum", "none"))
        checks.choice("mode", self.mode, ("auto", "fused", "recompute"))
        checks.integer("ignore_index", self.ignore_index)
        for name in ("vocab_size", "memory_budget"):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), low=1)
        checks.process_group("vocab_group", self.vocab_group)
        if self.seed is not None:
            checks.integer("seed", self.seed)

    @classmethod
    def of(cls, **options: Any) -> Options:
        """Make options, which are checked once where they are plain numbers and words."""
        named = isinstance(options.get("divergence", ""), str)
        named &= isinstance(options.get("routing", ""), str)
        if named and options.get("vocab_group") is None:  # a cache would keep them alive
            return _named(**options)
        return cls(**options)

    @lazy
    def cap(self) -> Cap:
        """The map from the student's raw to its real logits."""
        return cap_of(self.logit_scale, self.logit_softcap)


@remembered
def _named(**options: Any) -> Options:
    """Make options of plain numbers and words, which are checked once."""
    return Options(**options)
