"""The two passes as functions from tensors to tensors, for autograd and compiled graphs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bgkernels.backends.base import Composed, Composer, Tile
from bgkernels.loss.objective import Objective
from bgkernels.rows.spec import Extra
from bgkernels.rows.state import empty
from bgkernels.rows.stats import DIFFERENTIABLE, RowStats, add_pairs, finalize
from bgkernels.rows.vjp import vjp_coefficients
from bgkernels.streaming.comparison import Outcome
from bgkernels.streaming.driver import (
    AllCoefficients,
    Call,
    Outcomes,
    Rows,
    Tensors,
    assembled,
    run,
)
from bgkernels.streaming.heads import Needs
from bgkernels.streaming.planner import BudgetError
from bgkernels.streaming.sources import Trust, View, trusted

Grads = dict[str, Tensor | None]
ExtraGrads = dict[Extra, tuple[Tensor | None, ...]]


def differentiable(stats: RowStats) -> list[Tensor]:
    """The tensors of statistics that carry a gradient."""
    return [getattr(stats, n) for n in DIFFERENTIABLE] + [
        x for v in stats.extras.values() for x in v
    ]


def all_stats(outcomes: Outcomes) -> list[RowStats]:
    """The statistics of every final, in order."""
    return [final.stats for outcome in outcomes for final in outcome.finals]


def views(call: Call, outcomes: Outcomes, stats: Iterable[RowStats] | None = None) -> list[View]:
    """What is seen of each teacher, by default of the outcomes' own statistics."""
    it = iter(all_stats(outcomes) if stats is None else stats)
    return [
        source.view(tuple(replace(final, stats=next(it)) for final in outcome.finals))
        for source, outcome in zip(call.sources, outcomes, strict=True)
    ]


def statistics(call: Call, rows: Rows) -> Outcomes:
    """Pass 1."""
    return run(rows, call)[0]


def gradient(
    call: Call, rows: Rows, flat: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Needs
) -> Tensors:
    """Pass 2, the logits multiplied again.

    Where the budget holds no walk that gathers all gradients, that of the weight has a walk of its
    own.

    Args:
        flat: :func:`~bgkernels.streaming.driver.flatten` of pass 1.
        grads: derivative of the loss by each of them, or None.
        needs: which of the student's tensors get a gradient.
    """
    upstream = assembled(call, grads)  # type: ignore[arg-type]

    def derivative(chunk: Outcomes, part: slice) -> AllCoefficients:
        return _coefficients(call, chunk, [_named(s, part) for s in all_stats(upstream)])

    first = rows.student[0]
    assert first is not None
    target = torch.empty_like(first) if len(rows.student) == 1 else None
    given = assembled(call, flat)

    def walk(needs: Needs) -> Tensors:
        return run(rows, call, needs, derivative, given=given, gradient=target)[1]

    try:
        return walk(needs)
    except BudgetError:
        if not (needs.input and needs.weight):
            raise
        (dx, *_), (_, *others) = walk(Needs(input=True)), walk(replace(needs, input=False))
        return (dx, *others)


def _named(upstream: RowStats, part: slice) -> tuple[Grads, ExtraGrads]:
    """Derivatives that stand where their statistics would."""

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[part]

    own = {name: cut(getattr(upstream, name)) for name in DIFFERENTIABLE}
    return own, {e: tuple(cut(x) for x in values) for e, values in upstream.extras.items()}


def _coefficients(
    call: Call, outcomes: Outcomes, grads: Iterable[tuple[Grads, ExtraGrads]]
) -> AllCoefficients:
    it = iter(grads)
    return [
        [
            vjp_coefficients(final, *next(it), spec)
            for final, spec in zip(outcome.finals, source.specs(call.spec), strict=True)
        ]
        for source, outcome in zip(call.sources, outcomes, strict=True)
    ]


@dataclass(frozen=True)
class Fused:
    """A loss to be computed together with its gradient.

    Args:
        call: of the rows.
        objective: the loss of a row.
        scale: ``(rows,)`` or ``()`` factor of each row's loss: token weight over normaliser.
        trust: the weights of several teachers.
        overwrite: write the gradient of given logits over them.
    """

    call: Call
    objective: Objective
    scale: Tensor
    trust: Trust = None
    overwrite: bool = False


def fused(job: Fused, rows: Rows, needs: Needs) -> tuple[Tensor, Outcomes, Tensors]:
    """Both passes, chunk by chunk: the loss ``()``, the statistics, and the gradients."""
    losses: list[Tensor] = []
    scale = job.scale.expand(len(rows.labels))

    def derivative(outcomes: Outcomes, part: slice) -> AllCoefficients:
        loss, grads = _differentiate(job, outcomes, scale[part], part)
        losses.append(loss)
        return _coefficients(job.call, outcomes, grads)

    first, target = rows.student[0], None
    assert first is not None
    if len(rows.student) == 1:
        target = first if job.overwrite else torch.empty_like(first)
        if composed := _composed(job, rows, scale, target):
            return composed
    outcomes, made = run(rows, job.call, needs, derivative, gradient=target)
    return torch.cat(losses).sum(), outcomes, made


def _composed(
    job: Fused, rows: Rows, scale: Tensor, target: Tensor
) -> tuple[Tensor, Outcomes, Tensors] | None:
    """The same, of given logits, where the backend does it at once."""
    call, form = job.call, job.objective.closed_form
    student, teacher = rows.student[0], rows.teacher[0] if rows.teacher else None
    assert student is not None
    plain = len(rows.teacher) <= 1 and call.shard.group is None
    if form is None or not plain or not isinstance(call.backend, Composer):
        return None
    (spec,) = call.sources[0].specs(call.spec)
    compared = teacher[:, : spec.compared] if teacher is not None and spec.compared else None
    tile = Tile(student[:, : spec.columns], compared, 0, 0)
    state = empty(len(student), len(spec.tilts), dtype=torch.float32, device=student.device)
    sums = state.floats.new_zeros(spec.pair_sums, len(student))
    out, composed = target[:, : spec.columns], Composed(spec, form, scale)
    losses = call.backend.compose(state, sums, out, tile, rows.labels, composed)
    if isinstance(losses, str):
        return None
    target[:, spec.columns :] = 0
    final = finalize(state, rows.labels, spec, call.ignore_index)
    return losses.sum(), (Outcome((add_pairs(final, sums, spec),)),), (target,)


def _differentiate(
    job: Fused, outcomes: Outcomes, scale: Tensor, part: slice
) -> tuple[Tensor, list[tuple[Grads, ExtraGrads]]]:
    """Loss of each row, and the derivative of its sum by each statistic."""
    with torch.enable_grad():
        own = [
            s.replaced([x.detach().requires_grad_(x.is_floating_point()) for x in s.tensors()])
            for s in all_stats(outcomes)
        ]
        seen = views(job.call, outcomes, own)
        loss = job.objective.rows(seen, trusted(job.trust, seen, part)) * scale
        inputs = [x for s in own for x in differentiable(s)]
        grads: Sequence[Tensor | None] = [None] * len(inputs)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss.sum(), inputs, allow_unused=True)
    it = iter(grads)
    return loss.detach(), [
        (
            {name: next(it) for name in DIFFERENTIABLE},
            {extra: tuple(next(it) for _ in values) for extra, values in s.extras.items()},
        )
        for s in own
    ]
