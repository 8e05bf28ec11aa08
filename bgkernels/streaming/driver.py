"""The one loop: each chunk of rows walks the vocabulary forwards, then backwards.

Forwards for the statistics, backwards for the gradient: the last tiles written are the first read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from bgkernels.backends.base import Backend
from bgkernels.distributed import Shard
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.state import FLOATS, TILT
from bgkernels.rows.stats import assemble
from bgkernels.rows.vjp import Coefficients
from bgkernels.streaming import gemm
from bgkernels.streaming.comparison import Comparison, Dense, Loan, Outcome, Setting, Tiles
from bgkernels.streaming.heads import Head, LinearHead, LogitsHead, Needs
from bgkernels.streaming.planner import Plan, Workload, cost_of, plan
from bgkernels.streaming.sources import MixtureSource, Source, TopKSource
from bgkernels.streaming.teachers.mixture import Mixed, MixtureHead
from bgkernels.streaming.teachers.topk import ROW_BYTES, TopK
from bgkernels.streams import SecondStream

Tensors = tuple[Tensor | None, ...]
Outcomes = tuple[Outcome, ...]
AllCoefficients = Sequence[Sequence[Coefficients]]
"""For each teacher, for each of its finals."""


@dataclass(frozen=True)
class Call:
    """What stays the same over one call, whatever its tensors.

    Args:
        spec: of the rows.
        backend: that runs the primitives.
        budget: bytes of temporaries, or None for the device's default.
        ignore_index: what ``RowStats.label`` shows in rows that take no part.
        autocast: dtype that autocast asks products to run in, or None.
        sources: of the teachers, each compared with the student; without a teacher one that is
            empty.
        shard: the columns that this process holds; those of ``spec`` are the whole vocabulary's.
    """

    spec: RowSpec
    backend: Backend
    budget: int | None
    ignore_index: int
    autocast: torch.dtype | None
    sources: tuple[Source, ...]
    shard: Shard

    def product(self, tensor: Tensor) -> torch.dtype:
        """The dtype to multiply ``tensor`` in."""
        dtype = (
            tensor.dtype
            if self.autocast is None or tensor.dtype == torch.float64
            else self.autocast
        )
        return gemm.product_dtype(dtype, tensor.device)

    def masks_in_place(self, student: Tensors) -> bool:
        """Whether a single teacher may write over the student's tiles, which hold real logits."""
        cap = self.spec.student
        return len(student) > 1 and len(self.sources) == 1 and cap.scale > 0 and not cap.cap


def split(sources: Sequence[Source], tensors: Tensors) -> list[Tensors]:
    """The teachers' tensors, for each source."""
    ends = accumulate(source.count for source in sources)
    return [tensors[end - source.count : end] for source, end in zip(sources, ends, strict=True)]


@dataclass(frozen=True)
class Rows:
    """The tensors of one call, rows flattened.

    Args:
        student: ``(hidden (rows, D), weight (V, D), bias (V,) | None)``, or
            ``(logits (rows, V),)``.
        teacher: the same for the teachers, one after the other; empty without one.
        labels: ``(rows,)`` int64 codes: a column, ``NONE`` or ``SKIP``.
    """

    student: Tensors
    teacher: Tensors
    labels: Tensor


def make_head(
    tensors: Tensors,
    call: Call,
    needs: Needs = Needs(),
    p: Plan | None = None,
    gradient: Tensor | None = None,
) -> Head:
    """The source of logits for ``(hidden, weight, bias)`` or ``(logits,)``."""
    first = tensors[0]
    assert first is not None
    if len(tensors) == 1:
        return LogitsHead(first, gradient)
    weight = tensors[1]
    assert weight is not None
    walks = (1, 1) if p is None else (p.chunk_count, p.groups)
    return LinearHead(first, weight, tensors[2], call.product(first), needs, *walks)


def workload(rows: Rows, call: Call, needs: Needs, *, statistics: bool, backward: bool) -> Workload:
    """Sizes of a call, for the planner."""
    spec, student = call.spec, rows.student[0]
    assert student is not None
    logit_bytes = tile_bytes = hidden_s = hidden_t = weight_bytes = row_bytes = sum_bytes = 0
    grad_bytes = input_sum_bytes = 0
    tile_bytes += min(len(call.sources) - 1, 2) * 4 * backward
    heads, scratch = [rows.student], set()
    for source, tensors in zip(call.sources, split(call.sources, rows.teacher), strict=True):
        states = 2 + call.shard.ranks
        if isinstance(source, TopKSource):
            row_bytes += ROW_BYTES * (source.k + 1)
            tile_bytes += 0 if call.masks_in_place(rows.student) else 4
        elif isinstance(source, MixtureSource):
            scratch |= set(range(len(heads), len(heads) + len(source.parts)))
            heads += split(source.parts, tensors)
            wide = 8 if student.dtype == torch.float64 else 4  # of the mixture and of a part
            logit_bytes, tile_bytes = logit_bytes + wide, tile_bytes + wide
            states += len(source.parts)
        else:
            heads.append(tensors)
        row_bytes += 8 * (len(FLOATS) + 3 + len(TILT) * len(spec.extras)) * states
    for i, tensors in enumerate(heads):
        if len(tensors) < 2:
            continue
        hidden, weight = tensors[:2]
        assert hidden is not None and weight is not None
        product = call.product(hidden)
        logits = gemm.logits_dtype(product, hidden.device)
        wide = 0 if product == weight.dtype else product.itemsize
        logit_bytes += logits.itemsize * (i not in scratch)
        tile_bytes += logits.itemsize * (i in scratch)
        row_bytes += hidden.shape[1] * (0 if product == hidden.dtype else product.itemsize)
        if i == 0:
            hidden_s = hidden.shape[1]
            tile_bytes += 0 if logits == product or not backward else product.itemsize
            row_bytes += hidden_s * 8 * (backward and needs.input)
            input_sum_bytes = hidden.numel() * 4 * (backward and needs.input)
            narrow = weight.dtype.itemsize < 4
            wide += 4 * (narrow and backward and needs.weight)
            sum_bytes = (
                call.shard.largest(call.shard.columns) * hidden_s * 4 * (narrow and needs.weight)
            )
            if call.shard.group is None:  # one plan must fit every rank's gradient
                grad_bytes = hidden_s * weight.dtype.itemsize * needs.weight
        else:
            hidden_t += hidden.shape[1]
        weight_bytes = max(weight_bytes, wide)
    return Workload(
        rows=len(rows.labels),
        columns=call.shard.largest(spec.columns),
        compared=call.shard.largest(spec.compared),
        hidden_s=hidden_s,
        hidden_t=hidden_t,
        logit_bytes=logit_bytes,
        tile_bytes=tile_bytes + call.backend.scratch_bytes,
        weight_bytes=weight_bytes,
        row_bytes=row_bytes,
        weight_sum_bytes=sum_bytes,
        weight_grad_bytes=grad_bytes,
        input_sum_bytes=input_sum_bytes,
        grad_products=needs.input + needs.weight,
        statistics=statistics,
        backward=backward,
        reads=1 + spec.second_read,
        device=student.device.type,
    )


class Chunk:
    """The walks over the tiles of one chunk of rows after another."""

    def __init__(
        self, rows: Rows, call: Call, setting: Setting, student: Head,
        comparisons: list[Comparison],
    ) -> None:  # fmt: skip
        self.labels, self.student, self.comparisons = rows.labels, student, comparisons
        p, device, self.beside = setting.plan, setting.device, setting.beside
        self.tiles = Tiles(student, setting, p.columns)
        self.narrow = torch.empty(0, device=device)
        if (
            isinstance(student, LinearHead)
            and student.product != student.dtype
            and student.needs.any
        ):
            self.narrow = torch.empty(p.chunk * p.width, dtype=student.product, device=device)
        spare = min(len(comparisons) - 1, 2) * student.differentiated * p.chunk * p.width
        self.spare = torch.empty(spare, dtype=setting.wide, device=device)

    def start(self, rows: slice, given: Outcomes | None) -> None:
        """Begin a chunk of rows."""
        self.tiles.start(rows)
        for k, comparison in enumerate(self.comparisons):
            comparison.start(rows, self.labels[rows], None if given is None else given[k])

    def _tile(self, i: int) -> Tensor:
        x = self.tiles[i]
        assert x is not None
        return x

    def statistics(self) -> Outcomes:
        """Pass 1. Its second read begins where the first ended."""
        order = range(len(self.tiles.columns))
        try:
            for i in order:
                x = self._tile(i)
                self._ahead(i + 1)
                for c in self.comparisons:
                    c.absorb(i, x)
        finally:
            self._join()
        outcomes = tuple(c.close() for c in self.comparisons)
        if not any(c.second_read for c in self.comparisons):
            return outcomes
        again = [c for c in self.comparisons if c.second_read]
        for i in reversed(order):
            x = self._tile(i)
            for c in again:
                c.absorb_pairs(i, x)
        return tuple(
            c.close_pairs() if c.second_read else known
            for c, known in zip(self.comparisons, outcomes, strict=True)
        )

    def _join(self) -> None:
        """Wait for the tiles that were begun ahead."""
        if self.beside is not None:
            self.beside.join()

    def _ahead(self, i: int) -> None:
        """Begin tile ``i`` beside the row kernels of the one before."""
        self._join()
        if self.beside is not None and i < len(self.tiles.columns):
            self.tiles.ahead(i)
            for c in self.comparisons:
                c.ahead(i)

    def backward(
        self, outcomes: Outcomes, coefficients: AllCoefficients, tiles: Sequence[int]
    ) -> None:
        """Pass 2, and the products with its result. The last tiles written are the first read."""
        for c, known, own in zip(self.comparisons, outcomes, coefficients, strict=True):
            c.open_vjp(known, own)
        for i in reversed(tiles):
            x, columns = self._tile(i), self.tiles.columns[i]
            d = self.student.gradient_tile(columns, x, self.narrow)
            self._vjp(i, x, d)
            self.student.backward(columns, d)

    def _vjp(self, i: int, x: Tensor, d: Tensor) -> None:
        """The sum of all comparisons' gradients. The last may be written over the tile."""
        *others, last = self.comparisons
        total, part = (self.spare[k * x.numel() :][: x.numel()] for k in (0, 1))
        for k, c in enumerate(others):
            c.vjp(i, x, (part if k else total).view(x.shape))
            if k:
                total += part
        last.vjp(i, x, d)
        if others:
            d += total.view(x.shape)


Derivative = Callable[[Outcomes, slice], AllCoefficients]
"""From a chunk's statistics and its rows to the coefficients of pass 2."""


def run(
    rows: Rows, call: Call, needs: Needs = Needs(), derivative: Derivative | None = None, *,
    given: Outcomes | None = None, gradient: Tensor | None = None,
) -> tuple[Outcomes, Tensors]:  # fmt: skip
    """Walk all chunks.

    Args:
        rows, call: what to compute.
        needs: gradients of the student's tensors to gather.
        derivative: called once a chunk between the passes; None runs pass 1 alone.
        given: statistics known from an earlier walk: pass 1 is left out.
        gradient: where the gradient of given logits goes.

    Returns:
        The statistics of all rows, by teacher, and the gradients of the student's tensors.
    """
    work = workload(rows, call, needs, statistics=given is None, backward=derivative is not None)
    p = replace(plan(work, call.budget), columns=call.shard.own(call.spec.columns))
    student = make_head(rows.student, call, needs if derivative else Needs(), p, gradient)
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    loan = None
    if p.lent and isinstance(student, LinearHead) and student.grad_weight is not None:
        loan = Loan(student.grad_weight, p.lent, p.chunk * p.width * work.logit_bytes)
    device = rows.labels.device
    beside = SecondStream(device) if cost_of(device.type).beside else None
    setting = Setting(call.backend, p, wide, device, call.ignore_index, call.shard, loan, beside)
    chunk = Chunk(rows, call, setting, student, comparisons(rows, call, setting))
    done, groups = [], p.tile_groups()
    for group in groups:
        student.end()
        student.begin(chunk.tiles.span(group))
        for part in p.chunks():
            known = None if given is None else take(call, given, part)
            chunk.start(part, known)
            outcomes = known or chunk.statistics()
            if derivative is not None:
                chunk.backward(outcomes, derivative(outcomes, part), group)
                student.finish(call.shard, group is groups[-1])
                outcomes = tuple(outcome.forgetful() for outcome in outcomes)
            done.append(outcomes)
    del chunk  # its buffers, before the gradients are narrowed
    student.end()
    return given or concatenate(call, done), student.gradients(p.columns)


def comparisons(rows: Rows, call: Call, setting: Setting) -> list[Comparison]:
    """The student beside each teacher."""
    made: list[Comparison] = []
    for source, tensors in zip(call.sources, split(call.sources, rows.teacher), strict=True):
        if isinstance(source, TopKSource):
            in_place = call.masks_in_place(rows.student)
            made.append(TopK(tensors, source, call.spec, setting, in_place))
            continue
        (spec,) = source.specs(call.spec)
        if isinstance(source, MixtureSource):
            heads = [make_head(x, call) for x in split(source.parts, tensors)]
            head = MixtureHead(heads, source, tensors[-1], spec, setting)
            made.append(Mixed(head, spec, setting))
        else:
            made.append(Dense(make_head(tensors, call) if tensors else None, spec, setting))
    return made


def flatten(outcomes: Outcomes) -> list[Tensor]:
    """All tensors; :func:`assembled` is the inverse."""
    return [x for outcome in outcomes for x in outcome.flat()]


def assembled(call: Call, tensors: Iterable[Tensor]) -> Outcomes:
    """Outcomes from their :func:`flatten` tensors."""
    it, made = iter(tensors), []
    for source in call.sources:
        finals = tuple(assemble(spec, it) for spec in source.specs(call.spec))
        made.append(Outcome(finals, tuple(next(it) for _ in range(source.memory))))
    return tuple(made)


def take(call: Call, outcomes: Outcomes, part: slice) -> Outcomes:
    """The rows ``part``."""
    return assembled(call, [x[part] for x in flatten(outcomes)])


def concatenate(call: Call, chunks: list[Outcomes]) -> Outcomes:
    """The rows of all chunks."""
    if len(chunks) == 1:
        return chunks[0]
    return assembled(call, [torch.cat(x) for x in zip(*map(flatten, chunks), strict=True)])
