"""The one loop: each chunk of rows walks the vocabulary forwards, then backwards.

Forwards for the statistics, backwards for the gradient: the last tiles written are the first read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bgkernels import gemm
from bgkernels.backends.base import Backend, Tile
from bgkernels.heads import Head, LinearHead, LogitsHead, Needs
from bgkernels.planner import DEFAULT_BUDGET, Plan, Workload, plan
from bgkernels.spec import RowSpec
from bgkernels.state import FLOATS, TILT, empty
from bgkernels.stats import Final, add_pairs, assemble, finalize
from bgkernels.vjp import Coefficients

Tensors = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Call:
    """What stays the same over one call, whatever its tensors.

    Args:
        spec: of the rows.
        backend: that runs the primitives.
        budget: bytes of temporaries, or None for the device's default.
        ignore_index: what ``RowStats.label`` shows in rows that take no part.
        autocast: dtype that autocast asks products to run in, or None.
    """

    spec: RowSpec
    backend: Backend
    budget: int | None
    ignore_index: int
    autocast: torch.dtype | None = None

    def product(self, tensor: Tensor) -> torch.dtype:
        """The dtype to multiply ``tensor`` in."""
        dtype = (
            tensor.dtype
            if self.autocast is None or tensor.dtype == torch.float64
            else self.autocast
        )
        return gemm.product_dtype(dtype, tensor.device)


@dataclass(frozen=True)
class Rows:
    """The tensors of one call, rows flattened.

    Args:
        student: ``(hidden (rows, D), weight (V, D), bias (V,) | None)``, or
            ``(logits (rows, V),)``.
        teacher: the same for the teacher; empty without one.
        labels: ``(rows,)`` int64 codes: a column, ``NONE`` or ``SKIP``.
    """

    student: Tensors
    teacher: Tensors
    labels: Tensor


def make_head(
    tensors: Tensors,
    call: Call,
    needs: Needs = Needs(),
    chunks: int = 1,
    gradient: Tensor | None = None,
) -> Head:
    """The source of logits for ``(hidden, weight, bias)`` or ``(logits,)``."""
    first = tensors[0]
    assert first is not None
    if len(tensors) == 1:
        return LogitsHead(first, gradient)
    weight = tensors[1]
    assert weight is not None
    return LinearHead(first, weight, tensors[2], call.product(first), needs, chunks)


def workload(rows: Rows, call: Call, needs: Needs, *, statistics: bool, backward: bool) -> Workload:
    """Sizes of a call, for the planner."""
    spec, student = call.spec, rows.student[0]
    assert student is not None
    logit_bytes = tile_bytes = hidden_s = hidden_t = weight_bytes = row_bytes = sum_bytes = 0
    row_bytes += 8 * (len(FLOATS) + 3 + len(TILT) * len(spec.extras)) * 3
    for i, tensors in enumerate((rows.student, rows.teacher)):
        if len(tensors) < 2:
            continue
        hidden, weight = tensors[:2]
        assert hidden is not None and weight is not None
        product = call.product(hidden)
        logits = gemm.logits_dtype(product, hidden.device)
        wide = 0 if product == weight.dtype else product.itemsize
        logit_bytes += logits.itemsize
        row_bytes += hidden.shape[1] * (0 if product == hidden.dtype else product.itemsize)
        if i == 0:
            hidden_s = hidden.shape[1]
            tile_bytes += 0 if logits == product or not backward else product.itemsize
            row_bytes += hidden_s * 8 * (backward and needs.input)
            narrow = weight.dtype.itemsize < 4
            wide += 4 * (narrow and backward and needs.weight)
            sum_bytes = weight.numel() * 4 * (narrow and needs.weight)
        else:
            hidden_t = hidden.shape[1]
        weight_bytes = max(weight_bytes, wide)
    return Workload(
        rows=len(rows.labels),
        columns=spec.columns,
        compared=spec.compared,
        hidden_s=hidden_s,
        hidden_t=hidden_t,
        logit_bytes=logit_bytes,
        tile_bytes=tile_bytes + call.backend.scratch_bytes,
        weight_bytes=weight_bytes,
        row_bytes=row_bytes,
        weight_sum_bytes=sum_bytes,
        grad_products=needs.input + needs.weight,
        statistics=statistics,
        backward=backward,
        reads=1 + spec.second_read,
        device=student.device.type,
    )


class Chunk:
    """Tiles of one chunk of rows after another, kept between the passes where there is room."""

    def __init__(
        self, rows: Rows, call: Call, p: Plan, student: Head, teacher: Head | None
    ) -> None:
        self.rows, self.call, self.plan = rows, call, p
        self.student, self.teacher = student, teacher
        self.tiles = p.tiles()
        size = p.kept * p.chunk * p.width
        device = rows.labels.device
        self.buffers = [
            torch.empty(
                size if isinstance(head, LinearHead) else 0, dtype=head.dtype, device=device
            )
            for head in (student, teacher)
            if head is not None
        ]
        self.narrow = torch.empty(0, device=device)
        if (
            isinstance(student, LinearHead)
            and student.product != student.dtype
            and student.needs.any
        ):
            self.narrow = torch.empty(p.chunk * p.width, dtype=student.product, device=device)

    def start(self, rows: slice) -> None:
        """Begin a chunk of rows."""
        self.slice, self.labels = rows, self.rows.labels[rows]
        self.owner: dict[int, int] = {}
        for head in (self.student, self.teacher):
            if head is not None:
                head.start(rows)

    def tile(self, i: int) -> Tile:
        """The ``i``-th tile, from memory if it is there."""
        slot = max(0, i - (len(self.tiles) - self.plan.kept))
        size = self.plan.chunk * self.plan.width
        columns, compared = self.tiles[i], self.call.spec.compared
        fresh = self.owner.get(slot) != i
        self.owner[slot] = i
        made: list[Tensor | None] = []
        for k, head in enumerate((self.student, self.teacher)):
            stop = columns.stop if k == 0 else min(columns.stop, compared)
            if head is None or stop <= columns.start:
                made.append(None)
                continue
            part, buffer = (
                slice(columns.start, stop),
                self.buffers[k][slot * size : (slot + 1) * size],
            )
            if isinstance(head, LogitsHead) or fresh:
                made.append(head.logits(part, buffer))
            else:
                n, width = self.slice.stop - self.slice.start, stop - columns.start
                made.append(buffer[: n * width].view(n, width))
        student, teacher = made
        assert student is not None
        return Tile(student, teacher, self.slice.start, columns.start)

    def statistics(self) -> Final:
        """Pass 1."""
        call, spec, n = self.call, self.call.spec, len(self.labels)
        wide = self.wide
        state = empty(n, len(spec.tilts), dtype=wide, device=self.labels.device)
        for i in range(len(self.tiles)):
            call.backend.absorb_(state, self.tile(i), self.labels, spec)
        final = finalize(state, self.labels, spec, call.ignore_index)
        if not spec.second_read:
            return final
        sums = torch.zeros(
            3 * len(spec.mixtures) + 2 * spec.total_variation,
            n,
            dtype=wide,
            device=self.labels.device,
        )
        lse_s, lse_t = (x.to(wide) for x in (final.stats.lse_s, final.stats.lse_t))
        for i in reversed(range(len(self.tiles))):
            call.backend.absorb_pairs_(sums, self.tile(i), lse_s, lse_t, spec)
        return add_pairs(final, sums, spec)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of states and coefficients."""
        return torch.float64 if self.student.dtype == torch.float64 else torch.float32

    def backward(self, coefficients: Coefficients) -> None:
        """Pass 2, and the products with its result. The last tiles written are the first read."""
        coefficients = coefficients.to(self.wide)
        for i in reversed(range(len(self.tiles))):
            tile, columns = self.tile(i), self.tiles[i]
            d = self.student.gradient_tile(columns, tile.student, self.narrow)
            self.call.backend.vjp(d, tile, coefficients, self.call.spec)
            self.student.backward(columns, d)


Derivative = Callable[[Final, slice], Coefficients]
"""From a chunk's statistics and its rows to the coefficients of pass 2."""


def run(
    rows: Rows, call: Call, needs: Needs = Needs(), derivative: Derivative | None = None, *,
    given: Final | None = None, gradient: Tensor | None = None,
) -> tuple[Final, Tensors]:  # fmt: skip
    """Walk all chunks.

    Args:
        rows, call: what to compute.
        needs: gradients of the student's tensors to gather.
        derivative: called once a chunk between the passes; None runs pass 1 alone.
        given: statistics known from an earlier walk: pass 1 is left out.
        gradient: where the gradient of given logits goes.

    Returns:
        The statistics of all rows, and the gradients of the student's tensors.
    """
    p = plan(
        workload(rows, call, needs, statistics=given is None, backward=derivative is not None),
        call.budget or DEFAULT_BUDGET.get(rows.labels.device.type, DEFAULT_BUDGET["cpu"]),
    )
    student = make_head(
        rows.student, call, needs if derivative else Needs(), p.chunk_count, gradient
    )
    teacher = make_head(rows.teacher, call) if rows.teacher else None
    chunk = Chunk(rows, call, p, student, teacher)
    finals = []
    for part in p.chunks():
        chunk.start(part)
        finals.append(chunk.statistics() if given is None else take(given, part, call.spec))
        if derivative is not None:
            chunk.backward(derivative(finals[-1], part))
            student.finish()
    del chunk  # its buffers, before the gradients are narrowed
    return concatenate(finals, call.spec) if given is None else given, student.gradients(
        call.spec.columns
    )


def take(final: Final, part: slice, spec: RowSpec) -> Final:
    """The rows ``part`` of a :class:`Final`."""
    return assemble(spec, [x[part] for x in final.flat()])


def concatenate(finals: list[Final], spec: RowSpec) -> Final:
    """One :class:`Final` of all chunks."""
    if len(finals) == 1:
        return finals[0]
    return assemble(spec, [torch.cat(x) for x in zip(*(f.flat() for f in finals), strict=True)])
