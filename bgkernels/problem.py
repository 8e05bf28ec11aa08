"""From the caller's tensors to flat rows that fit each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bgkernels import backends, checks, ops
from bgkernels.autograd import RowStatistics
from bgkernels.driver import Call, Tensors
from bgkernels.options import Options
from bgkernels.spec import Cap, Extra, RowSpec
from bgkernels.state import NONE, SKIP
from bgkernels.stats import RowStats, assemble
from bgkernels.teachers import Teacher


@dataclass(frozen=True)
class Problem:
    """Rows and a call whose parts fit each other.

    Args:
        call: the settings of the call.
        student: ``(hidden (rows, D), weight, bias | None)``, or ``(logits (rows, V),)``.
        teacher: the same for the teacher; empty where it is not read.
        labels: ``(rows,)`` codes.
        leading: the input's leading shape, of which ``rows`` is the product.
    """

    call: Call
    student: Tensors
    teacher: Tensors
    labels: Tensor
    leading: tuple[int, ...]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of what the caller sees: fp32, or fp64 for fp64 inputs."""
        first = self.student[0]
        double = first is not None and first.dtype == torch.float64
        return torch.float64 if double else torch.float32

    @property
    def wants_gradient(self) -> bool:
        """Whether autograd will ask for one."""
        needed = any(x is not None and x.requires_grad for x in self.student)
        return needed and torch.is_grad_enabled()

    def statistics(self) -> RowStats:
        """Row statistics ``(rows,)``, differentiable, in recompute mode."""
        if torch.compiler.is_compiling():
            config = ops.encode(self.call)
            student, teacher = ops.present(self.student), ops.present(self.teacher)
            flat = ops.row_statistics(self.labels, student, teacher, *config)
            return assemble(self.call.spec, flat).stats
        tensors = (*self.teacher, *self.student)
        flat = RowStatistics.apply(self.call, len(self.teacher), self.labels, *tensors)
        return assemble(self.call.spec, flat).stats

    def shaped(self, stats: RowStats) -> RowStats:
        """Statistics as the caller sees them: the input's leading shape, fp32."""
        return stats.replaced([self._shown(x) for x in stats.tensors()])

    def _shown(self, x: Tensor) -> Tensor:
        x = x.reshape(self.leading)
        return x.to(self.wide) if x.is_floating_point() else x


@dataclass(frozen=True)
class Reads:
    """What an objective reads beside the student's logits.

    Args:
        extras: extra statistics.
        teacher: whether loss or weights look at the teacher.
        logit_sum: whether the mean logit is needed.
    """

    extras: Sequence[Extra] = ()
    teacher: bool = True
    logit_sum: bool = False


def pose(
    student: dict[str, Tensor | None],
    teacher: Teacher | None,
    target: Tensor | str,
    options: Options,
    reads: Reads,
) -> Problem:
    """Check the tensors and flatten them.

    Args:
        student: the caller's tensors by the caller's names: input, weight and bias, or logits.
        teacher, target, options: as the caller gave them.
        reads: what will be needed.
    """
    first, columns, autocast = _check_student(student)
    leading = tuple(first.shape[:-1])
    from_teacher = isinstance(target, str)
    if teacher is None and (reads.teacher or from_teacher):
        raise ValueError(
            "`teacher` is None, but the loss or the label reads it; "
            "pass a teacher, or use routing='hard' and a target tensor"
        )
    if teacher is not None:
        teacher = checks.teacher(teacher, first, leading, mixed=autocast is not None)
    if not (reads.teacher or from_teacher):
        teacher = None
    compared = min(columns, teacher.vocab) if teacher is not None else 0
    if options.vocab_size is not None:
        checks.vocab_size(options.vocab_size, compared if teacher is not None else columns)
        columns = options.vocab_size
        compared = columns if teacher is not None else 0
    target = checks.target(target, first, leading, columns, options.ignore_index)
    spec = RowSpec(
        columns=columns,
        compared=compared,
        temperature=float(options.temperature),
        label_rule=target.removeprefix("teacher_") if isinstance(target, str) else "index",
        seed=_seed(options) if target == "teacher_sample" else 0,
        student=options.cap,
        teacher=teacher.cap if teacher is not None else Cap(),
        extras=tuple(reads.extras),
        logit_sum=reads.logit_sum,
        positions=leading[-1] if leading else 1,
    )
    tensors = teacher.tensors if teacher is not None else ()
    dtypes = tuple(x.dtype for x in (first, *tensors[:1]) if x is not None)
    backend = backends.select(options.backend, first.device, dtypes)
    call = Call(spec, backend, options.memory_budget, options.ignore_index, autocast)
    labels = _labels(target, leading, spec, options.ignore_index, first.device)
    return Problem(call, _rows(tuple(student.values())), _rows(tensors), labels, leading)


def _seed(options: Options) -> int:
    """The seed given, or one from torch's generator: reproducible, and new at each call."""
    return int(torch.randint(2**62, ())) if options.seed is None else options.seed


def _check_student(student: dict[str, Tensor | None]) -> tuple[Tensor, int, torch.dtype | None]:
    """The first tensor, the number of columns, and autocast's dtype."""
    checks.no_transform()
    for name, x in student.items():
        if x is not None:
            checks.tensor(name, x)
    (first_name, first), *others = student.items()
    assert first is not None
    device = first.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if first.ndim < 1:
        raise ValueError(f"`{first_name}` must be (..., n); got a scalar")
    if not others:
        return first, first.shape[-1], autocast
    (_, weight), (_, bias) = others
    assert weight is not None
    checks.linear("student", first, weight, bias, mixed=autocast is not None)
    checks.same_device(first, **dict(others))
    return first, weight.shape[0], autocast


def _rows(tensors: Tensors) -> Tensors:
    """Leading dimensions of the first tensor flattened; its last kept at stride 1."""
    if not tensors:
        return ()
    first, *rest = tensors
    assert first is not None
    flat = first.reshape(math.prod(first.shape[:-1]), first.shape[-1])
    return (flat if flat.stride(-1) == 1 else flat.contiguous(), *rest)


def _labels(
    target: Tensor | str,
    leading: tuple[int, ...],
    spec: RowSpec,
    ignore_index: int,
    device: torch.device,
) -> Tensor:
    """Codes of all rows; a bad label that could not be refused is a column that no row has."""
    if isinstance(target, str):
        return torch.full((math.prod(leading),), NONE, dtype=torch.int64, device=device)
    flat = target.reshape(-1).to(torch.int64)
    ignored = flat == ignore_index
    bad = ((flat < 0) | (flat >= spec.columns)) & ~ignored
    return torch.where(ignored, SKIP, torch.where(bad, spec.columns, flat))
