"""What every kind of teacher says of itself, and what a walk does for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from bgkernels.rows.spec import RowSpec
from bgkernels.rows.stats import RowStats, Statistics
from bgkernels.streaming import checks
from bgkernels.streaming.kept import Kept
from bgkernels.streaming.planner import Demand, Plan
from bgkernels.streaming.problem import Problem, Seen

Kind = TypeVar("Kind", bound="Teacher")


class Label(NamedTuple):
    """How labels are given.

    Args:
        word: ``"teacher_argmax"`` or ``"teacher_sample"``, or None for labels of the data.
        valid: ``(...)`` whether a token takes part, or None where all do.
    """

    word: str | None
    valid: Tensor | None


@dataclass(frozen=True, eq=False)
class Teacher(ABC):
    """Where soft labels come from: plain tensors, with leading shape ``(...)`` or ``(rows,)``.

    Attributes:
        names: of its tensors.
        dense: whether it has a logit for each column; then ranks may share its columns out.
        compiles: whether ``torch.compile`` carries it.
        excludes_columns: whether it rules out columns that the student may choose.
        weighs_statistics: whether a function of statistics says how much its members count.
        memory: rows of :class:`Statistics` in which its walk remembers things for pass 2.
    """

    names: ClassVar[tuple[str, ...]] = ()
    dense: ClassVar[bool] = False
    compiles: ClassVar[bool] = True
    excludes_columns = False
    weighs_statistics = False
    memory = 0

    @property
    @abstractmethod
    def vocab(self) -> int | None:
        """Number of columns; None: as many as the student."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Its tensors, in the order of ``names``."""
        return tuple(getattr(self, name) for name in self.names)

    @property
    def parts(self) -> tuple[Teacher, ...]:
        """The teachers with which the student is compared, one after the other."""
        return (self,)

    @property
    def members(self) -> tuple[Teacher, ...]:
        """The teachers that a mixture is made of, or itself."""
        return (self,)

    def check(
        self, reference: Tensor, leading: tuple[int, ...], *, mixed: bool, name: str = "teacher"
    ) -> None:
        """Its tensors fit ``leading``, live where ``reference`` does, and want no gradient."""
        tensors = {
            f"{name}.{n}": x for n, x in zip(self.names, self.tensors, strict=True) if x is not None
        }
        for n, x in tensors.items():
            checks.tensor(n, x, floating=not n.endswith(".indices"))
            if x.requires_grad:
                raise ValueError(
                    f"`{n}` requires grad, but a teacher gets none; "
                    f"pass `{n.rpartition('.')[2]}.detach()`"
                )
        checks.same_device(reference, **tensors)
        self.check_parameters(name, mixed=mixed)
        first_name, first = next(iter(tensors.items()))
        if tuple(first.shape[:-1]) != leading:
            raise ValueError(
                f"`{first_name}` must have the input's leading shape {leading}; "
                f"got {tuple(first.shape)}"
            )

    def check_parameters(self, name: str, *, mixed: bool) -> None:
        """What is not a tensor, and how tensors fit each other."""
        return

    def check_comparison(self, compared: int, temperature: float, label: Label) -> None:
        """It can be compared on so many columns, at that temperature, and give that label."""
        return

    def choose(self, word: str, seed: int) -> Tensor | None:
        """The label ``(...)`` that it gives without a walk; None where pass 1 chooses it."""
        return None

    @abstractmethod
    def flat(self: Kind, rows: int) -> Kind:
        """The same teacher with its leading dimensions flattened to ``rows``."""

    def specs(self, spec: RowSpec) -> tuple[RowSpec, ...]:
        """Of each pair of distributions whose statistics it gives, from that of the call."""
        return (spec,)

    def seen(self, statistics: Statistics, problem: Problem, rows: Sequence[Tensor] | None) -> Seen:
        """What policies and divergences see of it: see :meth:`Statistics.row_stats`."""
        stats = statistics.row_stats(problem.ignore_index, rows)
        return stats, stats

    def part_weights(self, stats: list[RowStats], rows: slice) -> Tensor | None:
        """How much each of its parts counts in some rows, ``(rows, parts)``; None for a single one.

        Args:
            stats: of these rows, as policies see each part.
            rows: which of all rows they are.
        """
        return None

    @abstractmethod
    def demand(self, problem: Problem) -> Demand:
        """Bytes that its walk takes, for the planner."""

    @abstractmethod
    def walk(self, problem: Problem, plan: Plan, kept: Kept) -> Comparison:
        """What the two passes do for it."""


class Comparison(Protocol):
    """A teacher in the driver's walks. ``x`` is the student's ``i``-th tile, raw."""

    second_read: bool
    """Whether pass 1 walks twice."""

    def start(self, rows: slice, labels: Tensor, statistics: Statistics, *, known: bool) -> None:
        """Begin a chunk of rows, whose ``statistics`` are known, or will be written."""

    def absorb(self, i: int, x: Tensor) -> None:
        """Pass 1, in its second read after :meth:`close`."""

    def close(self) -> None:
        """End a read of pass 1: write the statistics."""

    def open_vjp(self, grads: Tensor) -> None:
        """Begin pass 2, with the derivatives ``(fields, rows)`` by the statistics."""

    def vjp(self, i: int, x: Tensor, out: Tensor) -> None:
        """Pass 2: write the gradient of the tile to ``out``, which may be ``x``."""


def flat_rows(x: Tensor, rows: int) -> Tensor:
    """Leading dimensions flattened; the last kept at stride 1."""
    x = x if x.ndim == 2 else x.reshape(rows, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_tile(plan: Plan, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for the widest tile."""
    return torch.empty(plan.chunk * plan.width, dtype=dtype, device=device)
