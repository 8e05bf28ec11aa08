"""The plan of a step as a function: what a memory budget buys, before anything is multiplied."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from bgkernels.functional import objective_of
from bgkernels.loss.forecast import StepPlan, forecast
from bgkernels.loss.objective import Divergence
from bgkernels.loss.options import Options, Routing
from bgkernels.loss.reduction import posed
from bgkernels.teachers import Teacher


def plan(
    input: Tensor,
    linear_weight: Tensor,
    teacher: Teacher | None,
    target: Tensor | str,
    *,
    linear_bias: Tensor | None = None,
    divergence: str | Divergence = "forward_kl",
    routing: Routing = "entropy",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
    vocab_group: ProcessGroup | None = None,
    memory_budget: int | None = None,
    mode: str = "auto",
    backend: str = "auto",
    seed: int | None = None,
    return_stats: bool = False,
) -> StepPlan:
    """How :func:`linear_hybrid_distillation` would run with these arguments; nothing is computed.

    Values of tensors do not matter but for labels, which are checked; shapes, dtypes, device, and
    which tensors ask for a gradient do. A plan also depends on the number of threads.

    Returns:
        :class:`StepPlan`.

    Raises:
        TypeError, ValueError, NotImplementedError: as the loss does.

    Example:
        >>> import torch, bgkernels as bg
        >>> x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
        >>> w = torch.randn(5000, 32, dtype=torch.bfloat16, requires_grad=True)
        >>> teacher = bg.LinearTeacher(x.detach(), w.detach())
        >>> labels = torch.randint(5000, (64,))
        >>> ample = bg.plan(x, w, teacher, labels)
        >>> ample.mode, ample.products
        ('fused', 4.0)
        >>> tight = bg.plan(x, w, teacher, labels, memory_budget=ample.bytes // 4)
        >>> tight.products > 4 and tight.bytes < ample.bytes
        True
    """
    options = Options.of(locals())
    objective = objective_of(options)
    student = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    problem = posed(student, teacher, target, options, objective, return_stats=return_stats)
    return forecast(problem, objective, options)
