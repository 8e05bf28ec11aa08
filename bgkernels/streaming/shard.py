"""The vocabulary can be split over the ranks of a process group.

Each rank holds a run of consecutive columns, of any length, and in rank order the runs are the
vocabulary. The tokens are the same on every rank, and labels are columns of the whole vocabulary.
Every rank reads its own tiles under their global column numbers; the states of a chunk are then
merged in rank order, on every rank, by the rule that joins tiles. So label, argmax, sample,
loss and coefficients are the same everywhere. The gradients of weight and bias stay where their
columns are, and the gradient of the hidden states is summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from bgkernels.rows.arithmetic import NEG_INF
from bgkernels.rows.state import RowState, merge


@dataclass(frozen=True)
class Shard:
    """A shard says which columns this process holds: all of them, or those of its rank.

    Args:
        edges: of the ranks' runs, ``(0, …, vocab)``, one more than there are ranks.
        rank: of this process in the group.
        group: the ranks; None for a process that holds all.
    """

    edges: tuple[int, ...]
    rank: int = 0
    group: ProcessGroup | None = field(default=None, repr=False)

    @property
    def first(self) -> int:
        """The number in the vocabulary of this rank's first column."""
        return self.edges[self.rank]

    @property
    def ranks(self) -> int:
        """Number of ranks that share the vocabulary."""
        return len(self.edges) - 1

    @property
    def columns(self) -> int:
        """Number of columns of the whole vocabulary."""
        return self.edges[-1]

    def widths(self, columns: int) -> list[int]:
        """Count the vocabulary's first ``columns`` that each rank holds."""
        edges = [min(edge, columns) for edge in self.edges]
        return [stop - start for start, stop in pairwise(edges)]

    def own(self, columns: int) -> int:
        """Count the vocabulary's first ``columns`` that this rank holds."""
        return self.widths(columns)[self.rank]

    def largest(self, columns: int) -> int:
        """Count the vocabulary's first ``columns`` of the rank that holds most: all plan for it."""
        return max(self.widths(columns))

    def merged(self, state: RowState) -> RowState:
        """Merge the states of all ranks to that of all columns: the same bits on every rank."""
        if self.group is None or not state.floats.numel():
            return state
        floats, ints = (_gather(x, self.group) for x in (state.floats, state.ints))
        states = [RowState(f, i, state.spec).precise() for f, i in zip(floats, ints, strict=True)]
        total = reduce(merge, states)
        return RowState(total.floats.to(state.floats.dtype), total.ints, state.spec)

    def sum_pairs(self, state: RowState) -> None:
        """Sum over the ranks, in place, what a second read has added."""
        for i, extra in enumerate(state.spec.extras):
            if extra.second_read:
                self.sum_(state.extra(i))

    def picked(self, values: Tensor, columns: Tensor) -> Tensor:
        """Return ``values`` of some ``columns`` from the ranks that hold them; else -inf."""
        if self.group is None:
            return values
        here = (columns >= self.first) & (columns < self.edges[self.rank + 1])
        total = self.sum_(torch.where(here, values, 0.0))
        return torch.where((columns >= 0) & (columns < self.columns), total, NEG_INF)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.group is not None and x.numel():
            dist.all_reduce(x, group=self.group)
        return x


def _gather(x: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Return the tensors of all ranks."""
    tensors = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(tensors, x, group=group)
    return tensors


def join(
    rows: int,
    gradients: Sequence[bool],
    seed: int,
    columns: Sequence[int],
    group: ProcessGroup | None,
    device: torch.device,
) -> tuple[list[Shard], int]:
    """Agree with the other ranks on which columns each holds.

    Args:
        rows: number of tokens.
        gradients: which of the student's tensors want a gradient.
        seed: of the sample; the first rank's counts.
        columns: that this rank holds, of the student and of each teacher.
        group: the ranks; None for this process alone.
        device: of the tensors.

    Returns:
        The shard of the student and of each teacher, and the seed.

    Raises:
        ValueError: on every rank, where tokens or wanted gradients differ between them.
    """
    if group is None:
        return [Shard((0, count)) for count in columns], seed
    wanted = sum(1 << i for i, wants in enumerate(gradients) if wants)
    if "cpu" in dist.get_backend_config(group):  # there, nobody waits for the device
        device = torch.device("cpu")
    mine = torch.tensor([rows, wanted, seed, *columns], device=device)
    counts, wants, seeds, *widths = zip(*(x.tolist() for x in _gather(mine, group)), strict=True)
    if len(set(counts)) > 1:
        raise ValueError(
            "`vocab_group`: every rank must hold the same tokens (gather a sharded sequence "
            f"first); got {list(counts)} of them on its ranks"
        )
    if len(set(wants)) > 1:
        raise ValueError(
            "`vocab_group`: the same tensors must require grad on every rank; got "
            f"{[f'{x:b}' for x in wants]}, a bit for each of the student's, the first lowest"
        )
    return [Shard((0, *accumulate(c)), group.rank(), group) for c in widths], seeds[0]


def check_alike(student: Shard, teachers: Sequence[Shard], compared: int) -> None:
    """Check that the compared columns of student and teachers are split in the same way.

    Raises:
        ValueError: they do not; the message has both ways.
    """
    ours = student.widths(compared)
    for teacher in teachers:
        theirs = teacher.widths(compared)
        if ours != theirs:
            raise ValueError(
                f"`vocab_group`: the {compared} columns on which student and teacher are compared "
                f"must be split in the same way; got {ours} and {theirs} columns on the ranks. "
                "Shard both at the same columns, with the padding on the last rank"
            )
