"""The two autograd functions: statistics with a recomputed gradient, and a fused loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bgkernels.loss import passes
from bgkernels.loss.passes import Fused
from bgkernels.streaming.driver import Call, Outcomes, Rows, Tensors, flatten
from bgkernels.streaming.heads import Needs


class RowStatistics(torch.autograd.Function):
    """Recompute mode: forward is pass 1; backward multiplies the logits again for pass 2.

    Returns :func:`~bgkernels.streaming.driver.flatten` of the statistics.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, teacher_count: int, labels: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """``tensors``: the teacher's, then the student's."""
        rows = Rows(tensors[teacher_count:], tensors[:teacher_count], labels)
        outcomes = passes.statistics(call, rows)
        flat = flatten(outcomes)
        ctx.call, ctx.teacher_count = call, teacher_count
        ctx.save_for_backward(labels, *tensors, *flat)
        stats = passes.all_stats(outcomes)
        with_gradient = {id(x) for s in stats for x in passes.differentiable(s)}
        ctx.mark_non_differentiable(*(x for x in flat if id(x) not in with_gradient))
        ctx.set_materialize_grads(False)
        return tuple(flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Tensors:
        """Gradients of the student's tensors."""
        needed = ctx.needs_input_grad[3:]
        labels, *saved = ctx.saved_tensors
        tensors, flat = saved[: len(needed)], saved[len(needed) :]
        n = ctx.teacher_count
        rows = Rows(tuple(tensors[n:]), tuple(tensors[:n]), labels)
        made = passes.gradient(ctx.call, rows, flat, grads, Needs(*needed[n:]))
        nothing: Tensors = (None,) * (3 + n)
        return nothing + made


class FusedLoss(torch.autograd.Function):
    """Fused mode: the forward pass computes the gradient too, and backward scales it."""

    @staticmethod
    def forward(
        ctx: Any, job: Fused, teacher: Tensors, labels: Tensor, box: list[Outcomes],
        *student: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The reduced loss, ``()``; ``box`` receives the statistics."""
        needs = Needs(*ctx.needs_input_grad[4:])
        if job.overwrite and student[0] is not None:
            torch.autograd.graph.increment_version(student[0])
        loss, outcomes, made = passes.fused(job, Rows(student, teacher, labels), needs)
        box.append(outcomes)
        ctx.present = [x is not None for x in made]
        ctx.save_for_backward(*(x for x in made if x is not None))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensors:
        """The gradients of the forward pass times ``grad``; not in place, for a kept graph."""
        saved = iter(ctx.saved_tensors)
        # The comparison is free on a CPU; elsewhere it would wait for the device.
        same = grad.device.type == "cpu" and grad.item() == 1
        made = [next(saved) if present else None for present in ctx.present]
        return (None, None, None, None, *(x if x is None or same else x * grad for x in made))
