"""Heads whose vocabulary is shared out among the ranks of a process group.

Each rank holds a run of consecutive columns, of any length, and in rank order the runs are the
vocabulary. The tokens are the same on every rank, and labels are columns of the whole vocabulary.
Every rank reads its own tiles under their global column numbers; the states of a chunk are then
merged in rank order, on every rank, by the ``merge`` that joins tiles. So label, argmax, sample,
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

from bgkernels.loss import checks
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.state import NEG_INF, RowState, merge


@dataclass(frozen=True)
class Shard:
    """The columns that this process holds: all of them, or those of its rank.

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
        """The vocabulary's index of the first column held."""
        return self.edges[self.rank]

    @property
    def ranks(self) -> int:
        """How many share the vocabulary."""
        return len(self.edges) - 1

    @property
    def columns(self) -> int:
        """Of the whole vocabulary."""
        return self.edges[-1]

    def widths(self, columns: int) -> list[int]:
        """How many of the vocabulary's first ``columns`` each rank holds."""
        edges = [min(edge, columns) for edge in self.edges]
        return [stop - start for start, stop in pairwise(edges)]

    def own(self, columns: int) -> int:
        """How many of the vocabulary's first ``columns`` are held here."""
        return self.widths(columns)[self.rank]

    def largest(self, columns: int) -> int:
        """The most of them that a rank holds: what every rank plans for."""
        return max(self.widths(columns))

    def merged(self, state: RowState, spec: RowSpec) -> RowState:
        """The state of all columns, from each rank's own; the same bits on every rank."""
        if self.group is None or not state.floats.numel():
            return state
        floats, ints = (_gather(x, self.group) for x in (state.floats, state.ints))
        states = [RowState(f, i).precise() for f, i in zip(floats, ints, strict=True)]
        total = reduce(lambda a, b: merge(a, b, spec), states)
        return RowState(total.floats.to(state.floats.dtype), total.ints)

    def picked(self, values: Tensor, columns: Tensor) -> Tensor:
        """``values`` of some ``columns`` from the ranks that hold them; -inf where none does."""
        if self.group is None:
            return values
        here = (columns >= self.first) & (columns < self.edges[self.rank + 1])
        found = self.sum_(torch.where(here, values, 0.0))
        return torch.where((columns >= 0) & (columns < self.columns), found, NEG_INF)

    def sum_(self, x: Tensor) -> Tensor:
        """``x`` summed over the ranks, in place."""
        if self.group is not None and x.numel():
            dist.all_reduce(x, group=self.group)
        return x


def _gather(x: Tensor, group: ProcessGroup) -> list[Tensor]:
    """The tensor of every rank."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x, group=group)
    return parts


@dataclass(frozen=True)
class Part:
    """What a rank brings to a call, to be compared with the others'.

    Args:
        rows: number of tokens.
        gradients: which of the student's tensors want a gradient.
        seed: of the sample; the first rank's counts.
        columns: that the rank holds, of the student and of each teacher.
    """

    rows: int
    gradients: Sequence[bool]
    seed: int
    columns: Sequence[int]


def join(part: Part, group: ProcessGroup | None, device: torch.device) -> tuple[list[Shard], int]:
    """Agree with the other ranks on who holds what.

    Returns:
        The shard of the student and of each teacher, and the seed.

    Raises:
        ValueError: on every rank, where tokens or wanted gradients differ between them.
    """
    if group is None:
        return [Shard((0, columns)) for columns in part.columns], part.seed
    wanted = sum(1 << i for i, wants in enumerate(part.gradients) if wants)
    if "cpu" in dist.get_backend_config(group):  # there, nobody waits for the device
        device = torch.device("cpu")
    own = torch.tensor([part.rows, wanted, part.seed, *part.columns], device=device)
    rows, wants, seeds, *columns = zip(*(x.tolist() for x in _gather(own, group)), strict=True)
    if len(set(rows)) > 1:
        raise ValueError(
            "`vocab_group`: every rank must hold the same tokens (gather a sharded sequence "
            f"first); got {list(rows)} of them on its ranks"
        )
    if len(set(wants)) > 1:
        raise ValueError(
            "`vocab_group`: the same tensors must require grad on every rank; got "
            f"{[f'{x:b}' for x in wants]}, a bit for each of the student's, the first lowest"
        )
    return [Shard((0, *accumulate(c)), group.rank(), group) for c in columns], seeds[0]


def check_alike(student: Shard, teachers: Sequence[Shard], compared: int) -> None:
    """The columns that are compared are shared out in one way.

    Raises:
        ValueError: where they are not, with both ways.
    """
    ours = student.widths(compared)
    for teacher in teachers:
        theirs = teacher.widths(compared)
        if ours != theirs:
            raise ValueError(
                f"`vocab_group`: student and teacher must share out the {compared} columns on "
                f"which they are compared in one way; got {ours} and {theirs} columns on the "
                "ranks. Shard both at the same columns, the padding at the end of the last"
            )


def global_num_items(
    target: Tensor,
    group: ProcessGroup | None = None,
    *,
    ignore_index: int = -100,
    averaged: bool = False,
) -> Tensor:
    """The one normaliser of a batch whose tokens are spread over ranks, to pass as ``num_items``.

    With it, the losses of the ranks add up to the loss of the whole batch, however unevenly the
    valid tokens are spread: over data-parallel ranks, or over the ranks of a sharded sequence.

    Args:
        target: labels of this rank.
        group: the ranks that hold different tokens; None for the default group, or for this process
            alone where there is none. Not the ``vocab_group``, whose ranks hold the same tokens.
        ignore_index: the label of tokens that take no part.
        averaged: whether gradients are averaged over the group afterwards, as DDP and FSDP do,
            instead of being summed; the count is then divided by the number of ranks.

    Returns:
        ``()`` fp64 on the labels' device, at least 1 before the division.

    Example:
        >>> import torch, bgkernels as bg
        >>> bg.distributed.global_num_items(torch.tensor([3, 7, -100]))
        tensor(2., dtype=torch.float64)
    """
    count = (checks.tensor("target", target, floating=False) != ignore_index).sum()
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count, group=group)
        ranks = dist.get_world_size(group)
    return count.clamp_min(1).double() / (ranks if averaged else 1)
