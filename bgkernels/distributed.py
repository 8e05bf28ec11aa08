"""This module helps with losses that are spread over the ranks of a process group.

Ranks that share out the vocabulary are the ``vocab_group`` of the loss, whose rules are in
:mod:`bgkernels.streaming.shard`; ranks that hold different tokens need one normaliser.
"""

from __future__ import annotations

from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from bgkernels.streaming import checks


def global_num_items(
    target: Tensor,
    group: ProcessGroup | None = None,
    *,
    ignore_index: int = -100,
    averaged: bool = False,
) -> Tensor:
    """Count the valid tokens of a batch that is spread over ranks, to pass as ``num_items``.

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
