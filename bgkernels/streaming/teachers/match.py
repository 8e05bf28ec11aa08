"""A match says which columns of two vocabularies are one token, and puts both in one order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bgkernels.rows.arithmetic import NONE
from bgkernels.rows.extras import Tempered
from bgkernels.rows.stats import ExtraValues, RowStats
from bgkernels.streaming import checks
from bgkernels.streaming.order import Order


@dataclass(frozen=True, eq=False)
class Match:
    """Matched columns are numbered in the student's order, and so are the student's others.

    Args:
        size: number of matched columns.
        teacher: the teacher's columns: the matched ones in that order, then the others.
        matched, alone: ``(size,)`` and ``(others,)`` columns of the student, ascending, on the CPU.
        matched_ids, alone_ids: the same on the device, and a last ``NONE``, so that the number
            ``NONE`` is no column.
        matched_place, alone_place: ``(columns + 1,)`` the number of each of the student's columns,
            or ``NONE``; the last is of a column that is none.
        student_of: ``(columns of the teacher,)`` the student's column for each, or ``NONE``.
    """

    size: int
    teacher: Order
    matched: Tensor
    alone: Tensor
    matched_ids: Tensor
    alone_ids: Tensor
    matched_place: Tensor
    alone_place: Tensor
    student_of: Tensor

    @property
    def complete(self) -> bool:
        """Whether a side has no column but matched ones: then there is no rest to compare."""
        return not len(self.alone) or len(self.teacher) == self.size


MATCHES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""For each tensor of pairs, the matches made of it: a step does not sort what it has sorted."""


def match_of(pairs: object, columns: int, columns_t: int, device: torch.device) -> Match:
    """Return the match of some pairs, checked.

    Args:
        pairs: ``(2, m)`` ids of the student and of the teacher, or an object that has such
            ``pairs``.
        columns, columns_t: of the student, and of the teacher.
        device: where the walk needs it.

    Raises:
        TypeError, ValueError: no tensor of that kind, an id that a head does not have, or one that
            comes twice.
    """
    pairs = getattr(pairs, "pairs", pairs)
    ids = checks.tensor("teacher.pairs", pairs, floating=False)
    matches = MATCHES.setdefault(ids, {})
    key = columns, columns_t, device, ids._version
    if key not in matches:
        matches[key] = _match(ids.cpu(), columns, columns_t, device)
    match: Match = matches[key]
    return match


def _match(ids: Tensor, columns: int, columns_t: int, device: torch.device) -> Match:
    if ids.dtype != torch.int64 or ids.ndim != 2 or len(ids) != 2:
        raise TypeError(f"`teacher.pairs` must be int64 (2, m); got {ids.dtype} {tuple(ids.shape)}")
    if not ids.shape[1]:
        raise ValueError("`teacher.pairs` must match a token at least; got none")
    for side, of_side, count in (("student", ids[0], columns), ("teacher", ids[1], columns_t)):
        _check_ids(side, of_side, count)
    order = ids[0].argsort()
    matched, theirs = ids[0][order], ids[1][order]
    alone, alone_t = _others(matched, columns), _others(theirs, columns_t)
    none = torch.tensor([NONE])
    return Match(
        size=len(matched),
        teacher=Order(torch.cat([theirs, alone_t]), device),
        matched=matched,
        alone=alone,
        matched_ids=torch.cat([matched, none]).to(device),
        alone_ids=torch.cat([alone, none]).to(device),
        matched_place=_places(matched, columns).to(device),
        alone_place=_places(alone, columns).to(device),
        student_of=torch.full((columns_t,), NONE).index_copy_(0, theirs, matched).to(device),
    )


def _check_ids(side: str, ids: Tensor, count: int) -> None:
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= count:
        raise ValueError(
            f"`teacher.pairs`: ids of the {side} must lie in [0, {count}), its columns; "
            f"got {low} to {high}: is this the match of these two vocabularies?"
        )
    twice = torch.bincount(ids, minlength=count) > 1
    if twice.any():
        raise ValueError(
            f"`teacher.pairs` must name an id once on each side; the {side}'s "
            f"{int(twice.nonzero()[0])} comes twice ({int(twice.sum())} such ids)"
        )


def _others(ids: Tensor, count: int) -> Tensor:
    """Return the ids below ``count`` that are not among these, ascending."""
    return torch.ones(count, dtype=torch.bool).index_fill_(0, ids, False).nonzero()[:, 0]


def _places(ids: Tensor, count: int) -> Tensor:
    """Return the place of each id below ``count + 1`` among these, or ``NONE``."""
    places = torch.full((count + 1,), NONE)
    places[ids] = torch.arange(len(ids))
    return places


def where_matched(stats: RowStats, matched: Tensor) -> RowStats:
    """Return statistics in which those of the teacher and of the pair are 0 where it has no row."""

    def masked(x: Tensor) -> Tensor:
        return torch.where(matched, x, 0.0)

    names = ("lse_t", "entropy_t", "kl_ts", "kl_st", "logp_t", "max_prob_t")
    extras = ExtraValues(
        (
            e,
            tuple(
                x if isinstance(e, Tempered) and not e.fields[i].endswith("_t") else masked(x)
                for i, x in enumerate(values)
            ),
        )
        for e, values in stats.extras.pairs
    )
    fields = {n: masked(getattr(stats, n)) for n in names}
    fields["argmax_t"] = torch.where(matched, stats.argmax_t, -1)
    return replace(stats, extras=extras, matched=matched, **fields)  # type: ignore[arg-type]
