"""Teachers with a logit for each column: a head, logits that exist, or none at all."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from bgkernels.backends.base import Factors, Tile, close
from bgkernels.rows.spec import Cap, RowSpec, cap_of
from bgkernels.rows.state import empty
from bgkernels.rows.stats import Statistics
from bgkernels.streaming import checks
from bgkernels.streaming.heads import LinearHead, Logits, head_demand, make_head
from bgkernels.streaming.kept import Kept
from bgkernels.streaming.planner import Demand, Plan
from bgkernels.streaming.problem import Problem
from bgkernels.streaming.teachers.base import Comparison, Teacher, flat_rows
from bgkernels.streaming.tiles import Tiles

RAW = Cap()


@dataclass(frozen=True, eq=False)
class DenseTeacher(Teacher):
    """One column of logits for each that is compared."""

    dense = True

    @property
    def cap(self) -> Cap:
        """The map from raw to real logits."""
        return RAW

    def specs(self, spec: RowSpec) -> tuple[RowSpec, ...]:
        """One pair."""
        return (spec if spec.teacher == self.cap else replace(spec, teacher=self.cap),)

    def demand(self, problem: Problem) -> Demand:
        """A tile of logits, and states."""
        return head_demand(self.tensors, problem) + state_demand(problem)

    def walk(self, problem: Problem, plan: Plan, kept: Kept) -> Comparison:
        """Tile beside tile."""
        return Dense(make_head(self.tensors, problem), self.cap, problem, plan, kept)


@dataclass(frozen=True, eq=False)
class LinearTeacher(DenseTeacher):
    """A teacher given by its last hidden states and its head; its logits never exist as a whole.

    Args:
        hidden: ``(..., hidden_t)``, the same leading shape as the student's input; any width.
        weight: ``(vocab_t, hidden_t)``.
        bias: ``(vocab_t,)``, or None.
        logit_scale: factor on the logits (Cohere, Granite: its reciprocal).
        logit_softcap: ``cap·tanh(logits / cap)`` after the scale (Gemma 2), or None.

    Example:
        >>> import torch, bgkernels as bg
        >>> teacher = bg.LinearTeacher(torch.randn(5, 12), torch.randn(50, 12))
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    names = ("hidden", "weight", "bias")

    @property
    def vocab(self) -> int:
        """Number of columns."""
        return self.weight.shape[0]

    @property
    def cap(self) -> Cap:
        """The map from raw to real logits."""
        return cap_of(self.logit_scale, self.logit_softcap)

    def check_parameters(self, name: str, *, mixed: bool) -> None:
        """Hidden states, weight and bias fit each other."""
        checks.linear(name, self.hidden, self.weight, self.bias, mixed=mixed)
        checks.cap(f"{name}.", self.logit_scale, self.logit_softcap)

    def flat(self, rows: int, columns: int) -> LinearTeacher:
        """The same teacher with ``hidden (rows, hidden_t)``."""
        hidden = flat_rows(self.hidden, rows)
        return self if hidden is self.hidden else replace(self, hidden=hidden)


@dataclass(frozen=True, eq=False)
class LogitsTeacher(DenseTeacher):
    """A teacher given by its real logits.

    Args:
        logits: ``(..., vocab_t)``, the same leading shape as the student's input.

    Example:
        >>> import torch, bgkernels as bg
        >>> teacher = bg.LogitsTeacher(torch.randn(5, 50))
    """

    logits: Tensor

    names = ("logits",)

    @property
    def vocab(self) -> int:
        """Number of columns."""
        return self.logits.shape[-1]

    def flat(self, rows: int, columns: int) -> LogitsTeacher:
        """The same teacher with ``logits (rows, vocab_t)``."""
        logits = flat_rows(self.logits, rows)
        return self if logits is self.logits else replace(self, logits=logits)


@dataclass(frozen=True, eq=False)
class NoTeacher(DenseTeacher):
    """Stands where a loss reads no teacher."""

    dense = False
    vocab = None

    def flat(self, rows: int, columns: int) -> NoTeacher:
        """Itself."""
        return self

    def demand(self, problem: Problem) -> Demand:
        """States alone."""
        return state_demand(problem)

    def walk(self, problem: Problem, plan: Plan, kept: Kept) -> Comparison:
        """The student's tiles alone."""
        return Dense(None, self.cap, problem, plan, kept)


class Dense:
    """The student's tiles beside those of a head, or alone."""

    def __init__(
        self, head: Logits | None, cap: Cap, problem: Problem, plan: Plan, kept: Kept
    ) -> None:
        self.problem, spec, self.codes = problem, problem.spec, kept.codes
        self.student, self.teacher = kept.student, head
        self.spec = spec if spec.teacher == cap else replace(spec, teacher=cap)
        shard = self.shard = problem.shard
        self.tiles = None
        if head is not None:
            columns = plan.leading_tiles(shard.own(self.spec.compared))
            self.tiles = Tiles(head, plan, columns, problem.labels.device, kept)
        self.first_columns = [shard.first + c.start for c in plan.tiles()]
        self.second_read = self.spec.second_read

    def start(self, rows: slice, labels: Tensor, statistics: Statistics, *, known: bool) -> None:
        """Begin a chunk of rows."""
        self.first_row, self.labels, self.statistics = rows.start, labels, statistics
        self.normalisers: tuple[Tensor, Tensor] | None = None
        if self.tiles is not None:
            self.tiles.start(rows)
        if self.codes is not None:
            self.codes.start(labels)
        if not known:
            self.state = empty(
                labels.size(0), self.spec, dtype=self.problem.dtype, device=labels.device
            )

    def _tile(self, i: int, x: Tensor) -> Tile:
        teacher = None if self.tiles is None else self.tiles[i]
        code = None if self.codes is None else self.codes.code(i, x.shape[1])
        written = self.codes is not None and i in self.codes.written
        factors = None if written else self._factors(i, x.shape[1], teacher)
        return Tile(x, teacher, self.first_row, self.first_columns[i], code, factors)

    def _factors(
        self, i: int, width: int, teacher: Tensor | None
    ) -> tuple[Factors, Factors | None] | None:
        """Those of the ``i``-th tile where primitives multiply it."""
        if self.student is None:
            return None
        first = self.first_columns[i] - self.shard.first
        student = self.student.factors(slice(first, first + width))
        if teacher is None:
            return student, None
        assert isinstance(self.teacher, LinearHead)
        return student, self.teacher.factors(slice(first, first + teacher.shape[1]))

    def absorb(self, i: int, x: Tensor) -> None:
        """Pass 1, whose first read leaves tiles for what comes after it."""
        tile = self._tile(i, x)
        self.problem.backend.absorb_(self.state, tile, self.labels, self.spec, self.normalisers)
        if self.codes is not None and self.normalisers is None:
            self.codes.keep(i)

    def close(self) -> None:
        """Statistics; those of pairs are right after the second read."""
        if self.normalisers is None:
            self.state = self.shard.merged(self.state)
        else:
            self.shard.sum_pairs(self.state)
        close(self.problem.backend, self.state, self.labels, self.statistics)
        self.normalisers = self.statistics["lse_s"], self.statistics["lse_t"]

    def open_vjp(self, grads: Tensor) -> None:
        """Begin pass 2."""
        self.columns = self.statistics["label"]
        self.coefficients = self.problem.backend.fold(
            self.statistics.values[: self.spec.field_count], grads, self.columns, self.spec
        )

    def vjp(self, i: int, x: Tensor, out: Tensor) -> None:
        """Pass 2."""
        self.problem.backend.vjp(out, self._tile(i, x), self.coefficients, self.columns, self.spec)


def state_demand(problem: Problem, states: int = 2) -> Demand:
    """Bytes of the states of a row: of the row, of a merge, and of each rank."""
    numbers = problem.spec.sum_count + 3
    return Demand(row_bytes=8 * numbers * (states + problem.shard.ranks))
