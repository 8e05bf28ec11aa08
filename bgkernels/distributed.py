"""This module helps with losses that are spread over the ranks of a process group.

If the vocabulary is split over ranks, pass them as ``vocab_group`` of the loss; the rules are in
:mod:`bgkernels.streaming.shard`. If ranks hold different tokens, they need a common divisor.
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

    With this divisor, the losses of the ranks add up to the loss of the whole batch, however
    unevenly the valid tokens are spread over data-parallel ranks or ranks of a sharded sequence.

    Args:
        target: labels of this rank.
        group: the ranks that hold different tokens, and so not the ``vocab_group``, whose ranks
            hold the same tokens. None: the default group, or this process alone if there is none.
        ignore_index: the label of tokens that are left out of the loss.
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
