"""Two autograd functions connect the walks to autograd, one for each mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bgkernels.backends.base import Backend
from bgkernels.loss.objective import Objective
from bgkernels.rows.stats import Statistics
from bgkernels.streaming import memory
from bgkernels.streaming.driver import Matrices, gradient_of, run
from bgkernels.streaming.heads import Needs
from bgkernels.streaming.problem import Problem, Tensors

Factor = Tensor | float


class RowStatistics(torch.autograd.Function):
    """It is recompute mode: forward is pass 1; backward multiplies the logits again for pass 2."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, *student: Tensor | None) -> Matrices:
        """Return both matrices of statistics: see :meth:`Problem.statistics`."""
        (values, ints), _ = run(replace(problem, student=student))
        ctx.problem = replace(problem, student=())
        _save(ctx, (*student, values, ints, *problem.teacher.tensors))
        ctx.mark_non_differentiable(ints)
        ctx.set_materialize_grads(False)
        return values, ints

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor | None, _: None) -> Tensors:
        """Return the gradients of the student's tensors."""
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
    """Return what :func:`_save` kept; raise where a tensor was written over since."""
    return [a if b is None else b for a, b in zip(ctx.saved_tensors, ctx.direct, strict=True)]


def needs_of(student: Tensors, wanted: Sequence[bool]) -> Needs:
    """Return the gradients that fused mode gathers, and in which dtype they wait."""
    half = any(x is not None and x.dtype == torch.float16 for x in student)
    return Needs(*wanted)._replace(held=half)


class FusedLoss(torch.autograd.Function):
    """It is fused mode: the forward pass computes the gradient too, and backward scales it.

    A gradient in fp16 would lose what a loss scale is there to keep: where a tensor is fp16, the
    normaliser waits for backward as well, and gradients wait in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, objective: Objective, weight: Factor, divisor: Factor,
        overwrite: bool, box: list[Matrices], *student: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return the reduced loss, ``()``.

        Args:
            problem: of the rows.
            objective: the loss of a row.
            weight: factor of each row's loss, a number or ``(rows,)``.
            divisor: the normaliser, a number or ``()``.
            overwrite: whether the gradient of a student's logits is written over them.
            box: a list that receives the statistics.
            student: the tensors of the problem that get a gradient.
        """
        losses: list[Tensor] = []
        needs = needs_of(student, ctx.needs_input_grad[6:])
        scale, ctx.divisor = (weight, divisor) if needs.held else (weight / divisor, None)

        def derivative(blocks: list[Statistics], values: Tensor, rows: slice) -> Tensor:
            factor = scale[rows] if isinstance(scale, Tensor) and scale.ndim else scale
            loss, grads = objective.differentiate(problem, blocks, values, rows, factor)
            losses.append(loss)
            return grads

        target, (first, *others) = None, student
        if not others and first is not None:
            if overwrite:
                torch.autograd.graph.increment_version(first)
            target = first
            if not overwrite:
                target = memory.empty(first.shape, needs.dtype(first.dtype), first.device)
        matrices, grads = run(problem, needs, derivative, gradient=target)
        box.append(matrices)
        ctx.owned, ctx.done = problem.weight_grad, False
        ctx.backend, ctx.dtypes = problem.backend, [None if x is None else x.dtype for x in student]
        ctx.save_for_backward(*grads)
        total = (losses[0] if len(losses) == 1 else torch.cat(losses)).sum()
        return (total / divisor if needs.held else total).to(problem.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensors:
        """Return the gradients of the forward pass times ``grad``."""
        factor = grad if ctx.divisor is None else grad / ctx.divisor
        if ctx.owned is not None:
            _check_unscaled(ctx, grad)
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = (None if x is None else _scaled(ctx.backend, x, factor).to(to) for x, to in pairs)
        return (*(None,) * 6, *scaled)


def _check_unscaled(ctx: Any, grad: Tensor) -> None:
    """Raise where ``weight_grad`` holds another gradient than is asked for, which came too early.

    On a device that would have to be waited for, it becomes NaN instead.
    """
    if ctx.done:
        raise RuntimeError(
            "`weight_grad` holds the gradient of this loss already; backward a second time needs "
            "mode='recompute', or a loss without it"
        )
    ctx.done = True
    if grad.device.type == "cpu" and grad.item() != 1:
        raise RuntimeError(
            "`weight_grad` got the gradient of the loss in the forward pass, but backward is asked "
            f"for {grad.item():.6g} times that; call `loss.backward()` on the loss itself, with "
            "the factor in `num_items` or `token_weight`, or use mode='recompute'"
        )
    if grad.device.type != "cpu":
        ctx.backend.scale_(ctx.owned, torch.where(grad == 1, 1.0, float("nan")))


def _scaled(backend: Backend, x: Tensor, factor: Tensor) -> Tensor:
    """Return ``x · factor``: in the memory of ``x``, unless a kept graph comes here again."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        x = x.clone()
    backend.scale_(x, factor)
    return x
