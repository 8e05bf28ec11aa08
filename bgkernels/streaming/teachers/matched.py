"""A matched teacher has a vocabulary of its own: its tensors, its checks, what is seen of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from bgkernels.rows.extras import Tempered, Tilt
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.stats import ExtraValues, Statistics
from bgkernels.streaming import checks
from bgkernels.streaming.heads import head_demand
from bgkernels.streaming.kept import Kept
from bgkernels.streaming.planner import Demand, Plan
from bgkernels.streaming.problem import Problem, Seen
from bgkernels.streaming.teachers.base import Comparison, Label, Teacher
from bgkernels.streaming.teachers.dense import (
    DenseTeacher,
    LinearTeacher,
    LogitsTeacher,
    state_demand,
)
from bgkernels.streaming.teachers.match import Match, match_of, where_matched
from bgkernels.streaming.teachers.matched_topk import in_students_columns
from bgkernels.streaming.teachers.matched_walk import Matched
from bgkernels.streaming.teachers.topk import TopKTeacher
from bgkernels.streaming.teachers.topk_walk import teacher_tilts


class Pairs(Protocol):
    """Anything with pairs of ids, ``(2, m)`` int64."""

    @property
    def pairs(self) -> Tensor:
        """Of the student and of the teacher."""


@dataclass(frozen=True, eq=False)
class MatchedTeacher(Teacher):
    """A matched teacher has another vocabulary than the student; the two share some tokens.

    Divergences compare the matched columns one by one, and all other columns of each model as one
    category, the *rest*. So KLs, Jensen–Shannon and Rényi divergences and the total variation are
    at most what they would be token by token, and 0 if the models agree. If one of the models has
    no other column, there is no rest.

    Routing sees each model over its own whole vocabulary, and ``vocab`` is the teacher's size.
    Columns in statistics are the student's: ``argmax_t`` is -1 if that token has no match, and
    ``logp_t`` is ``-inf`` if the label has none. The cross-entropy is the student's own.

    Args:
        teacher: a :class:`LinearTeacher`, :class:`LogitsTeacher` or :class:`TopKTeacher` of the
            other vocabulary. A top-k teacher must have ``vocab``, the size of that vocabulary. Its
            kept columns without a match join its tail; a token of which no kept column has a match
            has no soft label.
        pairs: ``(2, m)`` int64, ids of the student and of the teacher for the same token; each id
            at most once. Or an object with such an attribute ``pairs``. If a step passes the same
            tensor as an earlier one, it is not checked and sorted again.
        rest: ``"bucket"``: as above; ``"drop"``: the rest is left out of both models, and each is
            renormalised over the matched columns. For a top-k teacher that is ``tail="drop"``.
        positions: ``(...)`` int64: for each of the student's tokens, the row of the teacher (with
            leading dimensions flattened) that predicts the same next token, or -1 for none. A token
            with -1 has no soft label: its loss is the hard term with weight 1. None: the rows of
            student and teacher correspond one to one.

    Example:
        >>> import torch, bgkernels as bg
        >>> teacher = bg.LinearTeacher(torch.randn(7, 12), torch.randn(60, 12))
        >>> pairs = torch.stack([torch.arange(40), torch.randperm(60)[:40]])
        >>> teacher = bg.MatchedTeacher(teacher, pairs, positions=torch.tensor([0, 2, -1, 3, 6]))
        >>> x, w = torch.randn(5, 8, requires_grad=True), torch.randn(50, 8)
        >>> bg.linear_hybrid_distillation(x, w, teacher, torch.randint(50, (5,))).backward()
    """

    teacher: Teacher
    pairs: Tensor | Pairs
    rest: str = "bucket"
    positions: Tensor | None = None

    compiles = False
    shards = False
    memory = 3  # the rests' log-sum-exps, and whether there is a soft label

    @property
    def vocab(self) -> None:
        """As many as the student, with whose columns it is compared."""
        return

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.teacher.tensors

    @property
    def heads(self) -> tuple[Teacher, ...]:
        return self.teacher.heads

    @property
    def dense_teacher(self) -> DenseTeacher:
        """The teacher of the other vocabulary."""
        assert isinstance(self.teacher, DenseTeacher)
        return self.teacher

    def check(
        self, reference: Tensor, leading: tuple[int, ...], *, mixed: bool, name: str = "teacher"
    ) -> None:
        teacher, places = self.teacher, self.positions
        if not isinstance(teacher, (LinearTeacher, LogitsTeacher, TopKTeacher)):
            raise TypeError(
                f"`{name}.teacher` must be a LinearTeacher, LogitsTeacher or TopKTeacher; got "
                f"{type(teacher).__name__} (a MixtureTeacher may hold MatchedTeachers)"
            )
        if teacher.vocab is None:
            raise ValueError(
                f"`{name}.teacher.vocab` must be the number of the teacher's columns; got None"
            )
        checks.choice(f"{name}.rest", self.rest, ("bucket", "drop"))
        if places is None:
            teacher.check(reference, leading, mixed=mixed, name=f"{name}.teacher")
            return
        first = checks.tensor(f"{name}.teacher", teacher.tensors[0], floating=False)
        teacher.check(reference, tuple(first.shape[:-1]), mixed=mixed, name=f"{name}.teacher")
        checks.tensor(f"{name}.positions", places, floating=False)
        if places.dtype != torch.int64:
            raise TypeError(f"`{name}.positions` must be int64; got {places.dtype}")
        checks.shape(f"{name}.positions", places, leading, "the input's leading shape")
        checks.same_device(reference, **{f"{name}.positions": places})
        if places.device.type == "cpu" and places.numel():
            rows = math.prod(first.shape[:-1])
            low, high = (int(x) for x in places.aminmax())
            if low < -1 or high >= rows:
                raise ValueError(
                    f"`{name}.positions` must lie in [0, {rows}), the teacher's rows, or be -1; "
                    f"got {low} to {high}"
                )

    def check_comparison(self, compared: int, temperature: float, label: Label) -> None:
        match = self.match(compared)
        if isinstance(self.teacher, TopKTeacher):
            seen = Label(None, self._rows_of(label.valid))
            self._topk(self.teacher).check_comparison(len(match.teacher), temperature, seen)
        if label.word is not None:
            raise ValueError(
                f"`target` cannot be {label.word!r} for a MatchedTeacher, whose token the student "
                "may not have; pass labels of the student's vocabulary"
            )

    def match(self, columns: int) -> Match:
        """Return the match of the student's columns, so many, with the teacher's."""
        device = next(x.device for x in self.tensors if x is not None)
        assert self.teacher.vocab is not None
        return match_of(self.pairs, columns, self.teacher.vocab, device)

    def _topk(self, teacher: TopKTeacher) -> TopKTeacher:
        return replace(teacher, tail="drop") if self.rest == "drop" else teacher

    def _rows_of(self, valid: Tensor | None) -> Tensor | None:
        """Return which of the teacher's rows belong to tokens that are ``valid``."""
        if valid is None or self.positions is None:
            return valid
        first = self.tensors[0]
        assert first is not None
        used = torch.zeros(first.shape[:-1], dtype=torch.bool, device=first.device)
        used.view(-1)[self.positions[valid & (self.positions >= 0)]] = True
        return used

    def flat(self, rows: int, columns: int) -> Teacher:
        """Return the same teacher; of a top-k teacher, one in the student's columns and rows."""
        first = self.tensors[0]
        assert first is not None
        places = None if self.positions is None else self.positions.reshape(-1)
        teacher = self.teacher.flat(math.prod(first.shape[:-1]), columns)
        if isinstance(teacher, TopKTeacher):
            return in_students_columns(self._topk(teacher), self.match(columns), places)
        return replace(self, teacher=teacher, positions=places)

    def specs(self, spec: RowSpec) -> tuple[RowSpec, ...]:
        """Return that of the models by themselves, and that of the categories."""
        single = (*(e for e in spec.extras if isinstance(e, Tempered)), *teacher_tilts(spec))
        cap, categories = self.dense_teacher.cap, self.match(spec.columns).size + 1
        whole = replace(spec, teacher=cap, extras=single)
        coarse = replace(whole, columns=categories, compared=categories, extras=spec.extras)
        return whole, replace(coarse, logit_sum=False)

    def seen(self, statistics: Statistics, problem: Problem, rows: Sequence[Tensor] | None) -> Seen:
        rows = list(statistics.values.unbind(0) if rows is None else rows)
        views, first = [], 0
        for pair in statistics.pairs():
            end = first + len(pair.values)
            views.append(pair.row_stats(problem.ignore_index, rows[first:end]))
            first = end
        whole, coarse = views
        single = ("nll", "lse_hard", "logit_mean", "label", "logp_s", "logp_t",
                  "argmax_s", "argmax_t")  # fmt: skip
        untilted = ExtraValues((e, x) for e, x in whole.extras.pairs if not isinstance(e, Tilt))
        extras = coarse.extras.updated(untilted)
        divergence = replace(coarse, extras=extras, **{n: getattr(whole, n) for n in single})
        vocab = self.dense_teacher.vocab
        assert vocab is not None
        extras = coarse.extras.updated(whole.extras)
        routing = replace(whole, kl_ts=coarse.kl_ts, kl_st=coarse.kl_st, extras=extras, vocab=vocab)
        if self.positions is not None:
            routing = where_matched(routing, statistics.memory[2] > 0)
        return routing, divergence

    def demand(self, problem: Problem) -> Demand:
        # A gathered tile of the head; columns of the student's tile, and their gradient.
        head = head_demand(self.tensors, problem)
        x, *weights = (x for x in self.tensors if x is not None)
        student = problem.student[0]
        assert student is not None
        product = problem.product(x)
        if weights:
            gathered = product.itemsize + x.itemsize * (product != x.dtype)
            head = replace(head, weight_bytes=gathered)
        else:
            head = replace(head, tile_bytes=2 * x.itemsize)
        wide = max(problem.dtype.itemsize, student.itemsize)
        hidden = x.shape[1] * x.itemsize * (self.positions is not None)
        copies = Demand(tile_bytes=2 * wide, row_bytes=hidden)
        return head + copies + state_demand(problem, states=12)

    def walk(self, problem: Problem, plan: Plan, kept: Kept) -> Comparison:
        return Matched(self, problem, plan, kept)
