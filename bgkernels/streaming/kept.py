"""Memory in which tiles stay between the passes: as they are, coded, or lent by a gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bgkernels.streaming import coding
from bgkernels.streaming.planner import Plan
from bgkernels.streaming.problem import Problem


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
        device, self.caps = problem.labels.device, caps_of(problem)
        size = plan.chunk * coding.words(plan.width, plan.width)
        own = torch.empty(plan.coded - plan.lent, size, dtype=torch.float32, device=device)
        self.slots: list[Tensor] = list(own)
        if loan is not None:
            self.slots += loan.slots(size, torch.float32)
        self.first = len(plan.tiles()) - plan.kept

    def start(self, labels: Tensor) -> None:
        """Begin a chunk of rows."""
        self.labels = labels
        self.compared: dict[int, int] = {}

    def _slot(self, i: int, width: int, compared: int) -> Tensor:
        rows, size = len(self.labels), coding.words(width, compared)
        return self.slots[i - self.first][: rows * size].view(rows, size)

    def keep(self, i: int, x: Tensor, v: Tensor | None) -> None:
        """Keep the ``i``-th tiles, if they have a slot and can be coded."""
        if not self.first <= i < self.first + len(self.slots):
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


def caps_of(problem: Problem) -> coding.Caps:
    """The maps from raw to real logits of the student and its first teacher."""
    (spec, *_), *_ = problem.layout[0]
    return spec.student, spec.teacher


def codable(problem: Problem) -> bool:
    """Whether kept tiles may be coded: those of two heads with 16-bit operands, on a CPU."""
    (teacher, *others), (hidden, *head) = problem.teacher.parts, problem.student
    if others or not head or not teacher.dense or len(teacher.tensors) == 1:
        return False
    operands = [x for x in (hidden, teacher.tensors[0]) if x is not None]
    short = all(problem.operand(x).itemsize == 2 and x.device.type == "cpu" for x in operands)
    return short and all(cap.scale for cap in caps_of(problem))


class Kept(NamedTuple):
    """What a walk lends to the tiles of its heads.

    Args:
        loan: memory of the gradient of the weight, or None.
        codes: where pairs of tiles are kept, or None: each head keeps its own tiles.
    """

    loan: Loan | None = None
    codes: Codes | None = None
