"""The two passes as custom ops, for ``torch.compile(fullgraph=True)``.

Under compilation a loss is: statistics op → the traced objective → gradient op (recompute mode). A
:class:`~bgkernels.streaming.driver.Call` crosses the boundary as numbers and one string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bgkernels import backends
from bgkernels.distributed import Shard
from bgkernels.loss import passes
from bgkernels.rows.spec import Cap, Extra, Mixture, RowSpec, Tilt, TotalVariation
from bgkernels.rows.stats import TENSOR_FIELDS
from bgkernels.streaming.driver import Call, Rows, Tensors, flatten
from bgkernels.streaming.heads import Needs
from bgkernels.streaming.sources import Source

AUTOCAST = (None, torch.bfloat16, torch.float16, torch.float32)


def encode(call: Call) -> tuple[list[int], list[float], str]:
    """A call as integers, numbers and words.

    Raises:
        NotImplementedError: the teacher is not a single one of logits or hidden states.
    """
    s = call.spec
    if len(call.sources) > 1 or type(call.sources[0]) is not Source:
        raise NotImplementedError(
            "torch.compile carries a LinearTeacher or LogitsTeacher only; call the loss outside of "
            "it, or under torch.compiler.disable"
        )
    (teacher,) = call.sources
    ints = [
        s.columns, s.compared, s.seed, int(s.logit_sum), s.positions,
        call.budget or 0, call.ignore_index, AUTOCAST.index(call.autocast), teacher.count,
        call.shard.columns,
    ]  # fmt: skip
    floats = [s.temperature, s.student.scale, s.student.cap, teacher.cap.scale, teacher.cap.cap]
    for extra in s.extras:
        if isinstance(extra, Tilt):
            floats += [2.0 if extra.moments else 1.0, extra.a, extra.b]
        else:
            floats += [3.0, extra.omega, 0.0] if isinstance(extra, Mixture) else [4.0, 0.0, 0.0]
    return ints, floats, f"{s.label_rule} {call.backend.name}"


def decode(ints: Sequence[int], floats: Sequence[float], words: str) -> Call:
    """The inverse of :func:`encode`."""
    columns, compared, seed, logit_sum, positions, budget, ignore_index, autocast, *more = ints
    count, held = more
    temperature, s_scale, s_cap, t_scale, t_cap, *rest = floats
    rule, backend = words.split()
    extras: list[Extra] = []
    for kind, a, b in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        if kind <= 2:
            extras.append(Tilt(a, b, kind == 2))
        else:
            extras.append(Mixture(a) if kind == 3 else TotalVariation())
    spec = RowSpec(
        columns=columns,
        compared=compared,
        temperature=temperature,
        label_rule=rule,
        seed=seed,
        student=Cap(s_scale, s_cap),
        teacher=Cap(t_scale, t_cap),
        extras=tuple(extras),
        logit_sum=bool(logit_sum),
        positions=positions,
    )
    sources = (Source(count, spec.teacher),)
    device = backends.BACKENDS[backend]
    return Call(
        spec, device, budget or None, ignore_index, AUTOCAST[autocast], sources, Shard((0, held))
    )


def present(tensors: Tensors) -> list[Tensor]:
    """``(hidden, weight)``, and the bias if there is one; or ``(logits,)``. Ops take no None."""
    return [x for x in tensors if x is not None]


def _rows(labels: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Rows:
    """The inverse of :func:`present`."""
    s, t = ((*x, None) if len(x) == 2 else tuple(x) for x in (student, teacher))
    return Rows(s, t, labels)


@torch.library.custom_op("bgkernels::row_statistics", mutates_args=())
def row_statistics(
    labels: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    words: str,
) -> list[Tensor]:
    """Pass 1: :func:`~bgkernels.streaming.driver.flatten` of the statistics."""
    outcomes = passes.statistics(decode(ints, floats, words), _rows(labels, student, teacher))
    return [x.clone() for x in flatten(outcomes)]  # outputs of an op must not share memory


@row_statistics.register_fake
def _(
    labels: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    words: str,
) -> list[Tensor]:
    spec, wide = decode(ints, floats, words).spec, torch.float64
    integer = {"argmax_s": torch.int64, "argmax_t": torch.int64, "label": torch.int64}
    dtypes = [{"valid": torch.bool, **integer}.get(name, wide) for name in TENSOR_FIELDS]
    count = sum(3 if t.moments else 1 for t in spec.tilts) + 3 * len(spec.mixtures)
    dtypes += [wide] * (count + 2 * spec.total_variation + 3)
    return [torch.empty_like(labels, dtype=dtype) for dtype in dtypes]


@torch.library.custom_op("bgkernels::row_gradient", mutates_args=())
def row_gradient(
    labels: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    flat: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    ints: Sequence[int],
    floats: Sequence[float],
    words: str,
) -> list[Tensor]:
    """Pass 2: gradients of the student's tensors that are needed, in order."""
    call, rows = decode(ints, floats, words), _rows(labels, student, teacher)
    return present(passes.gradient(call, rows, flat, grads, Needs(*needs)))


@row_gradient.register_fake
def _(
    labels: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    flat: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    ints: Sequence[int],
    floats: Sequence[float],
    words: str,
) -> list[Tensor]:
    wanted = [x for x, needed in zip(student, needs, strict=True) if needed]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    labels, student, teacher, ints, floats, words = inputs
    ctx.config, ctx.teacher_count, ctx.student_count = (
        (ints, floats, words),
        len(teacher),
        len(student),
    )
    ctx.save_for_backward(labels, *student, *teacher, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    labels, *saved = ctx.saved_tensors
    s, t = ctx.student_count, ctx.teacher_count
    student, teacher, flat = saved[:s], saved[s : s + t], saved[s + t :]
    needs = [x.requires_grad for x in student]
    spec = decode(*ctx.config).spec
    rest = 3 + len(spec.mixtures) + spec.total_variation  # of a Final, without a gradient
    own = [*grads[:-rest], *[None] * rest]
    made = iter(row_gradient(labels, student, teacher, flat, own, needs, *ctx.config))
    by_student = [next(made) if needed else None for needed in needs]
    return None, by_student, [None] * t, None, None, None


row_statistics.register_autograd(_backward, setup_context=_setup)
