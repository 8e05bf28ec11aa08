"""DTensor arguments become plain tensors, and their gradients become DTensors.

* What belongs to tokens (hidden states, labels, token weights) must be ``Replicate()``.
* A head's weight and bias keep their shard over the mesh dimension of ``vocab_group``, and are
  gathered over every other. There their gradient is averaged, as FSDP averages those of its
  parameters; where the ranks hold the same tokens, the mean of equal gradients is the gradient.
* Logits are used as they are: sharded over the mesh dimension of ``vocab_group``, or whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

HEADS = ("linear_weight", "linear_bias", "teacher.weight", "teacher.bias")
LOGITS = ("logits", "teacher.logits")
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])
STRIDED_SINCE = (2, 10)
"""Older releases hand the rows of a gradient that FSDP2 shards once more to the wrong ranks."""

T = TypeVar("T")


def plain(name: str, x: T, group: ProcessGroup | None = None) -> T:
    """Return ``x`` itself, or the plain tensor of a DTensor or an unfinished collective.

    Args:
        name: of the argument.
        x: anything.
        group: the ranks over which the vocabulary is split.

    Raises:
        ValueError: a placement that cannot be used, with the remedy.
    """
    kind = type(x).__name__
    if kind == "AsyncCollectiveTensor":
        return cast("T", Arrived.apply(x))
    return cast("T", _plain(name, cast("DTensor", x), group)) if kind == "DTensor" else x


def plain_teacher(teacher: T, group: ProcessGroup | None) -> T:
    """Return a teacher whose tensors are plain, and so are those of its teachers."""
    if not is_dataclass(teacher) or isinstance(teacher, type):
        return teacher
    values = {f.name: getattr(teacher, f.name) for f in fields(teacher)}
    old = {name: x for name, x in values.items() if isinstance(x, Tensor)}
    new: dict[str, Any] = {name: plain(f"teacher.{name}", x, group) for name, x in old.items()}
    changed = {name: x for name, x in new.items() if x is not old[name]}
    if isinstance(values.get("teachers"), Sequence):
        changed["teachers"] = [plain_teacher(x, group) for x in values["teachers"]]
    return replace(teacher, **changed) if changed else teacher


class Arrived(torch.autograd.Function):
    """It waits for the values that a collective brings: kernels read memory as it is."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        """Return the plain tensor behind an ``AsyncCollectiveTensor``."""
        values: Tensor = x.trigger_wait()
        return values.view_as(values)  # another tensor, for another history

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the gradient as it is."""
        return grad


def _plain(name: str, x: DTensor, group: ProcessGroup | None) -> Tensor:
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh, head = x.device_mesh, name in HEADS
    wanted: list[Any] = [Replicate()] * mesh.ndim
    along = None
    if group is not None and (head or name in LOGITS):
        along = _dimension(name, x, group)
        wanted[along] = Shard(0 if head else x.ndim - 1)
    fits = [p == w for p, w in zip(x.placements, wanted, strict=True)]
    if not all(fit or (head and i != along) for i, fit in enumerate(fits)):
        remedy = "Redistribute it; where ranks hold different tokens, pass `to_local()` of each"
        if name in LOGITS:
            remedy = "Logits sharded over the vocabulary need `vocab_group`"
        raise ValueError(
            f"`{name}` is a DTensor with placements {x.placements}; expected {tuple(wanted)}. "
            + remedy
        )
    if not head:
        return x.to_local()
    strided = any(type(p).__name__ == "_StridedShard" for p in x.placements)
    if strided and x.requires_grad and TORCH < STRIDED_SINCE:
        since = ".".join(map(str, STRIDED_SINCE))
        raise NotImplementedError(
            f"`{name}` is sharded by FSDP2 over tensor parallelism; its gradient needs torch "
            f"{since} or later, this is {torch.__version__}: use one of them alone"
        )
    copies = mesh.size() // (1 if along is None else mesh.size(along))
    sums = [Partial() if w.is_replicate() else w for w in wanted]
    local: Tensor = x.redistribute(placements=wanted).to_local(grad_placements=sums)
    if local.requires_grad and copies > 1:
        local.register_hook(lambda grad: grad / copies)
    return local


def _dimension(name: str, x: DTensor, group: ProcessGroup) -> int:
    """Return the dimension of the mesh that has the ranks of the group."""
    mesh, ranks = x.device_mesh, dist.get_process_group_ranks(group)
    for i in range(mesh.ndim):
        if dist.get_process_group_ranks(mesh.get_group(i)) == ranks:
            return i
    raise ValueError(
        f"`{name}` is a DTensor on {mesh}, and no dimension of it has the ranks {ranks} of "
        "`vocab_group`; pass that dimension's `mesh.get_group(...)`"
    )
