"""The one loop: each chunk of rows walks the vocabulary forwards, then backwards.

Forwards for the statistics, backwards for the gradient: the last tiles written are the first read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bgkernels.rows.caching import Bounded
from bgkernels.rows.stats import Statistics
from bgkernels.streaming import gemm, memory
from bgkernels.streaming.deferred import DeferringHead
from bgkernels.streaming.heads import Head, LinearHead, Needs, head_demand, make_head
from bgkernels.streaming.inline import inline_bytes
from bgkernels.streaming.kept import Codes, Kept, Loan, codable
from bgkernels.streaming.planner import BudgetError, Plan, Workload, plan
from bgkernels.streaming.problem import Problem, Tensors
from bgkernels.streaming.teachers.base import Comparison
from bgkernels.streaming.tiles import Tiles

Matrices = tuple[Tensor, Tensor]
"""Values and integers of all statistics, ``(·, rows)``: see :meth:`Problem.statistics`."""
Derivative = Callable[[list[Statistics], Tensor, slice], Tensor]
"""From a chunk's statistics, all their values as one matrix, and its rows, to the derivatives by
these values, ``(fields, rows)``."""


def run(
    problem: Problem,
    needs: Needs = Needs(),
    derivative: Derivative | None = None,
    *,
    known: Matrices | None = None,
    gradient: Tensor | None = None,
) -> tuple[Matrices, Tensors]:
    """Walk all chunks.

    Args:
        problem: what to compute.
        needs: gradients of the student's tensors to gather.
        derivative: called once a chunk between the passes; None runs pass 1 alone.
        known: statistics of an earlier walk: pass 1 is left out.
        gradient: where the gradient of given logits goes.

    Returns:
        The statistics of all rows, and the gradients of the student's tensors.
    """
    backward = derivative is not None
    p = planned(problem, needs, statistics=known is None, backward=backward)
    needs = needs if backward else Needs()
    student: Head
    if p.deferred:
        student = DeferringHead(problem, needs, p)
    else:
        student = make_head(problem.student, problem, needs, p, gradient)
    loan = None
    if p.lent and isinstance(student, LinearHead) and student.grad_weight is not None:
        loan = Loan(student.grad_weight, p.lent, p.slot_bytes)
    inline = student if p.inline and isinstance(student, LinearHead) else None
    kept = Kept(loan, Codes(p, problem, loan) if p.coded else None, inline)
    tiles = Tiles(student, p, p.tiles(), problem.labels.device, kept)
    comparisons = [part.walk(problem, p, kept) for part in problem.teacher.parts]
    scratch = Scratch(student, len(comparisons), problem, p) if backward else None
    values, ints = known or problem.unwritten()
    groups, derivatives = p.tile_groups(), dict[int, Tensor]()  # of chunks, by their first rows
    for group in groups:
        again = known is not None or group is not groups[0]
        student.end()
        student.begin(tiles.span(group))
        for rows in p.chunks():
            blocks = problem.statistics(values[:, rows], ints[:, rows])
            tiles.start(rows)
            for comparison, block in zip(comparisons, blocks, strict=True):
                comparison.start(rows, problem.labels[rows], block, known=again)
            if not again:
                for i in range(len(tiles.columns)):
                    x = tiles.wanted(i)
                    for comparison in comparisons:
                        comparison.absorb(i, x)
                for comparison in comparisons:
                    comparison.close()
                read_again(tiles, comparisons)
            if derivative is not None and scratch is not None:
                if rows.start not in derivatives:
                    derivatives[rows.start] = derivative(blocks, values[:, rows], rows)
                open_backward(comparisons, blocks, derivatives[rows.start])
                backward_tiles(tiles, comparisons, student, scratch, group)
                student.finish(problem.shard, group is groups[-1])
    del kept, tiles, comparisons, scratch  # their buffers, before the gradients are narrowed
    student.end()
    return (values, ints), student.gradients(p.columns)


def gradient_of(problem: Problem, needs: Needs, grads: Tensor, known: Matrices) -> Tensors:
    """Pass 2 alone, the logits multiplied again.

    Where the budget holds no walk that gathers all gradients, that of the input has one of its own.

    Args:
        problem: of the statistics.
        needs: which of the student's tensors get a gradient.
        grads: ``(fields, rows)``, the derivative of the loss by each value.
        known: the statistics.
    """
    first = problem.student[0]
    assert first is not None
    given = len(problem.student) == 1
    target = memory.empty(first.shape, first.dtype, first.device) if given else None
    grads = grads.contiguous()  # the gradient of a sum has no strides

    def walk(needs: Needs) -> Tensors:
        return run(
            problem, needs, lambda _, __, rows: grads[:, rows], known=known, gradient=target
        )[1]

    walks = [walk(part) for part in backward_walks(problem, needs)]
    if len(walks) == 1:
        return walks[0]
    (dx, *_), (_, *others) = walks
    return (dx, *others)


def backward_walks(problem: Problem, needs: Needs) -> list[Needs]:
    """What each walk gathers that goes backwards alone: all, or dX and then the others."""
    try:
        planned(problem, needs, statistics=False, backward=True)
    except BudgetError:
        if not (needs.input and needs.weight):
            raise
        return [Needs(input=True), needs._replace(input=False)]
    return [needs]


def read_again(tiles: Tiles, comparisons: Sequence[Comparison]) -> None:
    """The second read of pass 1, where one is wanted; it begins where the first ended."""
    again = [comparison for comparison in comparisons if comparison.second_read]
    for i in reversed(range(len(tiles.columns))) if again else ():
        x = tiles.wanted(i)
        for comparison in again:
            comparison.absorb(i, x)
    for comparison in again:
        comparison.close()


class Scratch:
    """Buffers of pass 2: a tile's gradient in the dtype of products, and sums over teachers."""

    def __init__(self, student: Head, comparisons: int, problem: Problem, p: Plan) -> None:
        device, size = problem.labels.device, p.chunk * p.width
        self.narrow = torch.empty(0, device=device)
        if isinstance(student, LinearHead) and student.product != student.dtype and not p.deferred:
            self.narrow = torch.empty(size, dtype=student.product, device=device)
        count = min(comparisons - 1, 2) * student.differentiated
        self.sums = torch.empty(count, size, dtype=problem.dtype, device=device)


def open_backward(
    comparisons: Sequence[Comparison], blocks: Sequence[Statistics], grads: Tensor
) -> None:
    """Give each comparison the derivatives by its statistics."""
    first = 0
    for comparison, block in zip(comparisons, blocks, strict=True):
        end = first + block.values.size(0)
        comparison.open_vjp(grads[first:end])
        first = end


def backward_tiles(
    tiles: Tiles, comparisons: Sequence[Comparison], student: Head, scratch: Scratch, group: range
) -> None:
    """Pass 2, and the products with its result. The last tiles written are the first read."""
    *others, last = comparisons
    for i in reversed(group):
        x, columns = tiles.wanted(i), tiles.columns[i]
        d = student.gradient_tile(columns, x, scratch.narrow)
        sums = [gemm.matrix(buffer, *x.shape) for buffer in scratch.sums] if others else []
        for k, comparison in enumerate(others):
            comparison.vjp(i, x, sums[min(k, 1)])
            if k:
                sums[0] += sums[1]
        last.vjp(i, x, d)  # may be written over the tile, which nobody else reads any more
        if others:
            d += sums[0]
        student.backward(columns, d)


PLANS: Bounded[Plan] = Bounded()
"""Of problems whose shapes were seen before."""


def planned(problem: Problem, needs: Needs, *, statistics: bool, backward: bool) -> Plan:
    """The tiling of this process's columns."""
    teacher, shard = problem.teacher, problem.shard
    tensors = (*problem.student, *teacher.tensors)
    shapes = tuple(None if x is None else (x.shape, x.dtype) for x in tensors)
    halves = problem.autocast is not None or any(x and x[1].itemsize == 2 for x in shapes)
    way = gemm.way() if halves else None
    kinds = tuple((type(part), part.memory) for part in teacher.parts)
    key = (
        problem.spec, problem.backend.name, problem.budget, problem.autocast, shard.edges,
        shard.rank, problem.labels.device, way, needs, statistics, backward, kinds, shapes,
        problem.weight_grad is None,
    )  # fmt: skip
    if key not in PLANS:
        work = workload(problem, needs, statistics=statistics, backward=backward)
        whole = plan(work, problem.budget)
        PLANS[key] = replace(whole, columns=shard.own(problem.spec.columns))
    return PLANS[key]


def workload(problem: Problem, needs: Needs, *, statistics: bool, backward: bool) -> Workload:
    """Sizes of a problem, for the planner."""
    spec, shard = problem.spec, problem.shard
    first, *others = problem.student
    assert first is not None
    demand, teacher = head_demand(problem.student, problem), problem.teacher
    tile_bytes = problem.backend.scratch_bytes
    tile_bytes += min(len(teacher.parts) - 1, 2) * 4 * backward
    row_bytes = sum_bytes = grad_bytes = input_sum_bytes = scratch = sum_scratch = 0
    gradient, weight_bytes, deferrable = first.dtype, demand.weight_bytes, False
    if others and (weight := others[0]) is not None:
        product = problem.product(first)
        wide, narrow = demand.logit_bytes != product.itemsize, weight.dtype.itemsize < 4
        tile_bytes += product.itemsize * (wide and backward)
        gradient, sum_scratch = product, gemm.sum_scratch_bytes(product, first.device)
        row_bytes = demand.hidden * (4 + sum_scratch) * (backward and needs.input)
        input_sum_bytes = first.numel() * 4 * (backward and needs.input)
        owned = problem.weight_grad
        to = needs.dtype(weight.dtype) if owned is None else owned.dtype
        narrow &= owned is None
        scratch = max(gemm.scratch_bytes(product, to, first.device), sum_scratch)
        scratch *= backward and needs.weight
        deferrable = first.device.type == "cuda" and product == first.dtype == weight.dtype
        deferrable &= needs.weight and statistics and backward and shard.group is None
        if first.device.type == "cpu":  # its libraries pack operands of either head in as much
            weight_bytes, scratch = weight_bytes + scratch, 0
        sum_bytes = shard.largest(shard.columns) * demand.hidden * 4 * (narrow and needs.weight)
        if shard.group is None and owned is None:  # one plan must fit every rank's gradient
            grad_bytes = demand.hidden * to.itemsize * needs.weight
    operands = [x for x in (*problem.student, *teacher.tensors) if x is not None]
    theirs = teacher.parts[0].demand(problem)
    for part in teacher.parts[1:]:
        theirs += part.demand(problem)
    return Workload(
        rows=len(problem.labels),
        columns=shard.largest(spec.columns),
        compared=shard.largest(spec.compared),
        hidden_s=demand.hidden,
        hidden_t=theirs.hidden,
        logit_bytes=demand.logit_bytes + theirs.logit_bytes,
        tile_bytes=tile_bytes + theirs.tile_bytes,
        weight_bytes=max(weight_bytes, theirs.weight_bytes),
        row_bytes=row_bytes + demand.row_bytes + theirs.row_bytes,
        weight_sum_bytes=sum_bytes,
        weight_grad_bytes=grad_bytes,
        input_sum_bytes=input_sum_bytes,
        grad_products=needs.input + needs.weight,
        statistics=statistics,
        backward=backward,
        reads=1 + spec.second_read,
        device=first.device.type,
        codable=codable(problem),
        inline=inline_bytes(problem),
        packing=gemm.packing_bytes(map(problem.product, operands), first.device),
        scratch_bytes=scratch,
        sum_traffic=16 if sum_scratch else 8,
        gradient_bytes=gradient.itemsize,
        weight_owned=problem.weight_grad is not None,
        deferrable=deferrable,
    )
