"""The two autograd functions: statistics with a recomputed gradient, and a fused loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bgkernels.loss.objective import Objective
from bgkernels.rows.stats import Statistics
from bgkernels.streaming.driver import Matrices, gradient_of, run
from bgkernels.streaming.heads import Needs
from bgkernels.streaming.problem import Problem, Tensors


class RowStatistics(torch.autograd.Function):
    """Recompute mode: forward is pass 1; backward multiplies the logits again for pass 2."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, *student: Tensor | None) -> Matrices:
        """All statistics: see :meth:`Problem.statistics`."""
        (values, ints), _ = run(replace(problem, student=student))
        ctx.problem = replace(problem, student=())
        _save(ctx, (*student, values, ints, *problem.teacher.tensors))
        ctx.mark_non_differentiable(ints)
        ctx.set_materialize_grads(False)
        return values, ints

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor | None, _: None) -> Tensors:
        """Gradients of the student's tensors."""
        needed = ctx.needs_input_grad[1:]
        if grads is None:
            return (None,) * (1 + len(needed))
        tensors = _saved(ctx)
        student, (values, ints) = tensors[: len(needed)], tensors[len(needed) :][:2]
        problem = replace(ctx.problem, student=student)
        return (None, *gradient_of(problem, Needs(*needed), grads, (values, ints)))


def _save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """Keep tensors for backward; autograd refuses those of ``torch.inference_mode``."""
    ctx.direct = [x if x is not None and x.is_inference() else None for x in tensors]
    ctx.save_for_backward(*(None if x is None or x.is_inference() else x for x in tensors))


def _saved(ctx: Any) -> list[Any]:
    """What :func:`_save` kept; raises where one was written over since."""
    return [a if b is None else b for a, b in zip(ctx.saved_tensors, ctx.direct, strict=True)]


class FusedLoss(torch.autograd.Function):
    """Fused mode: the forward pass computes the gradient too, and backward scales it."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, objective: Objective, scale: Tensor | float, overwrite: bool,
        box: list[Matrices], *student: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The reduced loss, ``()``.

        Args:
            problem: of the rows.
            objective: the loss of a row.
            scale: factor of each row's loss, token weight over normaliser: a number, or
                ``(rows,)``.
            overwrite: write the gradient of given logits over them.
            box: receives the statistics.
            student: the tensors of the problem that get a gradient.
        """
        losses: list[Tensor] = []

        def derivative(blocks: list[Statistics], values: Tensor, rows: slice) -> Tensor:
            part = scale[rows] if isinstance(scale, Tensor) and scale.ndim else scale
            loss, grads = objective.differentiate(problem, blocks, values, rows, part)
            losses.append(loss)
            return grads

        target, (first, *others) = None, student
        if not others and first is not None:
            if overwrite:
                torch.autograd.graph.increment_version(first)
            target = first if overwrite else torch.empty_like(first)
        needs = Needs(*ctx.needs_input_grad[5:])
        matrices, grads = run(replace(problem, student=student), needs, derivative, gradient=target)
        box.append(matrices)
        ctx.present = [x is not None for x in grads]
        ctx.save_for_backward(*(x for x in grads if x is not None))
        return (losses[0] if len(losses) == 1 else torch.cat(losses)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensors:
        """The gradients of the forward pass times ``grad``; not in place, for a kept graph."""
        saved = iter(ctx.saved_tensors)
        # The comparison is free on a CPU; elsewhere it would wait for the device.
        same = grad.device.type == "cpu" and grad.item() == 1
        grads = [next(saved) if present else None for present in ctx.present]
        return (*(None,) * 5, *(x if x is None or same else x * grad for x in grads))
