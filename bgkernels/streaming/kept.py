"""Memory in which tiles stay between the passes: as they are, coded, or lent by a gradient."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bgkernels.backends.code import Code, row_words
from bgkernels.rows.extras import Extra, Tilt
from bgkernels.streaming import gemm, memory
from bgkernels.streaming.planner import Plan
from bgkernels.streaming.problem import Problem

if TYPE_CHECKING:
    from bgkernels.streaming.heads import LinearHead

LEAST_TILT = 0.01
"""Exponents of probabilities that 65,504 nats below the maximum make nothing."""


class Loan:
    """Slots for tiles in memory that is written later.

    Args:
        memory: contiguous; its first bytes are used.
        count: number of slots.
        size: bytes of a slot, for the tiles of all heads.
    """

    def __init__(self, memory: Tensor, count: int, size: int) -> None:
        self.bytes, self.count, self.size = memory.view(-1).view(torch.uint8), count, size
        self.taken = 0

    def slots(self, size: int, dtype: torch.dtype) -> list[Tensor]:
        """``size`` elements in each slot that no other head has."""
        first, last = self.taken, self.taken + size * dtype.itemsize
        assert last <= self.size
        self.taken = last
        starts = range(0, self.count * self.size, self.size)
        return [self.bytes[at + first : at + last].view(dtype) for at in starts]


class Codes:
    """Pairs of tiles of a chunk of rows, which primitives write in pass 1, and read later.

    Args:
        plan: the tiling.
        problem: the rows, of a single teacher.
        loan: where the last of them lie, or None.
    """

    def __init__(self, plan: Plan, problem: Problem, loan: Loan | None) -> None:
        device = problem.labels.device
        self.plan, self.block = plan, problem.backend.code_block(device)
        size = plan.chunk * row_words(plan.width)
        own = memory.empty((plan.coded - plan.lent, size), torch.float32, device)
        self.slots: list[Tensor] = list(own)
        if loan is not None:
            self.slots += loan.slots(size, torch.float32)
        self.first = len(plan.tiles()) - plan.kept

    def start(self, labels: Tensor) -> None:
        """Begin a chunk of rows."""
        self.rows = len(labels)
        self.written: set[int] = set()

    def _has_slot(self, i: int) -> bool:
        return self.first <= i < self.first + len(self.slots)

    def code(self, i: int, width: int) -> Code | None:
        """Where the ``i``-th tiles are coded, if they have a slot."""
        if not self._has_slot(i):
            return None
        slot, size = self.slots[i - self.first], self.plan.chunk * self.plan.width
        words = gemm.matrix(slot[:size].view(torch.int32), self.rows, width)
        blocks = 2 * math.ceil(width / self.block)
        centres = slot[size : size + self.rows * blocks].view(self.rows, blocks)
        return Code(words, centres, self.block)

    def keep(self, i: int) -> None:
        """Remember that pass 1 has written the ``i``-th tiles' code, if they have a slot."""
        if self._has_slot(i):
            self.written.add(i)


def codable(problem: Problem) -> bool:
    """Whether kept tiles may be coded: those of two heads with 16-bit operands.

    No statistic may depend on columns that a code rules out.
    """
    (teacher, *others), (hidden, *head) = problem.teacher.parts, problem.student
    if others or not head or not teacher.dense or len(teacher.tensors) == 1:
        return False
    operands = [x for x in (hidden, teacher.tensors[0]) if x is not None]
    return (
        problem.backend.code_block(problem.labels.device) > 0
        and all(problem.operand(x).itemsize == 2 for x in operands)
        and all(map(_fades, problem.spec.extras))
    )


def _fades(extra: Extra) -> bool:
    """Whether a column far below the maxima of both models adds nothing to a statistic."""
    if not isinstance(extra, Tilt):
        return True
    a, b = extra.parameters[:2]
    return min(a, b) >= 0 and a + b >= LEAST_TILT


class Kept(NamedTuple):
    """What a walk lends to the tiles of its heads.

    Args:
        loan: memory of the gradient of the weight, or None.
        codes: where pairs of tiles are kept, or None: each head keeps its own tiles.
        student: the student's head, where primitives multiply its tiles, or None.
    """

    loan: Loan | None = None
    codes: Codes | None = None
    student: LinearHead | None = None
