"""The two autograd functions: statistics with a recomputed gradient, and a fused loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bgkernels.driver import Call, Rows, Tensors, run
from bgkernels.heads import Needs
from bgkernels.objective import Objective
from bgkernels.spec import Extra
from bgkernels.stats import DIFFERENTIABLE, Coefficients, Final, RowStats, vjp_coefficients


def _needs(flags: Sequence[bool]) -> Needs:
    """Needs of ``(hidden, weight, bias)`` or ``(logits,)``."""
    return Needs(*flags)


class RowStatistics(torch.autograd.Function):
    """Recompute mode: forward is pass 1; backward multiplies the logits again for pass 2."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        teacher_count: int,
        box: list[Final],
        labels: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """``tensors``: the teacher's, then the student's; ``box`` receives the statistics."""
        teacher, student = tensors[:teacher_count], tensors[teacher_count:]
        final, _ = run(Rows(student, teacher, labels), call)
        out = final.stats.tensors()
        box.append(final)
        ctx.call, ctx.teacher_count, ctx.structure = call, teacher_count, _structure(final)
        ctx.save_for_backward(labels, *tensors, *_rest(final), *out)
        differentiable = _differentiable(final.stats)
        ctx.mark_non_differentiable(*(x for x in out if not any(x is y for y in differentiable)))
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the student's tensors."""
        labels, *saved = ctx.saved_tensors
        count = len(ctx.needs_input_grad) - 4
        tensors, rest = saved[:count], saved[count:]
        final = _restore(ctx.structure, rest)
        shaped = final.stats.replaced(cast(list[Tensor], list(grads)))
        student = tuple(tensors[ctx.teacher_count :])

        def derivative(chunk: Final, part: slice) -> Coefficients:
            own = {name: _cut(getattr(shaped, name), part) for name in DIFFERENTIABLE}
            extra = {e: tuple(_cut(x, part) for x in values) for e, values in shaped.extras.items()}
            return vjp_coefficients(chunk, own, extra, ctx.call.spec)

        needs = _needs(ctx.needs_input_grad[4 + ctx.teacher_count :])
        gradient = torch.empty_like(student[0]) if len(student) == 1 else None
        rows = Rows(student, tuple(tensors[: ctx.teacher_count]), labels)
        _, made = run(rows, ctx.call, needs, derivative, given=final, gradient=gradient)
        nothing: Tensors = (None,) * (4 + ctx.teacher_count)
        return nothing + made


def _cut(x: Tensor | None, part: slice) -> Tensor | None:
    return None if x is None else x[part]


def _rest(final: Final) -> list[Tensor]:
    return [final.rest_s, final.rest_t, final.rest_c, *final.overlap]


def _structure(final: Final) -> Final:
    """A :class:`Final` without tensors."""
    stats = final.stats.replaced(cast(list[Tensor], [None] * len(final.stats.tensors())))
    none = cast(Tensor, None)
    return Final(stats, none, none, none, (none,) * len(final.overlap))


def _restore(structure: Final, tensors: list[Tensor]) -> Final:
    n = 3 + len(structure.overlap)
    rest_s, rest_t, rest_c, *overlap = tensors[:n]
    return Final(structure.stats.replaced(tensors[n:]), rest_s, rest_t, rest_c, tuple(overlap))


def _differentiable(stats: RowStats) -> list[Tensor]:
    return [getattr(stats, name) for name in DIFFERENTIABLE] + [
        x for v in stats.extras.values() for x in v
    ]


@dataclass
class Fused:
    """What a fused call computes, and where it leaves its statistics.

    Args:
        call: of the rows.
        objective: the loss of a row.
        teacher: the teacher's tensors.
        labels: row codes.
        scale: ``(rows,)`` or ``()`` factor of each row's loss: token weight over normaliser.
        overwrite: write the gradient of given logits over them.
        final: the statistics, after the forward pass.
    """

    call: Call
    objective: Objective
    teacher: Tensors
    labels: Tensor
    scale: Tensor
    overwrite: bool = False
    final: Final | None = None


class FusedLoss(torch.autograd.Function):
    """Fused mode: the forward pass computes the gradient too, and backward scales it."""

    @staticmethod
    def forward(ctx: Any, fused: Fused, *student: Tensor | None) -> Tensor:
        """The reduced loss, ``()``."""
        losses: list[Tensor] = []
        scale = fused.scale.expand(len(fused.labels))

        def derivative(final: Final, part: slice) -> Coefficients:
            loss, own, extra = _differentiate(fused.objective, final.stats, scale[part])
            losses.append(loss)
            return vjp_coefficients(final, own, extra, fused.call.spec)

        needs, gradient = _needs(ctx.needs_input_grad[1:]), None
        if len(student) == 1:
            assert student[0] is not None
            gradient = student[0] if fused.overwrite else torch.empty_like(student[0])
            if fused.overwrite:
                torch.autograd.graph.increment_version(student[0])
        fused.final, made = run(
            Rows(student, fused.teacher, fused.labels),
            fused.call,
            needs,
            derivative,
            gradient=gradient,
        )
        ctx.present = [x is not None for x in made]
        ctx.save_for_backward(*(x for x in made if x is not None))
        return torch.cat(losses).sum() if losses else scale.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the forward pass times ``grad``; not in place, for a kept graph."""
        saved = iter(ctx.saved_tensors)
        # The comparison is free on a CPU; elsewhere it would wait for the device.
        same = grad.device.type == "cpu" and grad.item() == 1
        made = [next(saved) if present else None for present in ctx.present]
        return (None, *(x if x is None or same else x * grad for x in made))


def _differentiate(
    objective: Objective, stats: RowStats, scale: Tensor
) -> tuple[Tensor, dict[str, Tensor | None], dict[Extra, tuple[Tensor | None, ...]]]:
    """Loss of each row, and the derivative of its sum in each statistic."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in stats.tensors()]
        own = stats.replaced(leaves)
        loss = objective.rows(own) * scale
        inputs = _differentiable(own)
        none: tuple[Tensor | None, ...] = (None,) * len(inputs)
        grads = (
            torch.autograd.grad(loss.sum(), inputs, allow_unused=True)
            if loss.requires_grad
            else none
        )
    it = iter(grads)
    by_name = {name: next(it) for name in DIFFERENTIABLE}
    by_extra = {extra: tuple(next(it) for _ in values) for extra, values in own.extras.items()}
    return loss.detach(), by_name, by_extra
