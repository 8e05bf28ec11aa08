"""From the caller's teacher to flat rows: sources, their tensors, and what weighs them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bgkernels.rows.sampling import gumbel_at
from bgkernels.rows.spec import Cap
from bgkernels.rows.state import NEG_INF
from bgkernels.streaming.driver import Tensors
from bgkernels.streaming.sources import MixtureSource, Source, Trust
from bgkernels.teachers import MixtureTeacher, Teacher, TopKTeacher

Flat = tuple[tuple[Source, ...], Tensors, Trust]


def flat_rows(tensors: Tensors) -> Tensors:
    """Leading dimensions of the first tensor flattened; its last kept at stride 1."""
    if not tensors:
        return ()
    first, *rest = tensors
    assert first is not None
    flat = first.reshape(math.prod(first.shape[:-1]), first.shape[-1])
    return (flat if flat.stride(-1) == 1 else flat.contiguous(), *rest)


def flat_teacher(teacher: Teacher | None, compared: int, rows: int) -> Flat:
    """Sources, their tensors with ``rows`` rows, and the weights of a sum of several."""
    if teacher is None:
        return (Source(0, Cap()),), (), None
    if isinstance(teacher, TopKTeacher):
        n = teacher.indices.ndim - 1
        kept = (None if x is None else x.reshape(rows, *x.shape[n:]) for x in teacher.tensors)
        return (teacher.source(compared),), tuple(kept), None
    if not isinstance(teacher, MixtureTeacher):
        return (teacher.source(compared),), flat_rows(teacher.tensors), None
    parts = [flat_teacher(t, compared, rows) for t in teacher.teachers]
    sources = tuple(source for own, _, _ in parts for source in own)
    tensors = tuple(x for _, own, _ in parts for x in own)
    weights = _weights(teacher, rows)
    if teacher.kind == "sum":
        return sources, tensors, weights
    given = weights if isinstance(weights, Tensor) else None
    function = None if isinstance(weights, Tensor) else weights
    mixed = MixtureSource(len(tensors) + 1, Cap(), sources, function)
    return (mixed,), (*tensors, given), None


def _weights(teacher: MixtureTeacher, rows: int) -> Trust:
    """``(rows, teachers)``, or the function that gives them."""
    weights, first = teacher.weights, teacher.teachers[0].tensors[0]
    if callable(weights):
        return weights
    if isinstance(weights, Tensor):
        return weights.detach().reshape(rows, len(teacher.teachers)).double()
    assert first is not None
    # A list would be copied to the device, and waited for.
    made = [torch.full((rows,), w, dtype=torch.float64, device=first.device) for w in weights]
    return torch.stack(made, 1)


def kept_label(teacher: TopKTeacher, word: str, seed: int) -> Tensor:
    """The teacher's label among the columns that it kept, ``(...)``; -1 where it kept none.

    Args:
        teacher: whose columns.
        word: ``"teacher_argmax"`` or ``"teacher_sample"``.
        seed: of the sample; the same token as from all logits, where all columns are kept.
    """
    ids = teacher.indices.long()
    score = teacher.logprobs.float().where(ids >= 0, NEG_INF)
    if word == "teacher_sample":
        rows = torch.arange(math.prod(ids.shape[:-1]), device=ids.device).view(*ids.shape[:-1], 1)
        score = score + gumbel_at(ids, rows, seed)
    return ids.gather(-1, score.argmax(-1, keepdim=True))[..., 0]
