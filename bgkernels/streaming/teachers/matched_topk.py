"""A top-k teacher of another vocabulary is one of the student's, and what routing sees of its own.

Kept columns without a match join the tail. Routing sees them, except with ``"drop"``, which leaves
them out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from bgkernels.backends.base import Tile, statistics_of_tile
from bgkernels.rows.arithmetic import NONE
from bgkernels.rows.stats import Statistics
from bgkernels.streaming.kept import Kept
from bgkernels.streaming.planner import Plan
from bgkernels.streaming.problem import Problem, Seen
from bgkernels.streaming.teachers.base import Comparison
from bgkernels.streaming.teachers.match import Match, where_matched
from bgkernels.streaming.teachers.topk import TopKTeacher
from bgkernels.streaming.teachers.topk_walk import TopK


@dataclass(frozen=True, eq=False)
class MatchedTopK(TopKTeacher):
    """It has the student's columns in ``indices``, -1 where a kept column has no match.

    Args:
        theirs: ``(rows, k)`` the kept columns as the teacher numbers them.
        vocab_t: number of the teacher's columns.
        matched: ``(rows,)`` whether a kept column has a match; a row without any holds another.
        place: ``(columns + 1,)`` -1 for columns of the student that have no match.
    """

    theirs: Tensor = None  # type: ignore[assignment]
    vocab_t: int = 0
    matched: Tensor = None  # type: ignore[assignment]
    place: Tensor = None  # type: ignore[assignment]

    @property
    def memory(self) -> int:  # type: ignore[override]
        return super().memory + 1  # whether there is a soft label

    def seen(self, statistics: Statistics, problem: Problem, rows: Sequence[Tensor] | None) -> Seen:
        routing, divergence = super().seen(statistics, problem, rows)
        routing = replace(routing, vocab=self.vocab_t)
        return where_matched(routing, statistics.memory[-1] > 0), divergence

    def walk(self, problem: Problem, plan: Plan, kept: Kept) -> Comparison:
        return MatchedTopKWalk(self, problem, plan)


class MatchedTopKWalk(TopK):
    """It sees the teacher by itself in all columns that it kept."""

    teacher: MatchedTopK

    def start(self, rows: slice, labels: Tensor, statistics: Statistics, *, known: bool) -> None:
        super().start(rows, labels, statistics, known=known)
        teacher = self.teacher
        if teacher.tail != "drop":
            theirs, logprobs = teacher.theirs[rows], teacher.logprobs[rows]
            self.alone_v, self.missing = self._teacher_categories(theirs, logprobs, teacher.vocab_t)
        self.teacher_has_label = self.teacher_has_label & (teacher.place[labels.clamp_min(0)] >= 0)
        if not known:
            statistics.memory[-1] = teacher.matched[rows].double()

    def _teacher_alone(self) -> Statistics:
        if self.teacher.tail == "drop":
            return super()._teacher_alone()
        alone = Statistics.empty(self.small, len(self.labels), self.labels.device)
        tile = Tile(self.alone_v, self.alone_v, self.first_row, 0)
        statistics_of_tile(self.backend, tile, self.category, self.small, alone)
        return alone


def in_students_columns(
    teacher: TopKTeacher, match: Match, positions: Tensor | None
) -> MatchedTopK:
    """Return a top-k teacher in the columns and rows of the student.

    Args:
        teacher: with ``n`` rows.
        match: of both vocabularies.
        positions: ``(rows,)`` its row for each token, or -1; None: as they are.
    """
    tensors = {n: x for n, x in zip(teacher.names, teacher.tensors, strict=True) if x is not None}
    absent = None
    if positions is not None:
        absent = positions < 0
        tensors = {n: x.index_select(0, positions.clamp_min(0)) for n, x in tensors.items()}
    theirs = tensors["indices"].long()
    columns = torch.where(theirs < 0, NONE, match.student_of[theirs])
    if absent is not None:
        columns = columns.masked_fill(absent[:, None], NONE)
    matched = (columns >= 0).any(-1)
    # A row without a soft label compares some column, so that nothing in it is undefined.
    columns[:, 0] = torch.where(matched, columns[:, 0], 0)
    logprobs = tensors["logprobs"].clone()
    logprobs[:, 0] = torch.where(matched, logprobs[:, 0], math.log(0.5))
    tensors |= {"indices": columns, "logprobs": logprobs}
    kept = {f.name: getattr(teacher, f.name) for f in fields(teacher)} | tensors
    return MatchedTopK(
        **kept | {"vocab": None},
        theirs=torch.where(matched[:, None], theirs, columns),
        vocab_t=len(match.teacher),
        matched=matched,
        place=match.matched_place,
    )
