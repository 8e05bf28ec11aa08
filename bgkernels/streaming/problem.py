"""Rows that fit each other: what the walks are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bgkernels.backends.base import Backend
from bgkernels.rows.spec import INTS, RowSpec
from bgkernels.rows.stats import RowStats, Statistics
from bgkernels.streaming import gemm
from bgkernels.streaming.shard import Shard

if TYPE_CHECKING:
    from bgkernels.streaming.teachers.base import Teacher

Tensors = tuple[Tensor | None, ...]
Seen = tuple[RowStats, RowStats]
"""What is seen of one teacher: by policies and the caller, and by divergences."""


@dataclass(frozen=True)
class Problem:
    """The rows of one call, checked and flattened.

    Args:
        spec: of the rows.
        backend: that runs the primitives.
        student: ``(hidden (rows, D), weight (V, D), bias (V,) | None)``, or
            ``(logits (rows, V),)``.
        teacher: with ``rows`` rows.
        labels: ``(rows,)`` int64 codes: a column, ``NONE`` or ``SKIP``.
        leading: the input's leading shape, of which ``rows`` is the product.
        shard: the columns that this process holds; those of ``spec`` are the whole vocabulary's.
        budget: bytes of temporaries, or None for the device's default.
        ignore_index: what ``RowStats.label`` shows in rows that take no part.
        autocast: dtype that autocast asks products to run in, or None.
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

    def product(self, tensor: Tensor) -> torch.dtype:
        """The dtype to multiply ``tensor`` in."""
        fixed = self.autocast is None or tensor.dtype == torch.float64
        dtype = tensor.dtype if fixed or self.autocast is None else self.autocast
        return gemm.product_dtype(dtype, tensor.device)

    def unwritten(self) -> tuple[Tensor, Tensor]:
        """The two matrices of all statistics, uninitialised: see :meth:`statistics`."""
        rows, device = len(self.labels), self.labels.device
        fields, ints = (sum(counts) for counts in zip(*self._sizes(), strict=True))
        dtype = torch.float32 if device.type == "mps" else torch.float64
        values = torch.empty(fields, rows, dtype=dtype, device=device)
        return values, torch.empty(ints, rows, dtype=torch.int64, device=device)

    def statistics(self, values: Tensor, ints: Tensor) -> list[Statistics]:
        """For each part of the teacher, its rows of the two matrices."""
        ends = zip(*map(accumulate, zip(*self._sizes(), strict=True)), strict=True)
        return [
            Statistics(part.specs(self.spec), values[a - m : a], ints[b - n : b])
            for part, (m, n), (a, b) in zip(self.teacher.parts, self._sizes(), ends, strict=True)
        ]

    def _sizes(self) -> list[tuple[int, int]]:
        """Rows of both matrices, for each part of the teacher."""
        sizes = []
        for part in self.teacher.parts:
            specs = part.specs(self.spec)
            fields = sum(spec.field_count for spec in specs) + part.memory
            sizes.append((fields, len(INTS) * len(specs)))
        return sizes

    def seen(
        self, blocks: Sequence[Statistics], leaves: Sequence[Tensor] | None = None
    ) -> list[Seen]:
        """What is seen of each part of the teacher.

        Args:
            blocks: of :meth:`statistics`.
            leaves: all rows of their matrix as autograd knows them.
        """
        views, first = [], 0
        for part, block in zip(self.teacher.parts, blocks, strict=True):
            end = first + len(block.values)
            views.append(part.seen(block, self, None if leaves is None else leaves[first:end]))
            first = end
        return views
