"""Two custom ops carry the passes through ``torch.compile(fullgraph=True)``.

Under compilation a loss is: statistics op → the traced objective → gradient op (recompute mode). A
:class:`~bgkernels.streaming.problem.Problem` crosses the boundary as numbers and one string.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bgkernels import backends
from bgkernels.rows.extras import KINDS
from bgkernels.rows.spec import Cap, RowSpec
from bgkernels.streaming import checks
from bgkernels.streaming.driver import Matrices, gradient_of, run
from bgkernels.streaming.heads import Needs
from bgkernels.streaming.problem import Problem, Tensors
from bgkernels.streaming.shard import Shard
from bgkernels.streaming.teachers.base import Teacher
from bgkernels.streaming.teachers.dense import (
    DenseTeacher,
    LinearTeacher,
    LogitsTeacher,
    NoTeacher,
)
from bgkernels.streaming.teachers.mixture import MixtureTeacher

AUTOCAST = (None, torch.bfloat16, torch.float16, torch.float32)
Config = tuple[Sequence[int], Sequence[float], str]
GRADIENT = 9
"""Where the integers say whether a gradient is wanted."""


def encode(problem: Problem) -> Config:
    """Write all of a problem but its tensors as integers, numbers and words."""
    spec, teacher = problem.spec, problem.teacher
    members = [member for member in teacher.members if isinstance(member, DenseTeacher)]
    ints = [spec.columns, spec.compared, spec.seed, int(spec.logit_sum), spec.positions]
    ints += [problem.budget or 0, problem.ignore_index, AUTOCAST.index(problem.autocast)]
    ints += [problem.shard.columns, int(any(checks.wants_gradient(x) for x in problem.student))]
    ints += [len(present(member.tensors)) for member in members]
    floats = [spec.temperature, *spec.student]
    for member in members:
        floats += member.cap
    for extra in spec.extras:
        floats += [extra.kind, *extra.parameters]
    mixing = teacher.kind if isinstance(teacher, MixtureTeacher) else "alone"
    return ints, floats, f"{spec.label_rule} {problem.backend.name} {mixing}"


def decode(
    config: Config, labels: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor]
) -> Problem:
    """Make the problem that :func:`encode` has written, with these tensors."""
    ints, floats, words = config
    columns, compared, seed, logit_sum, positions, budget, *others = ints
    ignore_index, autocast, vocab, _, *counts = others
    temperature, s_scale, s_cap, *rest = floats
    rule, backend, mixing = words.split()
    size = 2 * len(counts)
    caps = [Cap(*pair) for pair in zip(rest[:size:2], rest[1:size:2], strict=True)]
    numbers = zip(*(rest[size + i :: 4] for i in range(4)), strict=True)
    extras = tuple(KINDS[int(kind)].of(*parameters) for kind, *parameters in numbers)
    spec = RowSpec(
        columns=columns,
        compared=compared,
        temperature=temperature,
        label_rule=rule,
        seed=seed,
        student=Cap(s_scale, s_cap),
        teacher=Cap() if len(caps) > 1 else caps[0],
        extras=extras,
        logit_sum=bool(logit_sum),
        positions=positions,
    )
    return Problem(
        spec=spec,
        backend=backends.BACKENDS[backend],
        student=_with_bias(student),
        teacher=_teacher(teacher, counts, caps, mixing),
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


def _teacher(
    tensors: Sequence[Tensor], counts: Sequence[int], caps: Sequence[Cap], mixing: str
) -> Teacher:
    """Make a teacher of flat tensors: so many of each member, then the weights of a mixture."""
    rest = iter(tensors)
    members = [_member([*islice(rest, n)], cap) for n, cap in zip(counts, caps, strict=True)]
    return members[0] if mixing == "alone" else MixtureTeacher(members, next(rest, ()), mixing)


def _member(tensors: Sequence[Tensor], cap: Cap) -> DenseTeacher:
    """Make a teacher of its tensors, whose rows are flat."""
    if not tensors:
        return NoTeacher()
    if len(tensors) == 1:
        return LogitsTeacher(tensors[0])
    hidden, weight, *bias = tensors
    return LinearTeacher(hidden, weight, bias[0] if bias else None, cap.scale, cap.cap or None)


def present(tensors: Tensors) -> list[Tensor]:
    """Return the tensors that are not None, which an op does not take."""
    return [x for x in tensors if x is not None]


def tensors_of(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """Return the student's tensors, and the teacher's with the weights of a mixture."""
    teacher = problem.teacher
    weights = teacher.weights if isinstance(teacher, MixtureTeacher) else None
    tensors = (*teacher.tensors, weights if isinstance(weights, Tensor) else None)
    return present(problem.student), present(tensors)


def row_statistics_of(problem: Problem) -> Matrices:
    """Compute all statistics by one op, through which gradients flow."""
    student, teacher = tensors_of(problem)
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
    wanted = ints[GRADIENT]
    if wanted and any(x.is_inference() for x in (labels, *student, *teacher)):
        raise ValueError(
            "a compiled loss got a tensor of torch.inference_mode, which its graph cannot keep for "
            "the backward pass; compute teacher and labels under torch.no_grad, or pass clones"
        )
    problem = decode((ints, floats, words), labels, student, teacher)
    return list(run(problem)[0])


@row_statistics.register_fake
def _(
    labels: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor], *config: Any
) -> list[Tensor]:
    return list(decode(config, labels, student, teacher).unwritten())


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
