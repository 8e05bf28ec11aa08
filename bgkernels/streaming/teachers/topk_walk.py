"""The walk of a top-k teacher needs one product, and a small dense problem.

A row splits into the columns that the teacher kept and the *rest*. One walk over the student's
tiles, kept columns masked, gives the rest's log-sum-exp. With the kept logits gathered on the way,
two problems remain that need no vocabulary any more:

* *whole*: the student alone. State is a monoid, so the kept columns join the rest's as a last tile,
  and the cross-entropy and the student's own statistics are those of all columns.
* *small*: student against teacher over ``k + 1`` categories, the last of which is the rest as one
  bucket. It is a dense problem, and any divergence is what it says there.

Backwards, the small problem's gradient in the bucket is spread over the rest by its softmax, in the
coefficients of the usual pass 2, and the kept columns' gradients are added to the tiles.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bgkernels.backends.base import Tile, statistics_of_tile
from bgkernels.backends.eager import real_logits_
from bgkernels.rows.arithmetic import NEG_INF, NONE, SKIP, shift, times
from bgkernels.rows.extras import Tempered, Tilt
from bgkernels.rows.spec import COEFFICIENTS, Cap, RowSpec
from bgkernels.rows.state import RowState, absorb_column, empty
from bgkernels.rows.stats import Statistics
from bgkernels.rows.vjp import recentred
from bgkernels.streaming.planner import Plan
from bgkernels.streaming.problem import Problem
from bgkernels.streaming.teachers.base import Comparison

if TYPE_CHECKING:
    from bgkernels.streaming.teachers.topk import TopKTeacher

ROW_BYTES = 64
"""Temporary bytes a row and kept column, roughly."""


def teacher_tilts(spec: RowSpec) -> tuple[Tilt, ...]:
    """Return the tilts that are power sums of the teacher alone, which policies read."""
    tilts = (e for e in spec.extras if isinstance(e, Tilt))
    return tuple(t for t in tilts if t.a == 0 < t.b and not t.moments)


class TopK(Comparison):
    """It compares the student with a teacher that has some columns of each row."""

    second_read = False

    def __init__(self, teacher: TopKTeacher, problem: Problem, plan: Plan) -> None:
        self.teacher, self.problem, self.spec = teacher, problem, problem.spec
        self.backend, device = problem.backend, problem.labels.device
        whole, self.small = teacher.specs(self.spec)
        extras = tuple(e for e in whole.extras if isinstance(e, Tempered))
        whole = replace(whole, extras=extras, logit_sum=False)  # the walk sums logits itself
        self.real = replace(whole, student=Cap(), teacher=Cap())
        self.kernel = whole if problem.masks_in_place else self.real
        tile = 0 if problem.masks_in_place else plan.chunk * plan.width
        self.scratch = torch.empty(tile, dtype=problem.dtype, device=device)
        self.columns = plan.tiles()

    def start(self, rows: slice, labels: Tensor, statistics: Statistics, *, known: bool) -> None:
        self.first_row, self.labels, dtype = rows.start, labels, self.problem.dtype
        self.statistics, (self.whole, self.categories) = statistics, statistics.pairs()
        teacher, compared = self.teacher, self.spec.compared
        self.ids, logprobs = teacher.indices[rows].long(), teacher.logprobs[rows]
        captured = (teacher.entropy, teacher.power_sum)
        self.entropy, self.power_sum = (None if x is None else x[rows] for x in captured)
        self.v, self.missing = self._teacher_categories(self.ids, logprobs, compared)
        self.alone_v, self.teacher_has_label = self.v, (labels >= 0) & (labels < compared)
        match = self.ids == labels[:, None]
        kept, skip = match.any(1), labels == SKIP
        place = torch.where(kept, match.byte().argmax(1), NONE)
        self.place = torch.where(skip, SKIP, place)
        self.outside = torch.where(kept, NONE, labels)
        self.category = torch.where(skip, SKIP, torch.where(kept, place, self.teacher.k))
        if not known:
            self.z = torch.full_like(self.v, NEG_INF)
            self.z_sum = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
            self.state = empty(len(labels), self.kernel, dtype=dtype, device=labels.device)

    def _teacher_categories(
        self, ids: Tensor, logprobs: Tensor, columns: int
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities ``(rows, k + 1)``, and how many columns the last one stands for.

        What rounding leaves of the tail is at least half an ulp of 1, so that the student may have
        mass there.
        """
        kept, dtype = ids >= 0, self.problem.dtype
        logp = torch.where(kept, logprobs.to(dtype), NEG_INF)
        missing = (columns - kept.sum(1)).clamp_min(0).double()
        tail = torch.full_like(missing, NEG_INF)
        if self.teacher.tail == "bucket":
            floor = min(torch.finfo(x).eps for x in (logprobs.dtype, torch.float32)) / 2
            mass = 1 - logp.double().exp().sum(1)
            tail = torch.where(missing > 0, mass.clamp_min(floor).log(), tail)
        elif self.teacher.tail == "drop":
            missing = torch.zeros_like(missing)
        return torch.cat([logp, tail.to(dtype)[:, None]], 1), missing

    def _masked(self, i: int, x: Tensor, gather: bool) -> tuple[Tile, Tensor, Tensor]:
        """Return the tile without the kept columns, their places in it, and which are in it."""
        first = self.problem.shard.first + self.columns[i].start
        local = self.ids - first
        inside = (local >= 0) & (local < x.shape[1])
        local.clamp_(0, x.shape[1] - 1)
        if len(self.scratch):  # real logits beside the tile
            copied = self.scratch[: x.numel()].view(x.shape).copy_(x)
            x = real_logits_(copied, self.spec.student)
        if gather:
            scale = self.kernel.student.scale
            values = x.gather(1, local).to(self.z.dtype) * scale
            self.z[:, :-1] = torch.where(inside, values, self.z[:, :-1])
            if self.spec.logit_sum:
                self.z_sum += x.sum(1, dtype=self.z.dtype) * scale
        # A minimum with +inf leaves columns that are not kept as they are.
        mask = torch.where(inside, NEG_INF, -NEG_INF).to(x.dtype)
        x.scatter_reduce_(1, local, mask, "amin")
        compared = min(self.kernel.compared - first, x.shape[1])
        tile = Tile(x, x[:, :compared] if compared > 0 else None, self.first_row, first)
        return tile, local, inside

    def absorb(self, i: int, x: Tensor) -> None:
        tile, *_ = self._masked(i, x, gather=True)
        self.backend.absorb_(self.state, tile, self.outside, self.kernel)

    def close(self) -> None:
        shard, labels = self.problem.shard, self.labels
        self.state = shard.merged(self.state)
        self.z[:, :-1] = shard.picked(self.z[:, :-1], self.ids)
        z_sum, state = shard.sum_(self.z_sum), self.state.precise()
        rest = absorb_column(state, state["label"], state["z_y"], state["v_y"])
        lse = shift(rest["m_s"]) + rest["d_s"].log()
        self.z[:, -1] = self.spec.temperature * lse
        self.backend.absorb_(self.state, self._kept(self.z), self.place, self.real)
        # A label's place among the kept may lie beyond the student's columns; its column does not.
        found = self.state["label"]
        found.copy_(torch.where(self.place >= 0, labels, found))
        whole = self.whole.values
        self.backend.finalize(self.state, labels, self.kernel, whole[: self.kernel.field_count])
        small = Tile(self.z, self.v, self.first_row, 0)
        statistics_of_tile(self.backend, small, self.category, self.small, self.categories)
        self._complete(rest, z_sum, self._teacher_alone())
        self.statistics.memory[: self.z.shape[1]] = self.z.t()

    def _teacher_alone(self) -> Statistics:
        """Return statistics whose teacher has all columns that it kept, and its own tail."""
        return self.categories

    def _complete(self, rest: RowState, z_sum: Tensor, small: Statistics) -> None:
        """Write the teacher's statistics of the whole: captured ones, or those of an even tail.

        Args:
            rest: of the student's columns that were not kept.
            z_sum: ``(rows,)`` of the student's logits.
            small: of the teacher's kept columns, and of its tail.
        """
        whole, labels = self.whole, self.labels
        valid = labels != SKIP
        best, at = (self.z[:, :-1] / self.spec.temperature).max(1)
        favourite = self.ids.gather(1, at[:, None])[:, 0]
        whole["argmax_s"].copy_(torch.where(best > rest["m_s"], favourite, rest["argmax_s"]))
        top, at = self.alone_v[:, :-1].double().max(1)
        whole["argmax_t"].copy_(self.ids.gather(1, at[:, None])[:, 0])
        whole["label"].copy_(labels)
        log_tail = self.alone_v[:, -1].double() - small["lse_t"]
        spread = self.missing.clamp_min(1).log()
        even = small["entropy_t"] + times(log_tail.exp(), spread)
        beyond = torch.where(self.teacher_has_label, log_tail - spread, NEG_INF)
        values = {
            "logit_mean": z_sum / self.spec.columns,
            "lse_t": small["lse_t"],
            "entropy_t": even if self.entropy is None else self.entropy.double(),
            "logp_t": torch.where(self.category < self.teacher.k, small["logp_t"], beyond),
            "max_prob_t": (top / self.spec.temperature - small["lse_t"]).exp(),
        }
        for name, value in values.items():
            whole[name].copy_(torch.where(valid, value, 0.0))
        for extra in self.whole.specs[0].extras:
            if isinstance(extra, Tempered):
                same, half = extra.temperature == self.spec.temperature, extra.public // 2
                names = [n for n in Tempered.fields if n.endswith("_t")]
                base = torch.stack([whole[n] for n in names])
                whole.extra(extra)[half:] = base if same else small.extra(extra)[half:]
            elif isinstance(extra, Tilt):
                whole.extra(extra).copy_(
                    torch.where(valid, self._power_sum(extra, log_tail, small), 0.0)
                )

    def _power_sum(self, tilt: Tilt, log_tail: Tensor, small: Statistics) -> Tensor:
        """Return a tilt of the teacher alone, over the kept columns and an even tail."""
        count = self.missing.clamp_min(1)
        value = small.extra(tilt)[0] - tilt.b * small["lse_t"]
        gain = times((tilt.b * log_tail).exp(), count ** (1 - tilt.b) - 1)
        value = torch.where(self.missing > 0, (value.exp() + gain).log(), value)
        if self.power_sum is not None and tilt.b == self.teacher.gamma:
            value = self.power_sum.double()
        return value + tilt.b * small["lse_t"]

    def _kept(self, z: Tensor) -> Tile:
        kept = z[:, :-1]
        return Tile(kept, kept if self.kernel.compared else None, self.first_row, 0)

    def open_vjp(self, grads: Tensor) -> None:
        # The gradient in the bucket is spread over the rest by the coefficients of its tiles.
        backend, cap = self.backend, self.spec.student
        z = self.statistics.memory[: self.teacher.k + 1].t().to(self.problem.dtype).contiguous()
        fields, first = self.kernel.field_count, len(self.whole.values)
        whole = self.whole.values[:fields], grads[:fields], self.labels
        small = self.categories.values, grads[first : first + len(self.categories.values)]
        factors = backend.fold(*small, self.category, self.small)
        g = torch.empty_like(z)
        tile = Tile(z, self.v, self.first_row, 0)
        backend.vjp(g, tile, factors, self.category, self.small)
        factors = backend.fold(*whole, self.kernel)
        row = dict(zip(COEFFICIENTS, factors, strict=False))
        row["lse_t"] = row["lse_s"]  # the student stands on both sides of the whole
        # Where the map to real logits is linear, the tiles' pass writes M to kept columns too.
        at_kept = row if cap.cap else row | {"M": torch.zeros_like(row["M"])}
        extras = factors[len(COEFFICIENTS) :]
        d = torch.empty_like(z[:, :-1], memory_format=torch.contiguous_format)
        coefficients = torch.stack([*at_kept.values(), *extras])
        backend.vjp(d, self._kept(z), coefficients, self.place, self.real)
        slope = cap.scale * (1 - (z[:, :-1] / cap.cap) ** 2 if cap.cap else 1.0)
        self.values = ((g[:, :-1] + d) * slope).masked_fill_((self.labels == SKIP)[:, None], 0.0)
        row |= recentred(row, z[:, -1].double() / self.spec.temperature, g[:, -1].double())
        self.coefficients = torch.stack([*row.values(), *extras])

    def vjp(self, i: int, x: Tensor, out: Tensor) -> None:
        tile, local, inside = self._masked(i, x, gather=False)
        self.backend.vjp(out, tile, self.coefficients, self.outside, self.kernel)
        cap = self.spec.student
        if len(self.scratch):
            slope = tile.student
            if cap.cap:  # 0 at the kept columns, which are masked
                slope.div_(cap.cap).square_().neg_().add_(1).clamp_min_(0)
                out.mul_(slope.masked_fill_((self.labels == SKIP)[:, None], 0.0))
            out.mul_(cap.scale)
        out.scatter_add_(1, local, torch.where(inside, self.values, 0.0).to(out.dtype))
