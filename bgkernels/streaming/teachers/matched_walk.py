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
from bgkernels.streaming.kept import Kept
from bgkernels.streaming.picked import make_picked
from bgkernels.streaming.planner import Plan
from bgkernels.streaming.problem import Problem
from bgkernels.streaming.teachers.base import Comparison, empty_tile
from bgkernels.streaming.tiles import Tiles

if TYPE_CHECKING:
    from bgkernels.streaming.teachers.matched import MatchedTeacher


class Cut(NamedTuple):
    """A cut holds those columns of one sort that a tile has.

    Args:
        numbers: of the columns, among all of their sort.
        places: ``(n,)`` where they are in the tile.
    """

    numbers: slice
    places: Tensor


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
        device = problem.labels.device
        self.head = make_picked(teacher.tensors, problem, plan, self.match.teacher, self.positions)
        self.matched = _cuts(plan, self.match.matched, self.match.matched_ids)
        self.alone = _cuts(plan, self.match.alone, self.match.alone_ids)
        numbers = [cut.numbers for cut in self.matched]
        self.tiles = Tiles(self.head, plan, numbers, device, kept, teacher=True)
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
        buffer = self._buffer("columns", self.head.dtype)
        size, total = self.match.size, len(self.match.teacher)
        for first in range(size, total, self.plan.width):
            x = self.head.logits(slice(first, min(first + self.plan.width, total)), buffer)
            tile = Tile(x, x, self.first_row, first - size)
            self.backend.absorb_(state, tile, labels, spec)
        return state

    def _split(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a tile's matched columns, and the others."""
        matched, alone = self.matched[i].places, self.alone[i].places
        if not len(alone):
            return x, x[:, :0]
        buffer, size = self._buffer("columns", x.dtype), len(x) * len(matched)
        first = buffer[:size].view(len(x), len(matched))
        second = buffer[size : x.numel()].view(len(x), len(alone))
        torch.index_select(x, 1, matched, out=first)
        torch.index_select(x, 1, alone, out=second)
        return first, second

    def _tile(self, i: int, matched: Tensor) -> Tile | None:
        """Return the ``i``-th tile of both models, or None if it matches nothing."""
        teacher = self.tiles[i]
        if teacher is None:
            return None
        return Tile(matched, teacher, self.first_row, self.matched[i].numbers.start)

    def _alone_tile(self, i: int, alone: Tensor) -> Tile:
        """Return the student's other columns of the ``i``-th tile, on both sides."""
        return Tile(alone, alone, self.first_row, self.alone[i].numbers.start)

    def absorb(self, i: int, x: Tensor) -> None:
        matched, alone = self._split(i, x)
        if (tile := self._tile(i, matched)) is not None:
            spec = self.matched_spec if self.normalisers is None else self.coarse_spec
            self.backend.absorb_(self.state, tile, self.place, spec, self.normalisers)
        if alone.shape[1] and self.normalisers is None:
            tile = self._alone_tile(i, alone)
            self.backend.absorb_(self.student, tile, self.outside, self.student_spec)

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
        total = merge(matched, self._others(student, teacher))
        state = RowState(total.floats.to(self.state.floats.dtype), total.ints, self.whole_spec)
        close(self.backend, state, self.labels, self.whole)
        self.state = RowState(self.state.floats, self.state.ints, self.coarse_spec)
        self.backend.absorb_(self.state, self._rest(), self.category, self.category_spec)

    def _others(self, student: RowState, teacher: RowState) -> RowState:
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
        matched, alone = self._split(i, x)
        tile = self._tile(i, matched)
        if not alone.shape[1] and tile is not None:
            self.backend.vjp(out, tile, self.by_matched, self.place, self.coarse_spec)
            return
        if tile is not None:
            d = self._gradient(matched, out)
            self.backend.vjp(d, tile, self.by_matched, self.place, self.coarse_spec)
            out.index_copy_(1, self.matched[i].places, d)
        d, tile = self._gradient(alone, out), self._alone_tile(i, alone)
        self.backend.vjp(d, tile, self.by_student, self.outside, self.student_spec)
        out.index_copy_(1, self.alone[i].places, d)

    def _gradient(self, columns: Tensor, out: Tensor) -> Tensor:
        """Return where the gradient of copied columns goes: over them, if it can."""
        if columns.dtype == out.dtype:
            return columns
        return self._buffer("gradient", out.dtype)[: columns.numel()].view(columns.shape)


def _alone(whole: RowSpec, columns: int, cap: Cap) -> RowSpec:
    """Return the specification of some columns of one model, on both sides."""
    return replace(whole, columns=columns, compared=columns, student=cap, teacher=cap)


def _cuts(plan: Plan, host: Tensor, ids: Tensor) -> list[Cut]:
    """Return what falls into each tile of ascending columns ``ids``, which the CPU has too."""
    tiles = plan.tiles()
    edges = torch.tensor([*(tile.start for tile in tiles), plan.columns])
    numbers = starmap(slice, pairwise(torch.searchsorted(host, edges).tolist()))
    return [Cut(n, ids[n] - tile.start) for n, tile in zip(numbers, tiles, strict=True)]


def _log_sum_exp(state: RowState) -> Tensor:
    """Return that of the student's tempered logits."""
    return shift(state["m_s"]) + state["d_s"].log()


def _narrowed(state: RowState, spec: RowSpec) -> RowState:
    """Return the same state with fewer extra statistics."""
    places = dict(zip(state.spec.extras, state.spec.sums, strict=True))
    sums = [state.floats[: len(FLOATS)], *(state.floats[places[extra]] for extra in spec.extras)]
    return RowState(torch.cat(sums), state.ints.clone(), spec)
