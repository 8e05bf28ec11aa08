"""This module goes from the caller's tensors to the loss: mode, normaliser, reduction."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bgkernels.loss import compiled
from bgkernels.loss.autograd import FusedLoss, RowStatistics, needs_of
from bgkernels.loss.dtensor import plain
from bgkernels.loss.objective import Objective, blend
from bgkernels.loss.options import Options
from bgkernels.loss.pose import pose
from bgkernels.rows.arithmetic import SKIP
from bgkernels.rows.extras import Extra
from bgkernels.rows.stats import AT_ONE, ExtraValues, RowStats, distinct
from bgkernels.streaming import checks
from bgkernels.streaming.driver import Matrices
from bgkernels.streaming.planner import BudgetError
from bgkernels.streaming.problem import Problem

Loss = Tensor | tuple[Tensor, RowStats]


def hybrid_loss(
    student: dict[str, Tensor | None],
    teacher: object,
    target: object,
    options: Options,
    objective: Objective,
    *,
    token_weight: Tensor | None,
    num_items: int | Tensor | None,
    return_stats: bool,
    overwrite: bool = False,
    weight_grad: Tensor | None = None,
) -> Loss:
    """Return the loss of the caller's tensors, and the statistics if they are asked for."""
    problem = posed(student, teacher, target, options, objective, return_stats=return_stats)
    problem = with_weight_grad(problem, student, weight_grad)
    weight, divisor = _weight(problem, token_weight), _divisor(problem, options, num_items)
    matrices = None
    if is_fused(problem, objective, options):
        box: list[Matrices] = []
        factors = weight, divisor
        try:
            loss = FusedLoss.apply(problem, objective, *factors, overwrite, box, *problem.student)
            (matrices,) = box
        except BudgetError:  # recompute mode needs less
            if options.mode == "fused":
                raise
    if matrices is None:
        matrices = row_statistics(problem)
        blocks = problem.statistics(*matrices)
        pairs = objective.seen(problem, blocks, problem.connected(blocks, matrices[0]))
        part_weights = problem.teacher.part_weights([s for s, _ in pairs], slice(None))
        rows = objective.rows(pairs, part_weights) * weight
        none = options.reduction == "none"
        loss = rows.reshape(problem.leading) if none else (rows / divisor).sum()
    loss = loss.to(problem.dtype)
    return (loss, _shown(problem, objective, matrices)) if return_stats else loss


def posed(
    student: dict[str, Tensor | None],
    teacher: object,
    target: object,
    options: Options,
    objective: Objective,
    *,
    return_stats: bool,
) -> Problem:
    """Pose the problem of a loss: its rows, checked, with the statistics that it reads."""
    at_one = return_stats or getattr(teacher, "weighs_statistics", False)
    extras, reads_teacher = objective.extras(at_one=at_one), objective.policy.uses_teacher
    logit_sum = options.label_smoothing > 0 or return_stats
    caller = student, teacher, target, options
    problem = pose(*caller, extras, reads_teacher=reads_teacher, logit_sum=logit_sum)
    if problem.teacher.excludes_columns:
        objective.refuse_infinite()
    return problem


def with_weight_grad(
    problem: Problem, student: dict[str, Tensor | None], weight_grad: Tensor | None
) -> Problem:
    """Return the problem with the caller's sum of dW, checked."""
    if weight_grad is None:
        return problem
    weight = student["linear_weight"]
    assert weight is not None
    if torch.compiler.is_compiling() or type(weight).__name__ == "DTensor":
        raise NotImplementedError(
            "`weight_grad` works neither under torch.compile nor with a DTensor `linear_weight`; "
            "call the loss outside of torch.compile, or leave `weight_grad` out"
        )
    checks.tensor("weight_grad", weight_grad)
    checks.shape("weight_grad", weight_grad, tuple(weight.shape), "that of `linear_weight`")
    checks.same_device(problem.labels, weight_grad=weight_grad)
    if weight_grad.dtype != problem.dtype or not weight_grad.is_contiguous():
        raise ValueError(
            f"`weight_grad` must be contiguous and {problem.dtype}; got {weight_grad.dtype} with "
            f"strides {weight_grad.stride()}"
        )
    if weight_grad.requires_grad or (torch.is_grad_enabled() and not weight.requires_grad):
        raise ValueError(
            "`weight_grad` must not require grad, and `linear_weight` must, whose gradient it "
            f"gets; got {weight_grad.requires_grad} and {weight.requires_grad}"
        )
    return replace(problem, weight_grad=weight_grad)


def row_statistics(problem: Problem) -> Matrices:
    """Return both matrices of statistics, whose gradient recompute mode gives."""
    if torch.compiler.is_compiling():
        return compiled.row_statistics_of(problem)
    matrices: Matrices = RowStatistics.apply(problem, *problem.student)
    return matrices


def row_stats(
    student: dict[str, Tensor | None],
    teacher: object,
    target: object,
    options: Options,
    extras: tuple[Extra, ...] = (),
) -> RowStats:
    """Return the statistics of the caller's tensors, at the temperature of the options."""
    weighed = options.temperature != 1 and getattr(teacher, "weighs_statistics", False)
    wanted = distinct((*extras, AT_ONE)) if weighed else extras
    caller = student, teacher, target, options
    problem = pose(*caller, wanted, reads_teacher=teacher is not None, logit_sum=True)
    matrices = row_statistics(problem)
    blocks = problem.statistics(*matrices)
    pairs = problem.seen(blocks, problem.connected(blocks, matrices[0]))
    views = [s.at_one(options.temperature, ()) if weighed else s for s, _ in pairs]
    stats = shaped(problem, blend(pairs, problem.teacher.part_weights(views, slice(None))))
    values = ExtraValues([(extra, stats.extras[extra]) for extra in extras])
    return replace(stats, extras=values)


def shaped(problem: Problem, stats: RowStats) -> RowStats:
    """Return statistics as the caller sees them: in the input's leading shape, in fp32."""
    tensors = (x.reshape(problem.leading) for x in stats.tensors())
    stats = stats.replaced(x.to(problem.dtype) if x.is_floating_point() else x for x in tensors)
    if stats.matched is None:
        return stats
    return replace(stats, matched=stats.matched.reshape(problem.leading))


def _shown(problem: Problem, objective: Objective, matrices: Matrices) -> RowStats:
    """Return what ``return_stats`` shows: what policies saw, detached."""
    values, ints = matrices
    pairs = objective.seen(problem, problem.statistics(values.detach(), ints))
    weights = problem.teacher.part_weights([s for s, _ in pairs], slice(None))
    return shaped(problem, blend(pairs, weights))


def is_fused(problem: Problem, objective: Objective, options: Options) -> bool:
    """Tell whether the gradient is computed in the forward pass."""
    blocker = None
    if options.reduction == "none":
        blocker = "reduction='none', whose upstream gradients are known in backward only"
    elif problem.weight_grad is not None and needs_of(problem.student, ()).held:
        blocker = "`weight_grad` beside fp16 tensors, whose loss scale is known in backward only"
    elif objective.policy.batchwide:
        blocker = f"the policy {objective.policy.name!r}, which sees all tokens at once"
    if torch.compiler.is_compiling():
        blocker = "torch.compile, which traces the objective between two ops"
    if options.mode == "fused" and blocker:
        raise ValueError(f"mode='fused' cannot serve {blocker}; use mode='recompute' or 'auto'")
    gradient = any(map(checks.wants_gradient, problem.student))
    return options.mode != "recompute" and blocker is None and gradient


def _weight(problem: Problem, token_weight: Tensor | None) -> Tensor | float:
    """Return the factors of the tokens, ``(rows,)``, or 1."""
    if token_weight is None:
        return 1.0
    weight = checks.tensor("token_weight", plain("token_weight", token_weight))
    checks.shape("token_weight", weight, problem.leading, "the input's leading shape")
    checks.same_device(problem.labels, token_weight=weight)
    return weight.detach().reshape(-1).double()


def _divisor(problem: Problem, options: Options, num_items: int | Tensor | None) -> Tensor | float:
    """Return the one normaliser: a number, where no device has to be waited for."""
    labels = problem.labels
    if options.reduction != "mean":
        if num_items is not None:
            raise ValueError(
                "`num_items` is the divisor of reduction='mean'; "
                f"got reduction={options.reduction!r}"
            )
        return 1.0
    if num_items is None and problem.items is not None:
        return float(max(problem.items, 1))
    if num_items is None:
        count = (labels != SKIP).sum()
        looks = checks.legible(labels)
        return float(max(int(count), 1)) if looks else count.clamp_min(1).double()
    num_items = plain("num_items", num_items)
    if isinstance(num_items, Tensor):
        checks.shape("num_items", num_items, (), "a number or a scalar tensor")
        return num_items.detach().to(labels.device, torch.float64)
    checks.number("num_items", num_items, low=0, open_low=True)
    return float(num_items)
