"""The tiles of a chunk of rows, of which some stay in memory between the passes."""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.streaming.heads import Logits, LogitsHead
from bgkernels.streaming.planner import Plan


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


class Tiles:
    """A head's tiles of a chunk of rows; the last ``plan.kept`` stay in memory between the passes.

    Args:
        head: the source.
        plan: the tiling.
        columns: leading columns that are wanted; a tile beyond them is None.
        device: of the tiles.
        loan: where the last kept tiles lie, or None.
    """

    def __init__(
        self, head: Logits, plan: Plan, columns: int, device: torch.device, loan: Loan | None
    ) -> None:
        self.head, self.plan = head, plan
        self.columns = [slice(c.start, min(c.stop, columns)) for c in plan.tiles()]
        self.size = 0 if isinstance(head, LogitsHead) else plan.chunk * plan.width
        count = plan.kept - plan.lent
        self.slots: list[Tensor] = list(
            torch.empty(count, self.size, dtype=head.dtype, device=device)
        )
        if loan is not None and self.size:
            self.slots += loan.slots(self.size, head.dtype)

    def start(self, rows: slice) -> None:
        """Begin a chunk of rows."""
        self.rows = rows.stop - rows.start
        self.owner: dict[int, int] = {}
        self.head.start(rows)

    def span(self, group: range) -> slice:
        """The columns of consecutive tiles."""
        columns = self.columns[group.start : group.stop] or [slice(0, 0)]
        return slice(columns[0].start, columns[-1].stop)

    def __getitem__(self, i: int) -> Tensor | None:
        """The ``i``-th tile ``(rows, width)``, from memory if it is there."""
        columns = self.columns[i]
        slot = max(0, i - (len(self.columns) - self.plan.kept))
        width = columns.stop - columns.start
        if width <= 0:
            return None
        buffer = self.slots[slot]
        if self.size and self.owner.get(slot) == i:
            return buffer[: self.rows * width].view(self.rows, width)
        self.owner[slot] = i
        return self.head.logits(columns, buffer)

    def wanted(self, i: int) -> Tensor:
        """The ``i``-th tile, of a head that has a column in each."""
        tile = self[i]
        assert tile is not None
        return tile
