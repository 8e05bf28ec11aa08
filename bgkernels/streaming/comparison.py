"""One teacher beside the student's tiles: what the two passes do for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from bgkernels.backends.base import Backend, Tile
from bgkernels.distributed import Shard
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.state import empty
from bgkernels.rows.stats import Final, add_pairs, finalize
from bgkernels.rows.vjp import Coefficients
from bgkernels.streaming.heads import LinearHead, Logits, LogitsHead
from bgkernels.streaming.planner import Plan
from bgkernels.streams import SecondStream


@dataclass(frozen=True)
class Outcome:
    """What pass 1 leaves of some rows and one teacher.

    Args:
        finals: statistics, each with a vector-Jacobian product of its own.
        memory: further tensors, ``(rows, ...)``, that pass 2 needs.
    """

    finals: tuple[Final, ...]
    memory: tuple[Tensor, ...] = ()

    def flat(self) -> list[Tensor]:
        """All tensors."""
        return [*(x for final in self.finals for x in final.flat()), *self.memory]

    def forgetful(self) -> Outcome:
        """Without what only pass 2 needs; a view would keep it."""
        return replace(self, memory=tuple(x.new_zeros(len(x), 0) for x in self.memory))


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


@dataclass(frozen=True)
class Setting:
    """What all comparisons of a call share.

    Args:
        backend: that runs the primitives.
        plan: the tiling.
        wide: dtype of states and coefficients.
        device: of everything.
        ignore_index: what ``RowStats.label`` shows in rows that take no part.
        shard: the columns of the vocabulary that this process holds, which the plan covers.
        loan: where the last kept tiles lie.
        beside: where the next tile is multiplied while the present one is absorbed; None: nowhere.
    """

    backend: Backend
    plan: Plan
    wide: torch.dtype
    device: torch.device
    ignore_index: int
    shard: Shard
    loan: Loan | None = None
    beside: SecondStream | None = None


class Comparison(Protocol):
    """A teacher in the driver's walks. ``x`` is the student's ``i``-th tile, raw."""

    second_read: bool
    """Whether pass 1 walks twice."""

    def start(self, rows: slice, labels: Tensor, given: Outcome | None) -> None:
        """Begin a chunk of rows; ``given`` is known where pass 1 is left out."""

    def ahead(self, i: int) -> None:
        """Begin to multiply the ``i``-th tile beside what follows, or leave it."""

    def absorb(self, i: int, x: Tensor) -> None:
        """Pass 1."""

    def close(self) -> Outcome:
        """End pass 1's walk."""

    def absorb_pairs(self, i: int, x: Tensor) -> None:
        """Pass 1, second read."""

    def close_pairs(self) -> Outcome:
        """End the second read."""

    def open_vjp(self, outcome: Outcome, coefficients: Sequence[Coefficients]) -> None:
        """Begin pass 2, with coefficients for each of the finals."""

    def vjp(self, i: int, x: Tensor, out: Tensor) -> None:
        """Pass 2: write the gradient of the tile to ``out``, which may be ``x``."""


class Tiles:
    """A head's tiles of a chunk of rows; the last ``plan.kept`` stay in memory between the passes.

    Args:
        head: the source.
        setting: of the call.
        columns: leading columns that are wanted; a tile beyond them is None.
    """

    def __init__(self, head: Logits, setting: Setting, columns: int) -> None:
        p = self.plan = setting.plan
        self.head, self.beside = head, setting.beside
        self.columns = [slice(c.start, min(c.stop, columns)) for c in p.tiles()]
        self.size = 0 if isinstance(head, LogitsHead) else p.chunk * p.width
        own = (p.kept - p.lent, self.size)
        self.slots: list[Tensor] = list(torch.empty(own, dtype=head.dtype, device=setting.device))
        if setting.loan is not None and self.size:
            self.slots += setting.loan.slots(self.size, head.dtype)

    def start(self, rows: slice) -> None:
        """Begin a chunk of rows."""
        self.rows = rows.stop - rows.start
        self.owner: dict[int, int] = {}
        self.head.start(rows)

    def span(self, group: range) -> slice:
        """The columns of consecutive tiles."""
        columns = self.columns[group.start : group.stop] or [slice(0, 0)]
        return slice(columns[0].start, columns[-1].stop)

    def _slot(self, i: int) -> int:
        return max(0, i - (len(self.columns) - self.plan.kept))

    def __getitem__(self, i: int) -> Tensor | None:
        """The ``i``-th tile ``(rows, width)``, from memory if it is there."""
        columns, slot = self.columns[i], self._slot(i)
        width = columns.stop - columns.start
        if width <= 0:
            return None
        buffer = self.slots[slot]
        if self.size and self.owner.get(slot) == i:
            return buffer[: self.rows * width].view(self.rows, width)
        self.owner[slot] = i
        return self.head.logits(columns, buffer)

    def ahead(self, i: int) -> None:
        """Begin the ``i``-th tile beside what follows, where that needs no memory but its own.

        It is not to be read before ``beside`` is joined.
        """
        head, columns = self.head, self.columns[i]
        if self.beside is None or not isinstance(head, LinearHead) or columns.stop <= columns.start:
            return
        slot, direct = self._slot(i), head.weight.dtype == head.product
        if not direct or slot == self._slot(i - 1) or self.owner.get(slot) == i:
            return
        self.owner[slot] = i
        self.beside.start(lambda: head.logits(columns, self.slots[slot]))


class Dense:
    """A teacher with a logit for each compared column, or none at all."""

    def __init__(self, head: Logits | None, spec: RowSpec, setting: Setting) -> None:
        self.spec, self.setting = spec, setting
        shard = setting.shard
        self.tiles = None if head is None else Tiles(head, setting, shard.own(spec.compared))
        self.first = [shard.first + c.start for c in setting.plan.tiles()]
        self.second_read = spec.second_read
        self.memory: tuple[Tensor, ...] = ()

    def start(self, rows: slice, labels: Tensor, given: Outcome | None) -> None:
        """Begin a chunk of rows."""
        self.first_row, self.labels = rows.start, labels
        if self.tiles is not None:
            self.tiles.start(rows)
        if given is None:
            self.state = empty(
                len(labels), len(self.spec.tilts), dtype=self.setting.wide, device=labels.device
            )

    def _tile(self, i: int, x: Tensor) -> Tile:
        teacher = None if self.tiles is None else self.tiles[i]
        return Tile(x, teacher, self.first_row, self.first[i])

    def ahead(self, i: int) -> None:
        """Begin the teacher's tile."""
        if self.tiles is not None:
            self.tiles.ahead(i)

    def absorb(self, i: int, x: Tensor) -> None:
        """Pass 1."""
        self.setting.backend.absorb_(self.state, self._tile(i, x), self.labels, self.spec)

    def close(self) -> Outcome:
        """Statistics; those of pairs follow."""
        spec = self.spec
        state = self.setting.shard.merged(self.state, spec)
        self.final = finalize(state, self.labels, spec, self.setting.ignore_index)
        if spec.second_read:
            s, wide = self.final.stats, self.setting.wide
            self.lse = s.lse_s.to(wide), s.lse_t.to(wide)
            self.sums = s.lse_s.new_zeros(spec.pair_sums, len(self.labels), dtype=wide)
        return Outcome((self.final,), self.memory)

    def absorb_pairs(self, i: int, x: Tensor) -> None:
        """Pass 1, second read."""
        self.setting.backend.absorb_pairs_(self.sums, self._tile(i, x), *self.lse, self.spec)

    def close_pairs(self) -> Outcome:
        """All statistics."""
        sums = self.setting.shard.sum_(self.sums)
        return Outcome((add_pairs(self.final, sums, self.spec),), self.memory)

    def open_vjp(self, outcome: Outcome, coefficients: Sequence[Coefficients]) -> None:
        """Begin pass 2."""
        self.coefficients = coefficients[0].to(self.setting.wide)

    def vjp(self, i: int, x: Tensor, out: Tensor) -> None:
        """Pass 2."""
        self.setting.backend.vjp(out, self._tile(i, x), self.coefficients, self.spec)
