"""The walk of a matched teacher gathers what is the same token into tiles beside each other.

State is a monoid, and so three states of disjoint columns give all statistics: of the matched
columns of both models, of the student's other columns, and of the teacher's others, which a walk of
their own sees before each chunk of rows. With them two problems are there:

* *whole*: each model by itself, over all columns of its own;
* *coarse*: student against teacher over the matched columns and the rest, a last column whose two
  logits are the log-sum-exps of each model's other columns. It is a dense problem.

Backwards, the coefficients of both problems add up in the matched columns; the coarse problem's
gradient in the rest is spread over the student's other columns by their softmax.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, starmap
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bgkernels.backends.base import Tile, close
from bgkernels.rows.arithmetic import NEG_INF, NONE, SKIP, shift
from bgkernels.rows.extras import Tempered
from bgkernels.rows.spec import COEFFICIENTS, FLOATS, Cap, RowSpec
from bgkernels.rows.state import RowState, absorb_column, empty, merge
from bgkernels.rows.stats import Statistics
from bgkernels.rows.vjp import recentred
from bgkernels.streaming import gemm
from bgkernels.streaming.kept import Kept
from bgkernels.streaming.order import reordered
from bgkernels.streaming.picked import make_picked
from bgkernels.streaming.planner import Plan
from bgkernels.streaming.problem import Problem
from bgkernels.streaming.teachers.base import Comparison, empty_tile
from bgkernels.streaming.teachers.match import Match
from bgkernels.streaming.tiles import Tiles

if TYPE_CHECKING:
    from bgkernels.streaming.teachers.matched import MatchedTeacher


class Cut(NamedTuple):
    """A cut says which columns a tile of the student has, matched ones and others.

    Args:
        matched, alone: their numbers, among all of their sort.
        order: ``(width,)`` where in the tile they are, matched ones first; None: as they are.
        back: ``(width,)`` the inverse of the order, or None.
    """

    matched: slice
    alone: slice
    order: Tensor | None
    back: Tensor | None

    @property
    def width(self) -> int:
        """Number of matched columns."""
        return int(self.matched.stop - self.matched.start)


class Matched(Comparison):
    """It compares the student with a teacher of another vocabulary."""

    def __init__(self, teacher: MatchedTeacher, problem: Problem, plan: Plan, kept: Kept) -> None:
        self.problem, self.backend, self.plan = problem, problem.backend, plan
        self.positions = teacher.positions
        self.match = teacher.match(problem.spec.columns)
        self.has_rest = teacher.rest == "bucket" and not self.match.complete
        self.whole_spec, self.coarse_spec = teacher.specs(problem.spec)
        self.category_spec = replace(self.coarse_spec, student=Cap(), teacher=Cap())
        size, spec = self.match.size, problem.spec
        self.matched_spec = replace(
            self.coarse_spec, columns=size, compared=size, logit_sum=spec.logit_sum
        )
        self.second_read = spec.second_read
        self.student_spec = _alone(self.whole_spec, len(self.match.alone), spec.student)
        others = len(self.match.teacher) - size
        self.teacher_spec = replace(
            _alone(self.whole_spec, others, teacher.dense_teacher.cap), logit_sum=False
        )
        self.head = make_picked(teacher.tensors, problem, plan, self.match.teacher, self.positions)
        self.cuts = _cuts(plan, self.match)
        numbers = [cut.matched for cut in self.cuts]
        self.tiles = Tiles(self.head, plan, numbers, problem.labels.device, kept)
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def _buffer(self, use: str, dtype: torch.dtype) -> Tensor:
        """Return memory of the widest tile, allocated once."""
        if (use, dtype) not in self.buffers:
            self.buffers[use, dtype] = empty_tile(self.plan, dtype, self.problem.labels.device)
        return self.buffers[use, dtype]

    def start(self, rows: slice, labels: Tensor, statistics: Statistics, *, known: bool) -> None:
        self.first_row, self.labels, self.statistics = rows.start, labels, statistics
        self.whole, self.coarse = statistics.pairs()
        self.normalisers: tuple[Tensor, Tensor] | None = None
        skip, column = labels == SKIP, labels.clamp_min(0)
        place, outside = self.match.matched_place[column], self.match.alone_place[column]
        self.place = torch.where(skip, SKIP, place)
        self.outside = torch.where(skip, SKIP, outside)
        self.category = torch.where(skip, SKIP, torch.where(place < 0, self.match.size, place))
        self.tiles.start(rows)
        if not known:
            self.state, self.student = (
                empty(len(labels), spec, dtype=self.problem.dtype, device=labels.device)
                for spec in (self.matched_spec, self.student_spec)
            )
            self.teacher = self._teacher_alone()
            flag = 1.0 if self.positions is None else (self.positions[rows] >= 0).double()
            statistics.memory[2] = flag

    def _teacher_alone(self) -> RowState:
        """Return the state of the teacher's other columns, of both sides."""
        labels, spec = torch.where(self.labels == SKIP, SKIP, NONE), self.teacher_spec
        state = empty(len(labels), spec, dtype=self.problem.dtype, device=labels.device)
        buffer = self._buffer("order", self.head.dtype)
        size, total = self.match.size, len(self.match.teacher)
        for first in range(size, total, self.plan.width):
            x = self.head.logits(slice(first, min(first + self.plan.width, total)), buffer)
            tile = Tile(x, x, self.first_row, first - size)
            self.backend.absorb_(state, tile, labels, spec)
        return state

    def _ordered(self, i: int, x: Tensor) -> Tensor:
        """Return a tile with its matched columns first."""
        order = self.cuts[i].order
        if order is None:
            return x
        out = gemm.matrix(self._buffer("order", x.dtype), *x.shape)
        return reordered(x, order, out)

    def _pair(self, i: int, x: Tensor) -> Tile | None:
        """Return the ``i``-th tile of both models, or None if it matches nothing."""
        cut, teacher = self.cuts[i], self.tiles[i]
        if teacher is None:
            return None
        return Tile(x[:, : cut.width], teacher, self.first_row, cut.matched.start)

    def _others(self, i: int, x: Tensor) -> Tile | None:
        """Return the student's other columns of the ``i``-th tile, on both sides, or None."""
        cut = self.cuts[i]
        x = x[:, cut.width :]
        return Tile(x, x, self.first_row, cut.alone.start) if x.shape[1] else None

    def absorb(self, i: int, x: Tensor) -> None:
        x = self._ordered(i, x)
        if pair := self._pair(i, x):
            spec = self.matched_spec if self.normalisers is None else self.coarse_spec
            self.backend.absorb_(self.state, pair, self.place, spec, self.normalisers)
        if self.normalisers is None and (others := self._others(i, x)):
            self.backend.absorb_(self.student, others, self.outside, self.student_spec)

    def close(self) -> None:
        if self.normalisers is None:
            self._close_first()
        else:
            args = self._rest(), self.category, self.category_spec, self.normalisers
            self.backend.absorb_(self.state, *args)
        close(self.backend, self.state, self.category, self.coarse)
        self.normalisers = self.coarse["lse_s"], self.coarse["lse_t"]
        for name in ("kl_ts", "kl_st"):
            self.whole[name].copy_(self.coarse[name])

    def _close_first(self) -> None:
        """Write the statistics of the whole; the rest joins the matched columns."""
        student, teacher = self.student.precise(), self.teacher.precise()
        with_label = absorb_column(student, student["label"], student["z_y"], student["v_y"])
        self.statistics.memory[0] = _log_sum_exp(with_label)
        self.statistics.memory[1] = _log_sum_exp(teacher)
        matched = _narrowed(self.state.precise(), self.whole_spec)
        for name in ("label", "argmax_s", "argmax_t"):
            matched[name].copy_(self.match.matched_ids[matched[name]])
        total = merge(matched, self._all_others(student, teacher))
        state = RowState(total.floats.to(self.state.floats.dtype), total.ints, self.whole_spec)
        close(self.backend, state, self.labels, self.whole)
        self.state = RowState(self.state.floats, self.state.ints, self.coarse_spec)
        self.backend.absorb_(self.state, self._rest(), self.category, self.category_spec)

    def _all_others(self, student: RowState, teacher: RowState) -> RowState:
        """Return the state of the student's other columns beside the teacher's."""
        state = RowState(student.floats.clone(), student.ints.clone(), self.whole_spec)
        for name in ("m_t", "d_t", "h_t", "k_t"):
            state[name].copy_(teacher[name])
        state["v_y"].fill_(NEG_INF)
        for i, extra in enumerate(self.whole_spec.extras):
            first = extra.sums.index("d_t") if isinstance(extra, Tempered) else 0
            state.extra(i)[first:] = teacher.extra(i)[first:]
        for name in ("label", "argmax_s"):
            state[name].copy_(self.match.alone_ids[state[name]])
        state["argmax_t"].fill_(NONE)
        return state

    def _rest(self) -> Tile:
        """Return the tile of the one category that both models' other columns form."""
        logits = self.statistics.memory[:2] * self.problem.spec.temperature
        if not self.has_rest:
            logits = torch.full_like(logits, NEG_INF)
        z, v = logits.to(self.problem.dtype)[..., None]
        return Tile(z, v, self.first_row, self.match.size)

    def open_vjp(self, grads: Tensor) -> None:
        count, categories = len(self.whole.values), len(self.coarse.values)
        whole = self.backend.fold(
            self.whole.values, grads[:count], self.whole["label"], self.whole_spec
        )
        by_coarse = grads[count : count + categories]
        coarse = self.backend.fold(self.coarse.values, by_coarse, self.category, self.coarse_spec)
        rest = self._rest()
        by_rest = torch.zeros_like(rest.student)
        if self.has_rest:
            self.backend.vjp(by_rest, rest, coarse, self.category, self.category_spec)
        row = dict(zip(COEFFICIENTS, whole, strict=False))
        extras = whole[len(COEFFICIENTS) :]
        spread = row | recentred(row, self.statistics.memory[0], by_rest[:, 0].double())
        self.by_student = torch.stack([*spread.values(), *extras])
        self.by_matched = coarse.clone()
        at = dict(zip(COEFFICIENTS, self.by_matched, strict=False))
        moved = row | recentred(row, at["lse_s"], torch.zeros_like(at["lse_s"]))
        at["lse_c"].copy_(row["lse_c"])
        for name in COEFFICIENTS[3:]:
            at[name].add_(moved[name])
        for extra, place in zip(self.whole_spec.extras, self.whole_spec.factors, strict=True):
            if isinstance(extra, Tempered):
                into = self.coarse_spec.factors[self.coarse_spec.extras.index(extra)]
                self.by_matched[into] = whole[place]

    def vjp(self, i: int, x: Tensor, out: Tensor) -> None:
        cut, x = self.cuts[i], self._ordered(i, x)
        d = out
        if cut.order is not None:  # over the copy, if it can be
            same = x.dtype == out.dtype
            d = x if same else gemm.matrix(self._buffer("gradient", out.dtype), *x.shape)
        pair, others = self._pair(i, x), self._others(i, x)
        if pair:
            to = d[:, : cut.width]
            self.backend.vjp(to, pair, self.by_matched, self.place, self.coarse_spec)
        if others:
            to = d[:, cut.width :]
            self.backend.vjp(to, others, self.by_student, self.outside, self.student_spec)
        if cut.back is not None:
            reordered(d, cut.back, out)


def _alone(whole: RowSpec, columns: int, cap: Cap) -> RowSpec:
    """Return the specification of some columns of one model, on both sides."""
    return replace(whole, columns=columns, compared=columns, student=cap, teacher=cap)


def _cuts(plan: Plan, match: Match) -> list[Cut]:
    """Return the cut of each tile."""
    tiles = plan.tiles()
    edges = torch.tensor([*(tile.start for tile in tiles), plan.columns])
    sorts = [
        starmap(slice, pairwise(torch.searchsorted(ids, edges).tolist()))
        for ids in (match.matched, match.alone)
    ]
    cuts = []
    for tile, matched, alone in zip(tiles, *sorts, strict=True):
        order = back = None
        if matched.stop > matched.start and alone.stop > alone.start:
            order = torch.cat([match.matched_ids[matched], match.alone_ids[alone]]) - tile.start
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order), device=order.device)
        cuts.append(Cut(matched, alone, order, back))
    return cuts


def _log_sum_exp(state: RowState) -> Tensor:
    """Return that of the student's tempered logits."""
    return shift(state["m_s"]) + state["d_s"].log()


def _narrowed(state: RowState, spec: RowSpec) -> RowState:
    """Return the same state with fewer extra statistics."""
    places = dict(zip(state.spec.extras, state.spec.sums, strict=True))
    sums = [state.floats[: len(FLOATS)], *(state.floats[places[extra]] for extra in spec.extras)]
    return RowState(torch.cat(sums), state.ints.clone(), spec)
