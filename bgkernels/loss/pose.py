"""This module turns the caller's tensors into flat rows that fit each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bgkernels import backends
from bgkernels.backends.base import Backend
from bgkernels.loss.dtensor import plain, plain_teacher
from bgkernels.loss.options import Options
from bgkernels.rows.arithmetic import NONE, SKIP
from bgkernels.rows.caching import Bounded
from bgkernels.rows.extras import Extra
from bgkernels.rows.spec import Cap, RowSpec
from bgkernels.streaming import checks
from bgkernels.streaming.problem import Problem
from bgkernels.streaming.shard import Shard, check_alike, join
from bgkernels.streaming.teachers.base import Label, Teacher, flat_rows
from bgkernels.streaming.teachers.dense import DenseTeacher, NoTeacher

PLAIN = (Tensor, torch.nn.Parameter)
KINDS = "LinearTeacher, LogitsTeacher, TopKTeacher, MatchedTeacher or MixtureTeacher"


class Agreement(NamedTuple):
    """It is what follows from shapes and options alone, so that calls alike share it.

    Args:
        spec: of the rows.
        backend: that runs the primitives.
        shard: which columns this process holds.
        autocast: dtype that autocast asks products to run in, or None.
        reads_teacher: whether the teacher is read at all.
        label: labels ``(...)``, or the word that says how pass 1 chooses them.
    """

    spec: RowSpec
    backend: Backend
    shard: Shard
    autocast: torch.dtype | None
    reads_teacher: bool
    label: Tensor | str | None


AGREEMENTS: Bounded[Agreement] = Bounded()
"""Of calls whose tensors were checked before: a step does not check shapes that it has seen."""


def pose(
    student: dict[str, Tensor | None],
    teacher: object,
    target: object,
    options: Options,
    extras: tuple[Extra, ...] = (),
    *,
    reads_teacher: bool = True,
    logit_sum: bool = False,
) -> Problem:
    """Check the caller's tensors and flatten them.

    Args:
        student: the caller's tensors by the caller's names: input, weight and bias, or logits.
        teacher, target, options: as the caller gave them.
        extras: statistics that will be read.
        reads_teacher: whether loss or weights look at the teacher.
        logit_sum: whether the mean logit is needed.
    """
    checks.no_transform()
    key = _signature(student, teacher, target, options, extras, reads_teacher, logit_sum)
    agreement = AGREEMENTS.get(key) if key is not None else None
    if agreement is None:
        group = options.vocab_group
        student = {name: plain(name, x, group) for name, x in student.items()}
        teacher, target = plain_teacher(teacher, group), plain("target", target)
        agreement = _agree(student, teacher, target, options, extras, reads_teacher, logit_sum)
        if key is not None:
            AGREEMENTS[key] = agreement._replace(label=None)
    first, *others = student.values()
    assert first is not None
    leading = first.shape[:-1]
    rows = math.prod(leading)
    kind = teacher if agreement.reads_teacher and isinstance(teacher, Teacher) else NoTeacher()
    label = target if agreement.label is None else agreement.label
    columns, device = agreement.spec.columns, first.device
    labels, items = label_codes(label, rows, columns, options.ignore_index, device)
    return Problem(
        spec=agreement.spec,
        backend=agreement.backend,
        student=(flat_rows(first, rows), *others),
        teacher=kind.flat(rows, agreement.spec.columns),
        labels=labels,
        leading=tuple(leading),
        shard=agreement.shard,
        budget=options.memory_budget,
        ignore_index=options.ignore_index,
        autocast=agreement.autocast,
        items=items,
    )


def _signature(
    student: dict[str, Tensor | None],
    teacher: object,
    target: object,
    options: Options,
    *rest: object,
) -> object | None:
    """Return all that the checks look at, or None where that is more than shapes and numbers."""
    if torch.compiler.is_compiling() or options.vocab_group is not None:
        return None
    cap: Cap | None = None
    tensors: tuple[Any, ...] = (*student.values(), target)
    if isinstance(teacher, DenseTeacher):
        cap, tensors = teacher.cap, (*tensors, *teacher.tensors)
    elif teacher is not None:
        return None
    if not isinstance(target, Tensor) or not all(x is None or type(x) in PLAIN for x in tensors):
        return None
    device = target.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    shapes = tuple(
        None if x is None else (x.shape, x.dtype, x.device, x.requires_grad, x.layout)
        for x in tensors
    )
    numbers = options.temperature, options.cap, options.ignore_index, options.vocab_size
    names = (*student, type(teacher), options.backend, torch.is_grad_enabled())
    return (shapes, numbers, names, cap, autocast, *rest)


def _agree(
    student: dict[str, Tensor | None],
    teacher: object,
    target: object,
    options: Options,
    extras: tuple[Extra, ...],
    reads_teacher: bool,
    logit_sum: bool,
) -> Agreement:
    """Check everything, together with the other ranks of a group."""
    group = options.vocab_group
    if group is not None and torch.compiler.is_compiling():
        raise NotImplementedError(
            "`vocab_group` cannot be compiled; call the loss outside torch.compile, or under "
            "torch.compiler.disable"
        )
    first, columns, autocast = _check_student(student)
    leading = tuple(first.shape[:-1])
    word = target if isinstance(target, str) else None
    kind = _teacher(teacher, first, leading, autocast is not None)
    reads_teacher = reads_teacher or word is not None
    if kind is None and reads_teacher:
        raise ValueError(
            "`teacher` is None, but the loss or the label reads it; "
            "pass a teacher, or use routing='hard' and a target tensor"
        )
    if kind is None or not reads_teacher:
        kind = NoTeacher()
    if group is not None and not kind.shards:
        raise NotImplementedError(
            f"`vocab_group` cannot split the columns of a {type(kind).__name__}: their order is "
            "not the student's; pass whole heads and no group"
        )
    gradients = [checks.wants_gradient(x) for x in student.values()]
    widths = [columns, *(t.vocab for t in kind.members if t.dense and t.vocab is not None)]
    seed = _seed(options) if word == "teacher_sample" else 0
    rows = math.prod(leading)
    (shard, *others), seed = join(rows, gradients, seed, widths, group, first.device)
    columns, compared = _columns(options.vocab_size, kind, shard, others)
    label = checks.target(target, first, leading, columns, options.ignore_index)
    valid = label != options.ignore_index if isinstance(label, Tensor) else None
    kind.check_comparison(compared, options.temperature, Label(word, valid))
    if isinstance(label, str):
        chosen = kind.choose(label, seed)
        label = label if chosen is None else chosen
    spec = RowSpec(
        columns=columns,
        compared=compared,
        temperature=float(options.temperature),
        label_rule=label.removeprefix("teacher_") if isinstance(label, str) else "index",
        seed=seed,
        student=options.cap,
        teacher=kind.cap if isinstance(kind, DenseTeacher) else Cap(),
        extras=extras,
        logit_sum=logit_sum,
        positions=leading[-1] if leading else 1,
    )
    logits = [t.tensors[0] for t in kind.heads]
    dtypes = (first.dtype, *(x.dtype for x in logits if x is not None))
    backend = backends.select(options.backend, first.device, dtypes)
    return Agreement(spec, backend, shard, autocast, reads_teacher, label)


def _teacher(value: object, first: Tensor, leading: tuple[int, ...], mixed: bool) -> Teacher | None:
    """Return the caller's teacher, checked; None if there is none."""
    if value is None:
        return None
    if not isinstance(value, Teacher):
        hint = "; wrap logits in LogitsTeacher(logits)" if isinstance(value, Tensor) else ""
        raise TypeError(f"`teacher` must be a {KINDS}; got {type(value).__name__}{hint}")
    if torch.compiler.is_compiling() and not value.compiles:
        raise NotImplementedError(
            f"torch.compile does not support this {type(value).__name__}; it supports dense "
            "teachers and mixtures of them (of kind='sum' if the weights are a function). Call the "
            "loss outside of it, or under torch.compiler.disable"
        )
    value.check(first, leading, mixed=mixed)
    return value


def _columns(
    vocab_size: int | None, teacher: Teacher, student: Shard, others: Sequence[Shard]
) -> tuple[int, int]:
    """Count the columns of the cross-entropy, and those on which the models are compared."""
    declared = [t.vocab for t in teacher.members if not t.dense and t.vocab]
    shared = min([student.columns, *declared, *(x.columns for x in others)])
    if vocab_size is not None:
        checks.vocab_size(vocab_size, shared)
        shared = vocab_size
    compared = 0 if isinstance(teacher, NoTeacher) else shared
    check_alike(student, others, compared)
    return (student.columns if vocab_size is None else vocab_size), compared


def _seed(options: Options) -> int:
    """Return the caller's seed, or a new one from torch's generator, which can be seeded."""
    return int(torch.randint(2**62, ())) if options.seed is None else options.seed


def _check_student(student: dict[str, Tensor | None]) -> tuple[Tensor, int, torch.dtype | None]:
    """Check the student; return its first tensor, its number of columns and autocast's dtype."""
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


def label_codes(
    target: object, rows: int, columns: int, ignore_index: int, device: torch.device
) -> tuple[Tensor, int | None]:
    """Return the label codes of all rows, and how many rows take part, or None.

    Where looking would wait for the device, a label that is out of range becomes ``columns``, which
    no column has as its number: the row's loss is NaN then.

    Raises:
        ValueError: on a CPU, for a label out of range.
    """
    if not isinstance(target, Tensor):
        return torch.full((rows,), NONE, dtype=torch.int64, device=device), rows
    flat = target.reshape(-1).to(torch.int64)
    if rows and checks.legible(flat):
        low, high = (int(x) for x in flat.aminmax())
        if low >= 0 and high < columns and not low <= ignore_index <= high:
            return flat, rows
        checks.labels(flat, columns, ignore_index)
    skipped = flat == ignore_index
    bad = ((flat < 0) | (flat >= columns)) & ~skipped
    return torch.where(skipped, SKIP, torch.where(bad, columns, flat)), None
