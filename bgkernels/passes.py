"""The two passes as functions from tensors to tensors, for autograd and compiled graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bgkernels.backends.base import Composed, Composer, Tile
from bgkernels.driver import Call, Rows, Tensors, run
from bgkernels.heads import Needs
from bgkernels.objective import Objective
from bgkernels.spec import Extra
from bgkernels.state import empty
from bgkernels.stats import (
    DIFFERENTIABLE,
    Coefficients,
    Final,
    RowStats,
    assemble,
    finalize,
    vjp_coefficients,
)

Grads = dict[str, Tensor | None]
ExtraGrads = dict[Extra, tuple[Tensor | None, ...]]


def differentiable(stats: RowStats) -> list[Tensor]:
    """The tensors of statistics that carry a gradient."""
    return [getattr(stats, n) for n in DIFFERENTIABLE] + [
        x for v in stats.extras.values() for x in v
    ]


def statistics(call: Call, rows: Rows) -> Final:
    """Pass 1."""
    return run(rows, call)[0]


def gradient(
    call: Call, rows: Rows, flat: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Needs
) -> Tensors:
    """Pass 2, the logits multiplied again.

    Args:
        flat: ``Final.flat()`` of pass 1.
        grads: derivative of the loss by each of ``RowStats.tensors()``, or None.
        needs: which of the student's tensors get a gradient.
    """
    final = assemble(call.spec, flat)
    upstream = final.stats.replaced(grads)  # type: ignore[arg-type]

    def derivative(chunk: Final, part: slice) -> Coefficients:
        own = {name: _cut(getattr(upstream, name), part) for name in DIFFERENTIABLE}
        extra = {e: tuple(_cut(x, part) for x in values) for e, values in upstream.extras.items()}
        return vjp_coefficients(chunk, own, extra, call.spec)

    first = rows.student[0]
    assert first is not None
    target = torch.empty_like(first) if len(rows.student) == 1 else None
    return run(rows, call, needs, derivative, given=final, gradient=target)[1]


def _cut(x: Tensor | None, part: slice) -> Tensor | None:
    return None if x is None else x[part]


@dataclass(frozen=True)
class Fused:
    """A loss to be computed together with its gradient.

    Args:
        call: of the rows.
        objective: the loss of a row.
        scale: ``(rows,)`` or ``()`` factor of each row's loss: token weight over normaliser.
        overwrite: write the gradient of given logits over them.
    """

    call: Call
    objective: Objective
    scale: Tensor
    overwrite: bool = False


def fused(job: Fused, rows: Rows, needs: Needs) -> tuple[Tensor, Final, Tensors]:
    """Both passes, chunk by chunk: the loss ``()``, the statistics, and the gradients."""
    losses: list[Tensor] = []
    scale = job.scale.expand(len(rows.labels))

    def derivative(final: Final, part: slice) -> Coefficients:
        loss, own, extra = _differentiate(job.objective, final.stats, scale[part])
        losses.append(loss)
        return vjp_coefficients(final, own, extra, job.call.spec)

    first, target = rows.student[0], None
    assert first is not None
    if len(rows.student) == 1:
        target = first if job.overwrite else torch.empty_like(first)
        if composed := _composed(job, rows, scale, target):
            return composed
    final, made = run(rows, job.call, needs, derivative, gradient=target)
    return torch.cat(losses).sum(), final, made


def _composed(
    job: Fused, rows: Rows, scale: Tensor, target: Tensor
) -> tuple[Tensor, Final, Tensors] | None:
    """The same, of given logits, where the backend does it at once."""
    backend, form, spec = job.call.backend, job.objective.closed_form, job.call.spec
    student, teacher = rows.student[0], rows.teacher[0] if rows.teacher else None
    assert student is not None
    if form is None or len(rows.teacher) > 1 or not isinstance(backend, Composer):
        return None
    compared = teacher[:, : spec.compared] if teacher is not None and spec.compared else None
    tile = Tile(student[:, : spec.columns], compared, 0, 0)
    state = empty(len(student), len(spec.tilts), dtype=torch.float32, device=student.device)
    out = target[:, : spec.columns]
    losses = backend.compose(state, out, tile, rows.labels, Composed(spec, form, scale))
    if losses is None:
        return None
    target[:, spec.columns :] = 0
    return losses.sum(), finalize(state, rows.labels, spec, job.call.ignore_index), (target,)


def _differentiate(
    objective: Objective, stats: RowStats, scale: Tensor
) -> tuple[Tensor, Grads, ExtraGrads]:
    """Loss of each row, and the derivative of its sum by each statistic."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in stats.tensors()]
        own = stats.replaced(leaves)
        loss = objective.rows(own) * scale
        inputs = differentiable(own)
        grads: Sequence[Tensor | None] = [None] * len(inputs)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss.sum(), inputs, allow_unused=True)
    it = iter(grads)
    by_name = {name: next(it) for name in DIFFERENTIABLE}
    by_extra = {extra: tuple(next(it) for _ in values) for extra, values in own.extras.items()}
    return loss.detach(), by_name, by_extra
