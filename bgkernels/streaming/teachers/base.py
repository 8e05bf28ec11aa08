"""Every kind of teacher extends the class here, and walks by the protocol here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from bgkernels.rows.spec import RowSpec
from bgkernels.rows.stats import RowStats, Statistics
from bgkernels.streaming import checks
from bgkernels.streaming.kept import Kept
from bgkernels.streaming.planner import Demand, Plan
from bgkernels.streaming.problem import Problem, Seen


class Label(NamedTuple):
    """A label is a word or comes with the data.

    Args:
        word: ``"teacher_argmax"`` or ``"teacher_sample"``, or None for labels of the data.
        valid: ``(...)`` whether a token takes part, or None where all do.
    """

    word: str | None
    valid: Tensor | None


@dataclass(frozen=True, eq=False)
class Teacher(ABC):
    """A teacher gives soft labels from plain tensors, ``(..., n)`` or ``(rows, n)``.

    Attributes:
        names: of its tensors.
        dense: whether it has a logit for each column; then ranks may share its columns out.
        compiles: whether ``torch.compile`` carries it.
        shards: whether ranks may share the student's columns out (``vocab_group``).
        excludes_columns: whether it rules out columns that the student may choose.
        weighs_statistics: whether a function of the statistics weighs its members.
        memory: rows of :class:`Statistics` in which its walk remembers things for pass 2.
    """

    names: ClassVar[tuple[str, ...]] = ()
    dense: ClassVar[bool] = False
    shards = True
    compiles = True
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
        """The teachers with which the student is compared, each for itself."""
        return (self,)

    @property
    def members(self) -> tuple[Teacher, ...]:
        """The teachers that it mixes, or itself."""
        return (self,)

    @property
    def heads(self) -> tuple[Teacher, ...]:
        """The teachers among them that have a logit for each column of theirs."""
        return tuple(member for member in self.members if member.dense)

    def check(
        self, reference: Tensor, leading: tuple[int, ...], *, mixed: bool, name: str = "teacher"
    ) -> None:
        """Check that its tensors fit ``leading``, lie with ``reference``, and need no gradient."""
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
        """Check what is not a tensor, and that tensors fit each other."""
        return

    def check_comparison(self, compared: int, temperature: float, label: Label) -> None:
        """Check that it fits a number of compared columns, a temperature and a label."""
        return

    def choose(self, word: str, seed: int) -> Tensor | None:
        """Return the labels ``(...)`` that it gives without a walk; None: pass 1 chooses them."""
        return None

    @abstractmethod
    def flat(self, rows: int, columns: int) -> Teacher:
        """Return the same teacher, its leading dimensions flattened to the student's ``rows``.

        Args:
            rows: number of tokens.
            columns: of the student.
        """

    def specs(self, spec: RowSpec) -> tuple[RowSpec, ...]:
        """Return a specification for each pair of distributions it compares, from the call's."""
        return (spec,)

    def seen(self, statistics: Statistics, problem: Problem, rows: Sequence[Tensor] | None) -> Seen:
        """Return what policies and divergences see of it: see :meth:`Statistics.row_stats`."""
        stats = statistics.row_stats(problem.ignore_index, rows)
        return stats, stats

    def part_weights(self, stats: list[RowStats], rows: slice) -> Tensor | None:
        """Return the weights of its parts in some rows, ``(rows, parts)``; None for a single part.

        Args:
            stats: of these rows, as policies see each part.
            rows: which of all rows they are.
        """
        return None

    @abstractmethod
    def demand(self, problem: Problem) -> Demand:
        """Return the bytes that its walk takes, for the planner."""

    @abstractmethod
    def walk(self, problem: Problem, plan: Plan, kept: Kept) -> Comparison:
        """Return what the two passes call for it."""


class Comparison(Protocol):
    """It compares a teacher with the student's tiles, which the driver hands it one by one.

    Attributes:
        second_read: whether it wants to see every tile twice in pass 1.
    """

    second_read: bool

    def start(self, rows: slice, labels: Tensor, statistics: Statistics, *, known: bool) -> None:
        """Begin a chunk of rows, whose ``statistics`` are there already if ``known``."""

    def absorb(self, i: int, x: Tensor) -> None:
        """Take the student's raw ``i``-th tile: pass 1, and after :meth:`close` its second read."""

    def close(self) -> None:
        """End a read of pass 1, and write the statistics."""

    def open_vjp(self, grads: Tensor) -> None:
        """Begin pass 2, from the derivatives ``(fields, rows)`` by the statistics."""

    def vjp(self, i: int, x: Tensor, out: Tensor) -> None:
        """Write the gradient of the ``i``-th tile to ``out``, which may be ``x``: pass 2."""


def flat_rows(x: Tensor, rows: int) -> Tensor:
    """Flatten the leading dimensions, and give the last one stride 1."""
    x = x if x.ndim == 2 else x.reshape(rows, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_tile(plan: Plan, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate memory for the widest tile."""
    return torch.empty(plan.chunk * plan.width, dtype=dtype, device=device)
