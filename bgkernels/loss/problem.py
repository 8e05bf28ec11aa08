"""From the caller's tensors to flat rows that fit each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bgkernels import backends, distributed
from bgkernels.distributed import Part, Shard
from bgkernels.loss import checks, teacher_checks
from bgkernels.loss import compiled as ops
from bgkernels.loss.autograd import RowStatistics
from bgkernels.loss.dtensor import plain, plain_teacher
from bgkernels.loss.flatten import flat_rows, flat_teacher, kept_label
from bgkernels.loss.objective import blend
from bgkernels.loss.options import Options
from bgkernels.loss.passes import views
from bgkernels.rows.spec import Extra, RowSpec
from bgkernels.rows.state import NONE, SKIP
from bgkernels.rows.stats import RowStats
from bgkernels.streaming.driver import Call, Tensors, assembled
from bgkernels.streaming.sources import Trust, View, trusted
from bgkernels.teachers import Teacher, TopKTeacher, members


@dataclass(frozen=True)
class Problem:
    """Rows and a call whose parts fit each other.

    Args:
        call: the settings of the call.
        student: ``(hidden (rows, D), weight, bias | None)``, or ``(logits (rows, V),)``.
        teacher: the same for the teacher; empty where it is not read.
        labels: ``(rows,)`` codes.
        leading: the input's leading shape, of which ``rows`` is the product.
        trust: the weights of several teachers.
    """

    call: Call
    student: Tensors
    teacher: Tensors
    labels: Tensor
    leading: tuple[int, ...]
    trust: Trust = None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of what the caller sees: fp32, or fp64 for fp64 inputs."""
        first = self.student[0]
        double = first is not None and first.dtype == torch.float64
        return torch.float64 if double else torch.float32

    @property
    def wants_gradient(self) -> bool:
        """Whether autograd will ask for one."""
        return any(map(_wants_gradient, self.student))

    def views(self) -> list[View]:
        """What is seen of each teacher, ``(rows,)``, differentiable, in recompute mode."""
        if torch.compiler.is_compiling():
            config = ops.encode(self.call)
            student, teacher = ops.present(self.student), ops.present(self.teacher)
            flat = ops.row_statistics(self.labels, student, teacher, *config)
        else:
            tensors = (*self.teacher, *self.student)
            flat = RowStatistics.apply(self.call, len(self.teacher), self.labels, *tensors)
        return views(self.call, assembled(self.call, flat))

    def shaped(self, views: list[View]) -> RowStats:
        """Statistics as the caller sees them: the input's leading shape, fp32."""
        stats = blend(views, trusted(self.trust, views))
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
    group = options.vocab_group
    if group is not None and torch.compiler.is_compiling():
        raise NotImplementedError(
            "`vocab_group` cannot be compiled; call the loss outside torch.compile, or under "
            "torch.compiler.disable"
        )
    student = {name: plain(name, x, group) for name, x in student.items()}
    teacher, target = plain_teacher(teacher, group), plain("target", target)
    first, columns, autocast = _check_student(student)
    leading = tuple(first.shape[:-1])
    from_teacher = isinstance(target, str)
    if teacher is None and (reads.teacher or from_teacher):
        raise ValueError(
            "`teacher` is None, but the loss or the label reads it; "
            "pass a teacher, or use routing='hard' and a target tensor"
        )
    if teacher is not None:
        teacher = teacher_checks.teacher(teacher, first, leading, mixed=autocast is not None)
    if not (reads.teacher or from_teacher):
        teacher = None
    part = Part(
        rows=math.prod(leading),
        gradients=[_wants_gradient(x) for x in student.values()],
        seed=_seed(options) if from_teacher and target == "teacher_sample" else 0,
        columns=[columns, *_held(teacher)],
    )
    (shard, *others), seed = distributed.join(part, group, first.device)
    columns, compared = _columns(options.vocab_size, teacher, shard, others)
    target = checks.target(target, first, leading, columns, options.ignore_index)
    teacher_checks.comparable(teacher, compared, options.temperature, target, options.ignore_index)
    if isinstance(teacher, TopKTeacher) and isinstance(target, str):
        target = kept_label(teacher, target, seed)
    sources, tensors, trust = flat_teacher(teacher, compared, math.prod(leading))
    spec = RowSpec(
        columns=columns,
        compared=compared,
        temperature=float(options.temperature),
        label_rule=target.removeprefix("teacher_") if isinstance(target, str) else "index",
        seed=seed,
        student=options.cap,
        teacher=sources[0].cap,
        extras=tuple(reads.extras),
        logit_sum=reads.logit_sum,
        positions=leading[-1] if leading else 1,
    )
    read = [x.dtype for x in teacher_checks.logit_tensors(teacher)]
    backend = backends.select(options.backend, first.device, (first.dtype, *read))
    call = Call(
        spec, backend, options.memory_budget, options.ignore_index, autocast, sources, shard
    )
    labels = _labels(target, leading, spec, options.ignore_index, first.device)
    return Problem(call, flat_rows(tuple(student.values())), tensors, labels, leading, trust)


def _wants_gradient(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def _held(teacher: Teacher | None) -> list[int]:
    """Columns of logits that each teacher brings; a top-k teacher brings none."""
    return [t.vocab for t in members(teacher) if not isinstance(t, TopKTeacher)]


def _columns(
    vocab_size: int | None, teacher: Teacher | None, student: Shard, others: list[Shard]
) -> tuple[int, int]:
    """Columns of the cross-entropy, and those on which student and teacher are compared."""
    known = [t.vocab for t in members(teacher) if isinstance(t, TopKTeacher) and t.vocab]
    shared = min([student.columns, *known, *(x.columns for x in others)])
    if vocab_size is not None:
        checks.vocab_size(vocab_size, shared)
        shared = vocab_size
    compared = shared if teacher is not None else 0
    distributed.check_alike(student, others, compared)
    return (student.columns if vocab_size is None else vocab_size), compared


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
