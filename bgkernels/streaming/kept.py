"""Memory in which tiles stay between the passes: as they are, coded, or lent by a gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bgkernels.backends.base import Code
from bgkernels.rows.extras import Extra, Tilt
from bgkernels.streaming import coding, gemm
from bgkernels.streaming.planner import Plan
from bgkernels.streaming.problem import Problem

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
    """Pairs of tiles of a chunk of rows, coded: see :mod:`bgkernels.streaming.coding`.

    Args:
        plan: the tiling.
        problem: the rows, of a single teacher.
        loan: where the last of them lie, or None.
    """

    def __init__(self, plan: Plan, problem: Problem, loan: Loan | None) -> None:
        device, self.caps, self.plan = problem.labels.device, caps_of(problem), plan
        size = plan.slot_bytes // 4
        own = torch.empty(plan.coded - plan.lent, size, dtype=torch.float32, device=device)
        self.slots: list[Tensor] = list(own)
        if loan is not None:
            self.slots += loan.slots(size, torch.float32)
        self.first = len(plan.tiles()) - plan.kept

    def start(self, labels: Tensor) -> None:
        """Begin a chunk of rows."""
        self.labels = labels
        self.compared: dict[int, int] = {}

    def _has_slot(self, i: int) -> bool:
        return self.first <= i < self.first + len(self.slots)

    def _slot(self, i: int, width: int, compared: int) -> Tensor:
        rows, size = len(self.labels), coding.words(width, compared)
        return self.slots[i - self.first][: rows * size].view(rows, size)

    def code(self, i: int, width: int) -> Code | None:
        """What the primitives write or read of the ``i``-th tiles; here they know of no codes."""
        return None

    def keep(self, i: int, x: Tensor, v: Tensor | None) -> None:
        """Keep the ``i``-th tiles, if they have a slot and can be coded."""
        if not self._has_slot(i):
            return
        compared = 0 if v is None else v.shape[1]
        code = self._slot(i, x.shape[1], compared)
        if coding.encode(x, v, self.caps, code, self.labels):
            self.compared[i] = compared

    def restore(self, i: int, width: int, teacher: bool, out: Tensor) -> bool:
        """Write a model's ``i``-th tile, if it is kept; ``width`` is the student's."""
        compared = self.compared.get(i)
        if compared is None:
            return False
        code = self._slot(i, width, compared)
        coding.decode(code, compared, self.caps[teacher], teacher, out, self.labels)
        return True


class DirectCodes(Codes):
    """The primitives write these codes in pass 1, and read them instead of logits.

    No device is asked whether a row could be coded. One with a NaN or +inf has NaN statistics, and
    so a NaN gradient whatever its codes are; and beyond 65,504 below a maximum a column counts as
    ruled out, which is what its probability says (:func:`codable`).
    """

    def __init__(self, plan: Plan, problem: Problem, loan: Loan | None) -> None:
        super().__init__(plan, problem, loan)
        self.block = problem.backend.code_block(problem.labels.device)

    def code(self, i: int, width: int) -> Code | None:
        """What the primitives write or read of the ``i``-th tiles."""
        if not self._has_slot(i):
            return None
        rows, slot = len(self.labels), self.slots[i - self.first]
        size, blocks = self.plan.chunk * self.plan.width, math.ceil(width / self.block)
        words = gemm.matrix(slot[:size].view(torch.int32), rows, width)
        centres = slot[size : size + rows * 2 * blocks].view(rows, 2 * blocks)
        return Code(words, centres, self.block)

    def keep(self, i: int, x: Tensor, v: Tensor | None) -> None:
        """Remember that pass 1 has written a code."""
        if self._has_slot(i):
            self.compared[i] = 0 if v is None else v.shape[1]

    def restore(self, i: int, width: int, teacher: bool, out: Tensor) -> bool:
        """Tell whether a tile is kept; nobody looks at its logits."""
        return i in self.compared


def codes_of(plan: Plan, problem: Problem, loan: Loan | None) -> Codes:
    """Where pairs of tiles are kept."""
    kind = DirectCodes if problem.backend.code_block(problem.labels.device) else Codes
    return kind(plan, problem, loan)


def caps_of(problem: Problem) -> coding.Caps:
    """The maps from raw to real logits of the student and its first teacher."""
    (spec, *_), *_ = problem.layout[0]
    return spec.student, spec.teacher


def codable(problem: Problem) -> bool:
    """Whether kept tiles may be coded: those of two heads with 16-bit operands.

    By the primitives, if the backend has codes; else by functions of their own, on a CPU.
    """
    (teacher, *others), (hidden, *head) = problem.teacher.parts, problem.student
    if others or not head or not teacher.dense or len(teacher.tensors) == 1:
        return False
    operands = [x for x in (hidden, teacher.tensors[0]) if x is not None]
    if not all(problem.operand(x).itemsize == 2 for x in operands):
        return False
    if problem.backend.code_block(problem.labels.device):
        return all(map(_fades, problem.spec.extras))
    on_cpu = all(x.device.type == "cpu" for x in operands)
    return on_cpu and all(cap.scale for cap in caps_of(problem))


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
    """

    loan: Loan | None = None
    codes: Codes | None = None
