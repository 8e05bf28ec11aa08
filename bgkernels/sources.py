"""Teachers without their tensors: what a call is told of them, and what is seen of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from bgkernels.spec import Cap, RowSpec
from bgkernels.stats import Final, RowStats


class View(NamedTuple):
    """What is seen of one teacher, a number a row.

    Args:
        routing: by policies and by the caller.
        divergence: by divergences.
    """

    routing: RowStats
    divergence: RowStats


@dataclass(frozen=True)
class Source:
    """A dense teacher: one column of logits for each that is compared.

    Args:
        count: number of its tensors: ``(hidden, weight, bias | None)``, ``(logits,)``, or none.
        cap: the map from raw to real logits.
    """

    count: int = 0
    cap: Cap = Cap()

    @property
    def memory(self) -> int:
        """Tensors that pass 2 needs beside the statistics."""
        return 0

    def specs(self, spec: RowSpec) -> tuple[RowSpec, ...]:
        """Of each :class:`~bgkernels.stats.Final` that the teacher gives."""
        return (replace(spec, teacher=self.cap),)

    def view(self, finals: tuple[Final, ...]) -> View:
        """What is seen of the teacher."""
        return View(finals[0].stats, finals[0].stats)
