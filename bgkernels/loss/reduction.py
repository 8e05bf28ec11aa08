"""From rows to the loss: the choice of mode, the one normaliser, and the reduction."""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.loss import checks
from bgkernels.loss.autograd import FusedLoss
from bgkernels.loss.dtensor import plain
from bgkernels.loss.objective import Objective
from bgkernels.loss.options import Options
from bgkernels.loss.passes import Fused, views
from bgkernels.loss.problem import Problem
from bgkernels.rows.state import SKIP
from bgkernels.rows.stats import RowStats
from bgkernels.streaming.driver import Outcomes
from bgkernels.streaming.planner import BudgetError
from bgkernels.streaming.sources import View, trusted


def reduce(
    problem: Problem,
    objective: Objective,
    options: Options,
    *,
    token_weight: Tensor | None,
    num_items: int | Tensor | None,
    overwrite: bool = False,
) -> tuple[Tensor, RowStats]:
    """The loss, and the statistics, detached, with the input's leading shape."""
    weight = _weight(problem, token_weight)
    divisor = _divisor(problem, options.reduction, num_items)
    made = None
    if _fused(problem, objective, options):
        job = Fused(problem.call, objective, weight / divisor, problem.trust, overwrite)
        try:
            made = _in_one_pass(problem, job)
        except BudgetError:  # recompute mode needs less
            if options.mode == "fused":
                raise
    if made is not None:
        loss, seen = made
    else:
        seen = problem.views()
        rows = objective.rows(seen, trusted(problem.trust, seen)) * weight
        none = options.reduction == "none"
        loss = rows.reshape(problem.leading) if none else (rows / divisor).sum()
    stats = problem.shaped(seen)
    return loss.to(problem.wide), stats.replaced([x.detach() for x in stats.tensors()])


def _in_one_pass(problem: Problem, job: Fused) -> tuple[Tensor, list[View]]:
    """The loss, its gradient computed beside it, and what is seen of the teachers."""
    box: list[Outcomes] = []
    loss: Tensor = FusedLoss.apply(job, problem.teacher, problem.labels, box, *problem.student)
    return loss, views(problem.call, box[0])


def _fused(problem: Problem, objective: Objective, options: Options) -> bool:
    """Whether the gradient is computed in the forward pass."""
    blocker = None
    if options.reduction == "none":
        blocker = "reduction='none', whose upstream gradients are known in backward only"
    elif objective.policy.batchwide:
        blocker = f"the policy {objective.policy.name!r}, which sees all tokens at once"
    if torch.compiler.is_compiling():
        blocker = "torch.compile, which traces the objective between two ops"
    if options.mode == "fused" and blocker:
        raise ValueError(f"mode='fused' cannot serve {blocker}; use mode='recompute' or 'auto'")
    return options.mode != "recompute" and blocker is None and problem.wants_gradient


def _weight(problem: Problem, token_weight: Tensor | None) -> Tensor:
    if token_weight is None:
        return torch.ones((), dtype=torch.float64, device=problem.labels.device)
    weight = checks.tensor("token_weight", plain("token_weight", token_weight))
    checks.shape("token_weight", weight, problem.leading, "the input's leading shape")
    checks.same_device(problem.labels, token_weight=weight)
    return weight.detach().reshape(-1).double()


def _divisor(problem: Problem, reduction: str, num_items: int | Tensor | None) -> Tensor:
    labels = problem.labels
    if reduction != "mean":
        if num_items is not None:
            raise ValueError(
                f"`num_items` is the divisor of reduction='mean'; got reduction={reduction!r}"
            )
        return torch.ones((), dtype=torch.float64, device=labels.device)
    if num_items is None:
        return (labels != SKIP).sum().clamp_min(1).double()
    num_items = plain("num_items", num_items)
    if isinstance(num_items, Tensor):
        checks.shape("num_items", num_items, (), "a number or a scalar tensor")
        return num_items.detach().to(labels.device, torch.float64)
    checks.number("num_items", num_items, low=0, open_low=True)
    return torch.full((), float(num_items), dtype=torch.float64, device=labels.device)
