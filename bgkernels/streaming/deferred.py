"""Gradients of tiles wait in memory, so that one product over all rows makes a tile's dW."""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.streaming import gemm
from bgkernels.streaming.heads import LinearHead, Needs
from bgkernels.streaming.kept import Loan
from bgkernels.streaming.planner import Plan
from bgkernels.streaming.problem import Problem


class DeferringHead(LinearHead):
    """A student's head that multiplies dW at the end of a group of columns, tile by tile.

    Args:
        problem: the rows, of a student whose tensors are multiplied in their own dtype.
        needs: which gradients to gather, that of the weight among them.
        plan: with deferred tiles. The last of them wait in the gradient of the weight: each before
            the place where its own dW is written, and dW is written from its end.
    """

    def __init__(self, problem: Problem, needs: Needs, plan: Plan) -> None:
        hidden, weight, bias = problem.student
        assert hidden is not None and weight is not None
        product, owned = problem.product(hidden), problem.weight_grad
        super().__init__(hidden, weight, bias, product, needs, 1, plan.groups, owned)
        self.width, size = plan.width, self.rows * plan.width
        own = torch.empty(plan.deferred - plan.deposited, size, dtype=product, device=hidden.device)
        self.slots = list(own)
        if self.grad_weight is not None:
            loan = Loan(self.grad_weight, plan.deposited, size * product.itemsize)
            self.slots += loan.slots(size, product)
        self.waiting: dict[int, Tensor] = {}  # (rows, width) by first column, the last tile first

    def gradient_tile(self, columns: slice, tile: Tensor, buffer: Tensor) -> Tensor:
        """The chunk's rows of the place where a tile's gradient waits."""
        first, width = columns.start, columns.stop - columns.start
        slot = self.slots[(first - self.group.start) // self.width]
        self.waiting[first] = gemm.matrix(slot, self.rows, width)
        return self.waiting[first][self.chunk]

    def add_weight(self, columns: slice, d: Tensor) -> None:
        """Leave it where it waits."""

    def end(self) -> None:
        """End a group of columns: all rows of its gradients are there."""
        self.x = self.hidden
        for first, d in self.waiting.items():
            super().add_weight(slice(first, first + d.shape[1]), d)
        self.waiting.clear()
        super().end()
