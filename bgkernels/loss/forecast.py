"""A forecast says what a step would do: its walks, their tiles and bytes, how it multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bgkernels.backends.native import products
from bgkernels.loss.autograd import needs_of
from bgkernels.loss.objective import Objective
from bgkernels.loss.options import Options
from bgkernels.loss.reduction import is_fused
from bgkernels.streaming import checks, cost, gemm
from bgkernels.streaming.driver import backward_walks, planned, workload
from bgkernels.streaming.heads import Needs
from bgkernels.streaming.planner import BudgetError, Plan, Workload
from bgkernels.streaming.problem import Problem


@dataclass(frozen=True)
class Walk:
    """A walk visits all tiles of the vocabulary, forwards and back, for each chunk of rows.

    Attributes:
        chunks, rows: number of chunks of rows, and of rows in each.
        tiles, columns: number of tiles of columns, and of columns in each.
        kept: number of tiles that stay in memory between the passes; others are multiplied again.
        coded: number of kept tiles that take four bytes per pair of logits instead of eight.
        bytes: bytes of temporaries.
        products: number of matrix products; one has all rows, all columns and one model's width.
        seconds: expected time of the walk, without the loss function; None on a GPU, where nothing
            was measured.
    """

    chunks: int
    rows: int
    tiles: int
    columns: int
    kept: int
    coded: int
    bytes: int
    products: float
    seconds: float | None


@dataclass(frozen=True)
class StepPlan:
    """A step plan says how a step would run; :func:`bgkernels.plan` returns it.

    Attributes:
        mode: ``"fused"``: one walk gives loss and gradient. ``"recompute"``: the forward pass is a
            walk, and backward one or two more. ``"evaluation"``: no gradient is required.
        walks: the walks, in their order.
        multiplied: how operands are multiplied: ``"torch"``, or on a CPU in 16 bits ``"brgemm"``,
            ``"cblas"`` or ``"widen"``.
        reason: why no faster way is taken; empty if there is none.
    """

    mode: str
    walks: tuple[Walk, ...]
    multiplied: str
    reason: str

    @property
    def bytes(self) -> int:
        """Bytes of temporaries, at most."""
        return max(walk.bytes for walk in self.walks)

    @property
    def products(self) -> float:
        """GEMM-equivalents of all walks; four are the least of a step with two heads."""
        return sum(walk.products for walk in self.walks)

    @property
    def seconds(self) -> float | None:
        """Expected time of all walks, from the rate of this machine's products; None on a GPU.

        It is a model's, good for a comparison of budgets: within a third or so.
        """
        times = [walk.seconds for walk in self.walks]
        return None if None in times else sum(x for x in times if x is not None)


def forecast(problem: Problem, objective: Objective, options: Options) -> StepPlan:
    """Return the plan of a loss.

    Raises:
        BudgetError: nothing fits the memory budget.
    """
    needs = needs_of(problem.student, [checks.wants_gradient(x) for x in problem.student])
    mode, walks = "recompute" if needs.any else "evaluation", []
    if is_fused(problem, objective, options):
        try:
            p = planned(problem, needs, statistics=True, backward=True)
            mode, walks = "fused", [_walk(problem, p, needs, statistics=True, backward=True)]
        except BudgetError:
            if options.mode == "fused":
                raise
    if not walks:
        p = planned(problem, Needs(), statistics=True, backward=False)
        walks.append(_walk(problem, p, Needs(), statistics=True, backward=False))
        for walk_needs in backward_walks(problem, needs) if needs.any else ():
            p = planned(problem, walk_needs, statistics=False, backward=True)
            walks.append(_walk(problem, p, walk_needs, statistics=False, backward=True))
    return StepPlan(mode, tuple(walks), *_multiplied(problem))


def _walk(problem: Problem, p: Plan, needs: Needs, *, statistics: bool, backward: bool) -> Walk:
    sources = problem.student, *(t.tensors for t in problem.teacher.heads)
    heads = sum(len(tensors) > 1 for tensors in sources)
    tiles = len(p.tiles())
    reads = (1 + problem.spec.second_read) * statistics + backward
    gradients = (needs.input + needs.weight) * (len(problem.student) > 1)
    multiplied = heads * (1 + p.repeated(reads)) + gradients * backward
    size = p.chunk_count, p.chunk, tiles, p.width, p.kept, p.coded, p.bytes
    work = workload(problem, needs, statistics=statistics, backward=backward)
    return Walk(*size, products=round(multiplied, 3), seconds=_seconds(problem, work, p))


def _seconds(problem: Problem, work: Workload, p: Plan) -> float | None:
    first = problem.student[0]
    assert first is not None
    if first.device.type != "cpu":
        return None
    dtype = problem.product(first)
    return cost.seconds(work, p, gemm.rate(dtype), torch.get_num_threads())


def _multiplied(problem: Problem) -> tuple[str, str]:
    first = problem.student[0]
    assert first is not None
    dtype = problem.operand(first)
    if first.device.type == "cpu" and dtype in products.HALVES:
        return products.chosen(dtype), products.reasons(dtype)
    if first.device.type == "cpu" and dtype == torch.float32:
        return "torch", "fp32 operands"
    return "torch", ""
