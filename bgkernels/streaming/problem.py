"""A problem is what the walks compute: rows that fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bgkernels.backends.base import Backend
from bgkernels.rows.caching import lazy
from bgkernels.rows.spec import INTS, RowSpec
from bgkernels.rows.stats import RowStats, Statistics
from bgkernels.streaming import gemm
from bgkernels.streaming.shard import Shard

if TYPE_CHECKING:
    from bgkernels.streaming.teachers.base import Teacher

Tensors = tuple[Tensor | None, ...]
Seen = tuple[RowStats, RowStats]
"""Statistics beside one teacher as policies and the caller see them, and as divergences do."""


@dataclass(frozen=True)
class Problem:
    """A problem is all rows of one call, checked and flattened.

    Args:
        spec: of the rows.
        backend: that runs the primitives.
        student: ``(hidden (rows, D), weight (V, D), bias (V,) | None)``, or
            ``(logits (rows, V),)``.
        teacher: with ``rows`` rows.
        labels: ``(rows,)`` int64 codes: a column, ``NONE`` or ``SKIP``.
        leading: the input's leading shape; its product is ``rows``.
        shard: which columns this process holds; those of ``spec`` are the whole vocabulary's.
        budget: bytes of temporaries, or None for the device's default.
        ignore_index: what ``RowStats.label`` shows in rows that take no part.
        autocast: dtype that autocast asks products to run in, or None.
        items: how many rows take part, or None where counting would wait for a device.
        weight_grad: the caller's sum in fp32 or fp64, to which dW is added, or None.
    """

    spec: RowSpec
    backend: Backend
    student: Tensors
    teacher: Teacher
    labels: Tensor
    leading: tuple[int, ...]
    shard: Shard
    budget: int | None = None
    ignore_index: int = -100
    autocast: torch.dtype | None = None
    items: int | None = None
    weight_grad: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of states and losses: fp32, or fp64 for fp64 inputs."""
        first = self.student[0]
        double = first is not None and first.dtype == torch.float64
        return torch.float64 if double else torch.float32

    @property
    def masks_in_place(self) -> bool:
        """Whether a single teacher may write over the student's tiles, which hold real logits."""
        cap = self.spec.student
        return (
            len(self.student) > 1 and len(self.teacher.parts) == 1 and cap.scale > 0 and not cap.cap
        )

    def operand(self, tensor: Tensor) -> torch.dtype:
        """The dtype whose digits of ``tensor`` are multiplied."""
        fixed = self.autocast is None or tensor.dtype == torch.float64
        return tensor.dtype if fixed or self.autocast is None else self.autocast

    def product(self, tensor: Tensor) -> torch.dtype:
        """Return the dtype to multiply ``tensor`` in."""
        return gemm.product_dtype(self.operand(tensor), tensor.device)

    def unwritten(self) -> tuple[Tensor, Tensor]:
        """Allocate the two matrices of all statistics: see :meth:`statistics`."""
        rows, device = self.labels.size(0), self.labels.device
        _, fields, ints = self.layout[-1]
        dtype = torch.float32 if device.type == "mps" else torch.float64
        values = torch.empty(fields.stop, rows, dtype=dtype, device=device)
        return values, torch.empty(ints.stop, rows, dtype=torch.int64, device=device)

    def statistics(self, values: Tensor, ints: Tensor) -> list[Statistics]:
        """Return the statistics beside each part of the teacher: its rows of the two matrices."""
        if len(self.layout) == 1:
            return [Statistics(self.layout[0][0], values, ints)]
        return [Statistics(specs, values[a], ints[b]) for specs, a, b in self.layout]

    @lazy
    def layout(self) -> list[tuple[tuple[RowSpec, ...], slice, slice]]:
        """The pairs of each part of the teacher, and its rows of both matrices."""
        layout, fields, ints = [], 0, 0
        for part in self.teacher.parts:
            specs = part.specs(self.spec)
            count = sum(spec.field_count for spec in specs) + part.memory
            rows = slice(fields, fields + count), slice(ints, ints + len(INTS) * len(specs))
            layout.append((specs, *rows))
            fields, ints = rows[0].stop, rows[1].stop
        return layout

    def connected(self, blocks: Sequence[Statistics], values: Tensor) -> list[Tensor]:
        """Return all matrix rows; those that carry a gradient have the history of ``values``."""
        graph = values.unbind(0)
        rows: list[Tensor] = []
        for block in blocks:
            rows += block.connected(graph[len(rows) :])
        return rows

    def seen(
        self, blocks: Sequence[Statistics], rows: Sequence[Tensor] | None = None
    ) -> list[Seen]:
        """Return what is seen of each part of the teacher.

        Args:
            blocks: of :meth:`statistics`.
            rows: all rows of their matrix as autograd is to know them; None: without a history.
        """
        if len(blocks) == 1:
            return [self.teacher.parts[0].seen(blocks[0], self, rows)]
        views, first = [], 0
        for part, block in zip(self.teacher.parts, blocks, strict=True):
            end = first + len(block.values)
            views.append(part.seen(block, self, None if rows is None else rows[first:end]))
            first = end
        return views
