"""A mixture of teachers is a weighted sum of losses, or one teacher ``log Σ λ_i·p_i``.

A tile of a mixed distribution needs every teacher's normaliser, so each chunk of rows begins with a
walk over the teachers alone. It also gives the statistics on which weights may depend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from bgkernels.backends.base import Tile, close
from bgkernels.backends.eager import real_logits_
from bgkernels.rows.arithmetic import NEG_INF
from bgkernels.rows.extras import Tilt
from bgkernels.rows.spec import Cap, RowSpec
from bgkernels.rows.state import empty
from bgkernels.rows.stats import AT_ONE, RowStats, Statistics
from bgkernels.streaming import checks, gemm
from bgkernels.streaming.heads import Logits, head_demand, make_head
from bgkernels.streaming.kept import Kept
from bgkernels.streaming.planner import Demand, Plan
from bgkernels.streaming.problem import Problem
from bgkernels.streaming.teachers.base import Comparison, Label, Teacher, empty_tile
from bgkernels.streaming.teachers.dense import Dense, DenseTeacher, state_demand

ROUNDING = 1e-3
"""By how much the weights of a distribution may miss the sum 1."""
Weigh = Callable[[list[RowStats]], Tensor]
"""From the statistics of each teacher to weights ``(rows, teachers)``."""


@dataclass(frozen=True, eq=False)
class MixtureTeacher(Teacher):
    """A mixture has several teachers, each with a weight per token.

    * ``kind="sum"``: the loss is ``Σ λ_i·L_i``, where ``L_i`` is the loss with teacher i. The
      cross-entropy is computed once; its weight is the mean, weighted by λ, of the hard weights
      that routing gives for each teacher. Each teacher's soft label has the weight that routing
      gives for that teacher. Returned statistics are means weighted by λ too; those that are not
      numbers (such as labels) are the first teacher's.
    * ``kind="distribution"``: there is one teacher, whose probabilities at the loss's temperature
      are ``Σ λ_i·p_i``. Each step takes one more walk over the teachers' heads.

    All are compared on the columns that the student and every teacher have.

    Args:
        teachers: two or more; top-k teachers in a sum only.
        weights: λ, not negative; for a distribution, their sum must be 1. Either a number for each
            teacher, a tensor ``(..., teachers)``, or a function of the list of the teachers'
            ``RowStats`` that returns ``(tokens, teachers)``. The function sees some tokens at a
            time, and must treat each token by itself; in a distribution it may read only fields of
            the teacher, such as ``entropy_t``.
        kind: ``"sum"`` or ``"distribution"``.

    Example:
        >>> import torch, bgkernels as bg
        >>> pair = [bg.LogitsTeacher(torch.randn(5, 50)) for _ in range(2)]
        >>> teacher = bg.MixtureTeacher(pair, (0.7, 0.3), kind="distribution")
        >>> def surer(stats):
        ...     return torch.softmax(-torch.stack([s.entropy_t for s in stats], -1), -1)
        >>> teacher = bg.MixtureTeacher(pair, surer)
    """

    teachers: Sequence[Teacher]
    weights: Sequence[float] | Tensor | Weigh
    kind: str = "sum"

    @property
    def compiles(self) -> bool:  # type: ignore[override]
        weighed_inside = callable(self.weights) and self.kind == "distribution"
        return not weighed_inside and all(t.compiles for t in self.teachers)

    @property
    def vocab(self) -> int | None:
        return min((t.vocab for t in self.teachers if t.vocab is not None), default=None)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(chain.from_iterable(t.tensors for t in self.teachers))

    @property
    def parts(self) -> tuple[Teacher, ...]:
        return tuple(self.teachers) if self.kind == "sum" else (self,)

    @property
    def members(self) -> tuple[Teacher, ...]:
        return tuple(self.teachers)

    @property
    def shards(self) -> bool:  # type: ignore[override]
        return all(t.shards for t in self.teachers)

    @property
    def heads(self) -> tuple[Teacher, ...]:
        return tuple(chain.from_iterable(t.heads for t in self.teachers))

    @property
    def excludes_columns(self) -> bool:  # type: ignore[override]
        return any(t.excludes_columns for t in self.teachers)

    @property
    def weighs_statistics(self) -> bool:  # type: ignore[override]
        return callable(self.weights)

    @property
    def memory(self) -> int:  # type: ignore[override]
        return len(self.teachers)  # a number for each, by which tiles are mixed

    def check(
        self, reference: Tensor, leading: tuple[int, ...], *, mixed: bool, name: str = "teacher"
    ) -> None:
        checks.choice("teacher.kind", self.kind, ("sum", "distribution"))
        if not self.teachers:
            raise ValueError("`teacher.teachers` must hold a teacher at least; got none")
        for i, member in enumerate(self.teachers):
            name = f"teacher.teachers[{i}]"
            if isinstance(member, MixtureTeacher):
                raise TypeError(f"`{name}` must not be a MixtureTeacher; give its teachers instead")
            checks.instance(name, member, Teacher)
            if not member.dense and self.kind == "distribution":
                raise NotImplementedError(
                    f"`{name}` is a {type(member).__name__}, whose tail has no columns to mix; "
                    "use kind='sum'"
                )
            member.check(reference, leading, mixed=mixed, name=name)
        if not callable(self.weights):
            self._check_weights(reference, leading)

    def _check_weights(self, reference: Tensor, leading: tuple[int, ...]) -> None:
        weights, count, name = self.weights, len(self.teachers), "teacher.weights"
        normalised, worst = self.kind == "distribution", []
        if isinstance(weights, Tensor):
            values = checks.tensor(name, weights).detach()
            checks.shape(name, values, (*leading, count), "(..., teachers)")
            checks.same_device(reference, **{name: values})
            if checks.legible(values):
                wrong = values[wrong_weights(values.double(), normalised=normalised)]
                worst = wrong.flatten().tolist()
        elif isinstance(weights, Sequence) and len(weights) == count:
            numbers = [checks.number(name, w, low=0) for w in weights]
            worst = numbers if normalised and abs(sum(numbers) - 1) > ROUNDING else []
        else:
            raise ValueError(
                f"`{name}` must be {count} numbers, a tensor or a function; got {weights}"
            )
        if worst:
            rule = " and add up to 1 for kind='distribution'" if normalised else ""
            raise ValueError(f"`{name}` must be finite, not negative{rule}; got {worst}")

    def check_comparison(self, compared: int, temperature: float, label: Label) -> None:
        for member in self.teachers:
            member.check_comparison(compared, temperature, Label(None, label.valid))
        if label.word is not None and self.kind == "sum":
            raise ValueError(
                f"`target` cannot be {label.word!r} for a MixtureTeacher with kind='sum', which is "
                "no distribution; use kind='distribution', or pass labels"
            )
        if label.word == "teacher_sample" and temperature != 1:
            raise ValueError(
                "`target` cannot be 'teacher_sample' for a MixtureTeacher at another temperature "
                f"than 1, since it mixes there; got temperature={temperature}: pass labels"
            )

    def flat(self, rows: int, columns: int) -> MixtureTeacher:
        weights, count = self.weights, len(self.teachers)
        if isinstance(weights, Tensor):
            weights = weights.detach().reshape(rows, count).double()
        elif not callable(weights):
            device = next(x.device for x in self.tensors if x is not None)
            # A list would be copied to the device, and waited for.
            filled = [torch.full((rows,), w, dtype=torch.float64, device=device) for w in weights]
            weights = torch.stack(filled, 1)
        return replace(
            self, teachers=[t.flat(rows, columns) for t in self.teachers], weights=weights
        )

    def weigh(self, stats: list[RowStats], rows: slice) -> Tensor:
        """Return the weights ``(rows, teachers)`` of some rows, whose statistics are ``stats``."""
        if isinstance(self.weights, Tensor):
            return self.weights[rows]
        assert callable(self.weights)
        return weights_of(self.weights, stats, normalised=self.kind == "distribution")

    def part_weights(self, stats: list[RowStats], rows: slice) -> Tensor | None:
        return self.weigh(stats, rows) if self.kind == "sum" else None

    def specs(self, spec: RowSpec) -> tuple[RowSpec, ...]:
        return (replace(spec, teacher=Cap()),)  # its tiles are real logits

    def demand(self, problem: Problem) -> Demand:
        # A mixed tile, a tile of each teacher, and their states.
        size = problem.dtype.itemsize
        total = Demand(logit_bytes=size, tile_bytes=size)
        for member in self.teachers:
            tile = head_demand(member.tensors, problem)
            total += replace(tile, logit_bytes=0, tile_bytes=tile.logit_bytes)
        return total + state_demand(problem, 2 + len(self.teachers))

    def walk(self, problem: Problem, plan: Plan, kept: Kept) -> Comparison:
        return Mixed(MixtureHead(self, problem, plan), Cap(), problem, plan, kept)


class MixtureHead(Logits):
    """It gives tiles of the real logits ``T·log Σ λ_i·p_i``, from the heads of all teachers."""

    def __init__(self, teacher: MixtureTeacher, problem: Problem, plan: Plan) -> None:
        self.teacher, self.problem, self.plan = teacher, problem, plan
        self.dtype, device = problem.dtype, problem.labels.device
        self.heads = [make_head(t.tensors, problem) for t in teacher.teachers]
        self.caps = [t.cap if isinstance(t, DenseTeacher) else Cap() for t in teacher.teachers]
        self.raw = {h.dtype: empty_tile(plan, h.dtype, device) for h in self.heads}
        self.scratch = empty_tile(plan, self.dtype, device)

    def start(self, rows: slice) -> None:
        self.chunk, self.offsets = rows, torch.empty(0)
        for head in self.heads:
            head.start(rows)

    def weigh(self, labels: Tensor) -> Tensor:
        """Return ``log λ_i - lse_i`` of each teacher, ``(rows, teachers)``, which mixes tiles."""
        stats = [self._statistics(i, labels) for i in range(len(self.heads))]
        temperature = self.problem.spec.temperature
        at_one = [s.at_one(temperature, ()) if AT_ONE in s.extras else s for s in stats]
        weights = self.teacher.weigh(at_one, self.chunk)
        lse = torch.stack([s.lse_t for s in stats], 1)
        return weights.to(lse).log() - lse

    def _statistics(self, i: int, labels: Tensor) -> RowStats:
        """Walk over one teacher, which is on both sides of the pair; return its statistics."""
        problem, cap, compared = self.problem, self.caps[i], self.problem.spec.compared
        single = (e for e in problem.spec.extras if not e.second_read)
        extras = tuple(e for e in single if not isinstance(e, Tilt) or e.a == 0)
        spec = replace(problem.spec, columns=compared, logit_sum=False, extras=extras)
        spec = replace(spec, student=cap, teacher=cap)
        beyond = labels >= compared
        inside = labels.masked_fill(beyond, 0)
        state = empty(len(labels), spec, dtype=self.dtype, device=labels.device)
        shard = problem.shard
        for columns in self.plan.tiles():
            columns = slice(columns.start, min(columns.stop, shard.own(compared)))
            if columns.start < columns.stop:
                x = self.heads[i].logits(columns, self.raw[self.heads[i].dtype])
                tile = Tile(x, x, self.chunk.start, shard.first + columns.start)
                problem.backend.absorb_(state, tile, inside, spec)
        statistics = Statistics.empty(spec, len(labels), labels.device)
        close(problem.backend, shard.merged(state), inside, statistics)
        s = statistics.row_stats(problem.ignore_index)
        logp = s.logp_t.masked_fill(beyond, NEG_INF)
        return replace(s, logp_s=logp, logp_t=logp, label=torch.where(beyond, labels, s.label))

    def logits(self, columns: slice, buffer: Tensor) -> Tensor:
        shape = (self.chunk.stop - self.chunk.start, columns.stop - columns.start)
        out, term = (gemm.matrix(x, *shape) for x in (buffer, self.scratch))
        temperature = self.problem.spec.temperature
        for i, (head, cap) in enumerate(zip(self.heads, self.caps, strict=True)):
            target = term if i else out
            real_logits_(target.copy_(head.logits(columns, self.raw[head.dtype])), cap)
            target.div_(temperature).add_(self.offsets[i, :, None])
            if i:
                torch.logaddexp(out, term, out=out)
        return out.mul_(temperature)


class Mixed(Dense):
    """It compares the student with a mixed distribution, whose weights each chunk needs first."""

    def __init__(
        self, head: MixtureHead, cap: Cap, problem: Problem, plan: Plan, kept: Kept
    ) -> None:
        super().__init__(head, cap, problem, plan, kept)
        self.head = head

    def start(self, rows: slice, labels: Tensor, statistics: Statistics, *, known: bool) -> None:
        super().start(rows, labels, statistics, known=known)
        if not known:
            statistics.memory.copy_(self.head.weigh(labels).t())
        self.head.offsets = statistics.memory.to(self.head.dtype)


def weights_of(function: Weigh, stats: list[RowStats], *, normalised: bool) -> Tensor:
    """Return the weights that a function says of the teachers' statistics, checked.

    Where looking would wait for the device, weights that are wrong become NaN.

    Raises:
        TypeError, ValueError: it returned no tensor, or one of another shape, or weights that are
            negative or, ``normalised``, do not add up to 1.
    """
    rows = len(stats[0].valid)
    weights = function([s.replaced([x.detach() for x in s.tensors()]) for s in stats])
    if not isinstance(weights, Tensor):
        raise TypeError(f"`weights` must return a tensor; got {type(weights).__name__}")
    if weights.shape != (rows, len(stats)):
        raise ValueError(
            f"`weights` must return (tokens, teachers) = {(rows, len(stats))}; "
            f"got {tuple(weights.shape)}"
        )
    weights = weights.detach().double()
    wrong = wrong_weights(weights, normalised=normalised) & stats[0].valid
    if checks.legible(weights) and wrong.any():
        rule = ", and add up to 1 for kind='distribution'" if normalised else ""
        raise ValueError(
            f"`weights` must be finite and not negative{rule}; got {weights[wrong][0].tolist()}"
        )
    return torch.where(wrong[:, None], float("nan"), weights)


def wrong_weights(weights: Tensor, *, normalised: bool) -> Tensor:
    """Tell where weights are negative, infinite or, if ``normalised``, do not add up to 1."""
    wrong = ~((weights >= 0) & weights.isfinite()).all(-1)
    return wrong | ((weights.sum(-1) - 1).abs() > ROUNDING) if normalised else wrong
