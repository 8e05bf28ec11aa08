"""Two custom ops carry the passes through ``torch.compile(fullgraph=True)``.

Under compilation a loss is: statistics op → the traced objective → gradient op (recompute mode). A
:class:`~bgkernels.streaming.problem.Problem` crosses the boundary as numbers and one string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bgkernels import backends
from bgkernels.rows.extras import KINDS
from bgkernels.rows.spec import INTS, Cap, RowSpec
from bgkernels.streaming.driver import Matrices, gradient_of, run
from bgkernels.streaming.heads import Needs
from bgkernels.streaming.problem import Problem, Tensors
from bgkernels.streaming.shard import Shard
from bgkernels.streaming.teachers.base import Teacher
from bgkernels.streaming.teachers.dense import LinearTeacher, LogitsTeacher, NoTeacher

AUTOCAST = (None, torch.bfloat16, torch.float16, torch.float32)
Config = tuple[Sequence[int], Sequence[float], str]


def encode(problem: Problem) -> Config:
    """Write all of a problem but its tensors as integers, numbers and words."""
    spec, cap = problem.spec, problem.teacher.specs(problem.spec)[0].teacher
    ints = [spec.columns, spec.compared, spec.seed, int(spec.logit_sum), spec.positions]
    ints += [problem.budget or 0, problem.ignore_index, AUTOCAST.index(problem.autocast)]
    ints.append(problem.shard.columns)
    floats = [spec.temperature, spec.student.scale, spec.student.cap, cap.scale, cap.cap]
    for extra in spec.extras:
        floats += [extra.kind, *extra.parameters]
    return ints, floats, f"{spec.label_rule} {problem.backend.name}"


def decode(
    config: Config, labels: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor]
) -> Problem:
    """Make the problem that :func:`encode` has written, with these tensors."""
    ints, floats, words = config
    columns, compared, seed, logit_sum, positions, budget, ignore_index, autocast, vocab = ints
    temperature, s_scale, s_cap, t_scale, t_cap, *rest = floats
    rule, backend = words.split()
    numbers = zip(rest[::4], rest[1::4], rest[2::4], rest[3::4], strict=True)
    extras = tuple(KINDS[int(kind)].of(*parameters) for kind, *parameters in numbers)
    spec = RowSpec(
        columns=columns,
        compared=compared,
        temperature=temperature,
        label_rule=rule,
        seed=seed,
        student=Cap(s_scale, s_cap),
        teacher=Cap(t_scale, t_cap),
        extras=extras,
        logit_sum=bool(logit_sum),
        positions=positions,
    )
    return Problem(
        spec=spec,
        backend=backends.BACKENDS[backend],
        student=_with_bias(student),
        teacher=_teacher(teacher, Cap(t_scale, t_cap)),
        labels=labels,
        leading=tuple(labels.shape),  # `len` would fix a dynamic size
        shard=Shard((0, vocab)),
        budget=budget or None,
        ignore_index=ignore_index,
        autocast=AUTOCAST[autocast],
    )


def _with_bias(tensors: Sequence[Tensor]) -> Tensors:
    """Return ``(hidden, weight, bias | None)`` or ``(logits,)``."""
    return (*tensors, None) if len(tensors) == 2 else tuple(tensors)


def _teacher(tensors: Sequence[Tensor], cap: Cap) -> Teacher:
    """Make a teacher of these tensors, whose rows are flat."""
    if not tensors:
        return NoTeacher()
    if len(tensors) == 1:
        return LogitsTeacher(tensors[0])
    hidden, weight, *bias = tensors
    return LinearTeacher(hidden, weight, bias[0] if bias else None, cap.scale, cap.cap or None)


def present(tensors: Tensors) -> list[Tensor]:
    """Return the tensors that are not None, which an op does not take."""
    return [x for x in tensors if x is not None]


def row_statistics_of(problem: Problem) -> Matrices:
    """Compute all statistics by one op, through which gradients flow."""
    student, teacher = present(problem.student), present(problem.teacher.tensors)
    values, ints = row_statistics(problem.labels, student, teacher, *encode(problem))
    return values, ints


@torch.library.custom_op("bgkernels::row_statistics", mutates_args=())
def row_statistics(
    labels: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    words: str,
) -> list[Tensor]:
    """Run pass 1: return both matrices of :meth:`Problem.statistics`."""
    problem = decode((ints, floats, words), labels, student, teacher)
    return list(run(problem)[0])


@row_statistics.register_fake
def _(
    labels: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor], *config: Any
) -> list[Tensor]:
    problem = decode(config, labels, student, teacher)
    (spec,) = problem.teacher.specs(problem.spec)
    rows = labels.shape[0]
    return [
        labels.new_empty(spec.field_count, rows, dtype=torch.float64),
        labels.new_empty(len(INTS), rows, dtype=torch.int64),
    ]


@torch.library.custom_op("bgkernels::row_gradient", mutates_args=())
def row_gradient(
    labels: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    matrices: Sequence[Tensor],
    grads: Tensor,
    needs: Sequence[bool],
    ints: Sequence[int],
    floats: Sequence[float],
    words: str,
) -> list[Tensor]:
    """Run pass 2: return the gradients of the student's tensors that need one, in order."""
    problem = decode((ints, floats, words), labels, student, teacher)
    values, integers = matrices
    return present(gradient_of(problem, Needs(*needs), grads, (values, integers)))


@row_gradient.register_fake
def _(labels: Tensor, student: Sequence[Tensor], *others: Any) -> list[Tensor]:
    _, _, _, needs, *_ = others
    wanted = [x for x, needed in zip(student, needs, strict=True) if needed]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    labels, student, teacher, *config = inputs
    ctx.config, ctx.counts = config, (len(student), len(teacher))
    ctx.save_for_backward(labels, *student, *teacher, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    labels, *saved = ctx.saved_tensors
    s, t = ctx.counts
    student, teacher, matrices = saved[:s], saved[s : s + t], saved[s + t :]
    needs = [x.requires_grad for x in student]
    by_student: list[Tensor | None] = [None] * s
    if grads[0] is not None:
        tensors = (labels, student, teacher, matrices, grads[0])
        gradients = iter(row_gradient(*tensors, needs, *ctx.config))
        by_student = [next(gradients) if needed else None for needed in needs]
    return None, by_student, [None] * t, None, None, None


row_statistics.register_autograd(_backward, setup_context=_setup)
