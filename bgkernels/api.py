"""The public functions: arguments in, checked and flattened; loss or statistics out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from bgkernels import backends, checks, divergences, routing
from bgkernels.autograd import Fused, FusedLoss, RowStatistics
from bgkernels.divergences import Divergence
from bgkernels.driver import Call, Tensors
from bgkernels.objective import Objective
from bgkernels.routing import Policy, Weight
from bgkernels.spec import Cap, Extra, RowSpec
from bgkernels.state import NONE, SKIP
from bgkernels.stats import Final, RowStats
from bgkernels.teachers import Teacher

Routing = str | Policy | Callable[[RowStats], tuple[Weight, Weight]]


class Common(TypedDict, total=False):
    """Keywords that every public function takes alike."""

    temperature: float
    logit_scale: float
    logit_softcap: float | None
    ignore_index: int
    vocab_size: int | None
    memory_budget: int | None
    backend: str
    seed: int | None


@dataclass(frozen=True)
class Prepared:
    """A call whose arguments fit each other: row tensors flattened to ``(rows, ·)``."""

    call: Call
    student: Tensors
    teacher: Tensors
    labels: Tensor
    leading: tuple[int, ...]

    def statistics(self) -> tuple[RowStats, Final]:
        """Row statistics in recompute mode, differentiable."""
        box: list[Final] = []
        tensors = (*self.teacher, *self.student)
        out = RowStatistics.apply(self.call, len(self.teacher), box, self.labels, *tensors)
        return box[0].stats.replaced(out), box[0]

    def shaped(self, stats: RowStats) -> RowStats:
        """Statistics with the input's leading shape."""
        return stats.replaced([x.reshape(self.leading) for x in stats.tensors()])


def prepare(
    student: Tensors, names: tuple[str, ...], teacher: Teacher | None, target: Tensor | str, extras: Sequence[Extra],
    *, reads_teacher: bool = True, logit_sum: bool = False, temperature: float = 1.0, logit_scale: float = 1.0,
    logit_softcap: float | None = None, ignore_index: int = -100, vocab_size: int | None = None,
    memory_budget: int | None = None, backend: str = "auto", seed: int | None = None,
) -> Prepared:  # fmt: skip
    """Check everything and flatten the rows.

    Args:
        student: ``(input, weight, bias | None)`` or ``(logits,)``; ``names`` are what the caller calls them.
        reads_teacher: False where neither loss nor weight looks at the teacher.
    """
    for name, x in zip(names, student, strict=True):
        if x is not None:
            checks.tensor(name, x)
    first = student[0]
    assert first is not None
    autocast = torch.get_autocast_dtype(first.device.type) if torch.is_autocast_enabled(first.device.type) else None
    if len(student) > 1:
        assert student[1] is not None
        checks.linear(names[0], first, student[1], student[2], mixed=autocast is not None)
    elif first.ndim < 1:
        raise ValueError(f"`{names[0]}` must be (..., vocab); got a scalar")
    columns = student[1].shape[0] if len(student) > 1 and student[1] is not None else first.shape[-1]
    leading = tuple(first.shape[:-1])
    label_from_teacher = isinstance(target, str)
    if teacher is None and (reads_teacher or label_from_teacher):
        raise ValueError("`teacher` is None, but the loss reads it; pass a teacher, or routing='hard' and an index target")
    if teacher is not None:
        teacher = checks.teacher(teacher, leading, mixed=autocast is not None)
        others = dict(zip(("teacher hidden", "teacher weight", "teacher bias"), teacher.tensors, strict=False))
        checks.same_device(first, **dict(zip(names[1:], student[1:], strict=True)), **others)
    else:
        checks.same_device(first, **dict(zip(names[1:], student[1:], strict=True)))
    if not (reads_teacher or label_from_teacher):
        teacher = None
    compared = min(columns, teacher.vocab) if teacher is not None else 0
    if vocab_size is not None:
        limit = compared if teacher is not None else columns
        if not 0 < vocab_size <= limit:
            raise ValueError(f"`vocab_size` must lie in [1, {limit}], the columns that both models have; got {vocab_size}")
        columns, compared = vocab_size, vocab_size if teacher is not None else 0
    target = checks.target(target, leading, columns, ignore_index)
    if isinstance(target, Tensor):
        checks.same_device(first, target=target)
    spec = RowSpec(
        columns=columns,
        compared=compared,
        temperature=checks.number("temperature", temperature, low=0, open_low=True),
        label_rule="index" if isinstance(target, Tensor) else target.removeprefix("teacher_"),
        seed=torch.initial_seed() if seed is None and target == "teacher_sample" else (seed or 0),
        student=_cap(logit_scale, logit_softcap),
        teacher=teacher.cap if teacher is not None else Cap(),
        extras=tuple(extras),
        logit_sum=logit_sum,
        positions=leading[-1] if leading else 1,
    )
    tensors = teacher.tensors if teacher is not None else ()
    dtypes = tuple(x.dtype for x in (first, tensors[0] if tensors else None) if x is not None)
    call = Call(spec, backends.select(backend, first.device, dtypes), _budget(memory_budget), ignore_index, autocast)
    labels = _labels(target, leading, spec, ignore_index, first.device)
    return Prepared(call, _rows(student), _rows(tensors), labels, leading)


def _cap(scale: float, softcap: float | None) -> Cap:
    scale = checks.number("logit_scale", scale)
    return Cap(scale, checks.number("logit_softcap", softcap, low=0, open_low=True) if softcap is not None else 0.0)


def _budget(memory_budget: int | None) -> int | None:
    if memory_budget is not None and (not isinstance(memory_budget, int) or memory_budget <= 0):
        raise ValueError(f"`memory_budget` must be a positive number of bytes, or None; got {memory_budget!r}")
    return memory_budget


def _rows(tensors: Tensors) -> Tensors:
    """Leading dimensions of the first tensor flattened; the last kept at stride 1."""
    if not tensors:
        return ()
    first, *rest = tensors
    assert first is not None
    flat = first.reshape(-1, first.shape[-1])
    return (flat if flat.stride(-1) == 1 or flat.numel() == 0 else flat.contiguous(), *rest)


def _labels(target: Tensor | str, leading: tuple[int, ...], spec: RowSpec, ignore: int, device: torch.device) -> Tensor:
    """Label codes of all rows; a bad label that could not be refused is a column that no row has."""
    if isinstance(target, str):
        rows = 1
        for n in leading:
            rows *= n
        return torch.full((rows,), NONE, dtype=torch.int64, device=device)
    flat = target.reshape(-1).to(torch.int64)
    ignored = flat == ignore
    bad = ((flat < 0) | (flat >= spec.columns)) & ~ignored
    return torch.where(ignored, SKIP, torch.where(bad, spec.columns, flat))


def reduce(
    prepared: Prepared, objective: Objective, *, reduction: str, mode: str, token_weight: Tensor | None,
    num_items: int | Tensor | None, overwrite: bool = False,
) -> tuple[Tensor, RowStats]:  # fmt: skip
    """The loss, and the statistics, detached, with the input's leading shape."""
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    checks.choice("mode", mode, ("auto", "fused", "recompute"))
    labels, leading = prepared.labels, prepared.leading
    first = prepared.student[0]
    wide = torch.float64 if first is not None and first.dtype == torch.float64 else torch.float32
    weight = torch.ones((), dtype=wide, device=labels.device)
    if token_weight is not None:
        checks.shape("token_weight", checks.tensor("token_weight", token_weight), leading, "the input's leading shape")
        checks.same_device(labels, token_weight=token_weight)
        weight = token_weight.detach().reshape(-1).to(wide)
    divisor = _divisor(labels, reduction, num_items).to(wide)
    blocker = _fused_blocker(objective, reduction)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in prepared.student)
    if mode == "fused" and blocker:
        raise ValueError(f"mode='fused' cannot serve {blocker}; use mode='recompute' or 'auto'")
    if mode == "fused" or (mode == "auto" and wanted and not blocker):
        scale = weight / divisor
        fused = Fused(prepared.call, objective, prepared.teacher, labels, scale, overwrite)
        loss = FusedLoss.apply(fused, *prepared.student)
        assert fused.final is not None
        stats = fused.final.stats
    else:
        stats, final = prepared.statistics()
        rows = objective.rows(stats) * weight
        loss = rows.reshape(leading) if reduction == "none" else (rows / divisor).sum()
        stats = final.stats
    return loss, prepared.shaped(stats.replaced([x.detach() for x in stats.tensors()]))


def _divisor(labels: Tensor, reduction: str, num_items: int | Tensor | None) -> Tensor:
    if reduction != "mean":
        if num_items is not None:
            raise ValueError(f"`num_items` replaces the divisor of reduction='mean'; got reduction={reduction!r}")
        return torch.ones((), device=labels.device)
    if num_items is None:
        return (labels != SKIP).sum().clamp_min(1)
    if isinstance(num_items, Tensor):
        checks.shape("num_items", num_items, (), "a number or a scalar tensor")
        return num_items.detach().to(labels.device)
    checks.number("num_items", num_items, low=0, open_low=True)
    return torch.tensor(float(num_items), dtype=torch.float64, device=labels.device)


def _fused_blocker(objective: Objective, reduction: str) -> str | None:
    if reduction == "none":
        return "reduction='none': each token's upstream gradient is known in backward only"
    if objective.policy.batchwide:
        return f"the batch-wide policy {objective.policy.name!r}"
    return None


def make_objective(divergence: str | Divergence, policy: Routing, temperature: float, smoothing: float, z_loss: float) -> Objective:
    """Resolve names and check numbers."""
    if isinstance(divergence, str):
        divergence = divergences.get(divergence)
    if not isinstance(divergence, Divergence):
        raise TypeError(f"`divergence` must be a name or a Divergence; got {type(divergence).__name__}")
    return Objective(
        divergence,
        routing.get(policy),
        checks.number("temperature", temperature, low=0, open_low=True),
        checks.number("label_smoothing", smoothing, low=0, high=1),
        checks.number("z_loss", z_loss, low=0),
    )
