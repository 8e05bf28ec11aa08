"""The tiles of a chunk of rows; some of them stay in memory between the passes."""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.streaming import gemm, memory
from bgkernels.streaming.heads import Logits, LogitsHead
from bgkernels.streaming.kept import Kept
from bgkernels.streaming.planner import Plan


class Tiles:
    """A head's tiles of a chunk of rows; the last ``plan.kept`` stay in memory between the passes.

    Args:
        head: the source.
        plan: the tiling.
        columns: those of each tile of the plan; a tile without any is None.
        device: of the tiles.
        kept: what the walk lends.
    """

    def __init__(
        self, head: Logits, plan: Plan, columns: list[slice], device: torch.device, kept: Kept
    ) -> None:
        self.head, self.plan, self.codes = head, plan, kept.codes
        self.columns = columns
        given = plan.inline or isinstance(head, LogitsHead)
        self.size = 0 if given else plan.chunk * plan.width
        count = plan.kept - plan.lent if self.codes is None else 1
        own = memory.empty((count, self.size), head.dtype, device)
        self.slots: list[Tensor] = list(own.unbind(0))
        if kept.loan is not None and self.codes is None and self.size:
            self.slots += kept.loan.slots(self.size, head.dtype)
        self.first = len(self.columns) - len(self.slots)
        self.shape = torch.empty(plan.width if plan.inline else 0, device=device)

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
        """The ``i``-th tile ``(rows, width)``, from memory if it is there.

        Where primitives multiply it, it is a shape alone.
        """
        columns = self.columns[i]
        slot = max(0, i - self.first) if self.codes is None else 0
        width = columns.stop - columns.start
        if width <= 0:
            return None
        if self.plan.inline:
            return self.shape[:width].expand(self.rows, width)
        buffer = self.slots[slot]
        tile = gemm.matrix(buffer, self.rows, width) if self.size else None
        held = tile is not None and self.owner.get(slot) == i
        self.owner[slot] = i
        if held or (tile is not None and self._coded(i)):
            return tile
        return self.head.logits(columns, buffer)

    def _coded(self, i: int) -> bool:
        """Tell whether a tile is kept in a code; nobody looks at its logits."""
        return self.codes is not None and i in self.codes.written

    def wanted(self, i: int) -> Tensor:
        """The ``i``-th tile, of a head that has a column in each."""
        tile = self[i]
        assert tile is not None
        return tile
