"""From the caller's tensors to flat rows that fit each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bgkernels import backends
from bgkernels.loss.dtensor import plain, plain_teacher
from bgkernels.loss.options import Options
from bgkernels.rows.arithmetic import NONE, SKIP
from bgkernels.rows.extras import Extra
from bgkernels.rows.spec import RowSpec
from bgkernels.streaming import checks
from bgkernels.streaming.problem import Problem, Tensors
from bgkernels.streaming.shard import Shard, check_alike, join
from bgkernels.streaming.teachers.base import Label, Teacher, flat_rows
from bgkernels.streaming.teachers.dense import NoTeacher

KINDS = "LinearTeacher, LogitsTeacher, TopKTeacher or MixtureTeacher"


def pose(
    student: dict[str, Tensor | None],
    teacher: object,
    target: object,
    options: Options,
    *,
    extras: Sequence[Extra] = (),
    reads_teacher: bool = True,
    logit_sum: bool = False,
) -> Problem:
    """Check the tensors and flatten them.

    Args:
        student: the caller's tensors by the caller's names: input, weight and bias, or logits.
        teacher, target, options: as the caller gave them.
        extras: statistics that will be read.
        reads_teacher: whether loss or weights look at the teacher.
        logit_sum: whether the mean logit is needed.
    """
    group = options.vocab_group
    if group is not None and torch.compiler.is_compiling():
        raise NotImplementedError(
            "`vocab_group` cannot be compiled; call the loss outside torch.compile, or under "
            "torch.compiler.disable"
        )
    student = {name: plain(name, x, group) for name, x in student.items()}
    target = plain("target", target)
    first, columns, autocast = _check_student(student)
    leading, rows = tuple(first.shape[:-1]), math.prod(first.shape[:-1])
    word = target if isinstance(target, str) else None
    kind = _teacher(plain_teacher(teacher, group), first, leading, autocast is not None)
    if kind is None and (reads_teacher or word is not None):
        raise ValueError(
            "`teacher` is None, but the loss or the label reads it; "
            "pass a teacher, or use routing='hard' and a target tensor"
        )
    if kind is None or not (reads_teacher or word is not None):
        kind = NoTeacher()
    sampled = word == "teacher_sample"
    gradients = [wants_gradient(x) for x in student.values()]
    held = [columns, *(t.vocab for t in kind.members if t.dense and t.vocab is not None)]
    seed = _seed(options) if sampled else 0
    (shard, *others), seed = join(rows, gradients, seed, held, group, first.device)
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
        extras=tuple(extras),
        logit_sum=logit_sum,
        positions=leading[-1] if leading else 1,
    )
    dtypes = [first.dtype, *(t.tensors[0].dtype for t in kind.members if t.dense)]  # type: ignore[union-attr]
    return Problem(
        spec=spec,
        backend=backends.select(options.backend, first.device, tuple(dtypes)),
        student=_flat(student, rows),
        teacher=kind.flat(rows),
        labels=_labels(label, rows, columns, options.ignore_index, first.device),
        leading=leading,
        shard=shard,
        budget=options.memory_budget,
        ignore_index=options.ignore_index,
        autocast=autocast,
    )


def wants_gradient(x: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of a tensor."""
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def _teacher(value: object, first: Tensor, leading: tuple[int, ...], mixed: bool) -> Teacher | None:
    """The teacher, checked."""
    if value is None:
        return None
    if not isinstance(value, Teacher):
        hint = "; wrap logits in LogitsTeacher(logits)" if isinstance(value, Tensor) else ""
        raise TypeError(f"`teacher` must be a {KINDS}; got {type(value).__name__}{hint}")
    if torch.compiler.is_compiling() and not value.compiles:
        raise NotImplementedError(
            f"torch.compile does not carry a {type(value).__name__}; "
            "call the loss outside of it, or under torch.compiler.disable"
        )
    value.check(first, leading, mixed=mixed)
    return value


def _columns(
    vocab_size: int | None, teacher: Teacher, student: Shard, others: Sequence[Shard]
) -> tuple[int, int]:
    """Columns of the cross-entropy, and those on which student and teacher are compared."""
    declared = [t.vocab for t in teacher.members if not t.dense and t.vocab]
    shared = min([student.columns, *declared, *(x.columns for x in others)])
    if vocab_size is not None:
        checks.vocab_size(vocab_size, shared)
        shared = vocab_size
    compared = 0 if isinstance(teacher, NoTeacher) else shared
    check_alike(student, others, compared)
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


def _flat(student: dict[str, Tensor | None], rows: int) -> Tensors:
    """Leading dimensions of the first tensor flattened."""
    first, *rest = student.values()
    assert first is not None
    return (flat_rows(first, rows), *rest)


def _labels(
    target: Tensor | str, rows: int, columns: int, ignore_index: int, device: torch.device
) -> Tensor:
    """Codes of all rows; a bad label that could not be refused names a column that no row has."""
    if isinstance(target, str):
        return torch.full((rows,), NONE, dtype=torch.int64, device=device)
    flat = target.reshape(-1).to(torch.int64)
    skipped = flat == ignore_index
    bad = ((flat < 0) | (flat >= columns)) & ~skipped
    return torch.where(skipped, SKIP, torch.where(bad, columns, flat))
