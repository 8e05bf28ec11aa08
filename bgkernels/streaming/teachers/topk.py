"""A teacher of which only some columns are known, beside the student's tiles.

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

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bgkernels.backends.base import Tile, statistics_of_tile
from bgkernels.backends.eager import real_logits_
from bgkernels.rows.spec import Cap, Extra, RowSpec
from bgkernels.rows.state import NEG_INF, NONE, SKIP, absorb_column, empty, shift, times
from bgkernels.rows.stats import Final, RowStats, finalize
from bgkernels.rows.vjp import COEFFICIENTS, Coefficients
from bgkernels.streaming.comparison import Outcome, Setting
from bgkernels.streaming.sources import TopKSource

ROW_BYTES = 64
"""Temporary bytes a row and kept column, roughly."""


class TopK:
    """See :class:`bgkernels.streaming.comparison.Comparison`.

    Args:
        tensors: ``(indices (rows, k), logprobs (rows, k), entropy, power_sum (rows,) | None)``.
        source: what is known of them.
        spec: of the call.
        setting: of the call.
        in_place: whether the student's tiles may be masked where they are: they hold raw logits
            that nobody else reads, and that a positive factor makes real.
    """

    second_read = False

    def __init__(
        self, tensors: Sequence[Tensor | None], source: TopKSource, spec: RowSpec,
        setting: Setting, in_place: bool,
    ) -> None:  # fmt: skip
        self.tensors, self.source, self.spec, self.setting = tensors, source, spec, setting
        whole, self.small = source.specs(spec)
        whole = replace(whole, extras=())
        self.real = replace(whole, student=Cap(), teacher=Cap())
        self.kernel = whole if in_place else self.real
        tile = 0 if in_place else setting.plan.chunk * setting.plan.width
        self.scratch = torch.empty(tile, dtype=setting.wide, device=setting.device)
        self.columns = setting.plan.tiles()

    def start(self, rows: slice, labels: Tensor, given: Outcome | None) -> None:
        """Begin a chunk of rows; find the labels among the kept columns."""
        self.first_row, self.labels, wide = rows.start, labels, self.setting.wide
        indices, logprobs, *captured = (None if x is None else x[rows] for x in self.tensors)
        assert indices is not None and logprobs is not None
        self.ids, self.captured = indices.long(), captured
        self.v, self.missing = self.source.categories(self.ids, logprobs, wide)
        match = self.ids == labels[:, None]
        found, skip = match.any(1), labels == SKIP
        place = torch.where(found, match.byte().argmax(1), NONE)
        self.place = torch.where(skip, SKIP, place)
        self.outside = torch.where(found, NONE, labels)
        self.category = torch.where(skip, SKIP, torch.where(found, place, self.source.k))
        if given is None:
            self.z = torch.full_like(self.v, NEG_INF)
            self.z_sum = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
            self.state = empty(len(labels), 0, dtype=wide, device=labels.device)

    def _masked(self, i: int, x: Tensor, gather: bool) -> tuple[Tile, Tensor, Tensor]:
        """The tile without the kept columns, where they are in it, and which of them are."""
        columns = self.columns[i]
        first = self.setting.shard.first + columns.start
        local = self.ids - first
        inside = (local >= 0) & (local < x.shape[1])
        local.clamp_(0, x.shape[1] - 1)
        x = self._real(x)
        if gather:
            scale = self.kernel.student.scale
            found = x.gather(1, local).to(self.z.dtype) * scale
            self.z[:, :-1] = torch.where(inside, found, self.z[:, :-1])
            if self.spec.logit_sum:
                self.z_sum += x.sum(1, dtype=self.z.dtype) * scale
        # The others' +inf changes nothing, wherever it falls.
        mask = torch.where(inside, NEG_INF, -NEG_INF).to(x.dtype)
        x.scatter_reduce_(1, local, mask, "amin")
        compared = min(self.kernel.compared - first, x.shape[1])
        tile = Tile(x, x[:, :compared] if compared > 0 else None, self.first_row, first)
        return tile, local, inside

    def _real(self, x: Tensor) -> Tensor:
        """The tile to mask: itself, or real logits beside it."""
        if not len(self.scratch):
            return x
        return real_logits_(self.scratch[: x.numel()].view(x.shape).copy_(x), self.spec.student)

    def ahead(self, i: int) -> None:
        """Nothing is multiplied here."""

    def absorb(self, i: int, x: Tensor) -> None:
        """Pass 1."""
        tile, *_ = self._masked(i, x, gather=True)
        self.setting.backend.absorb_(self.state, tile, self.outside, self.kernel)

    def close(self) -> Outcome:
        """Statistics of the whole and of the small problem."""
        shard = self.setting.shard
        self.state = shard.merged(self.state, self.kernel)
        self.z[:, :-1] = shard.picked(self.z[:, :-1], self.ids)
        z_sum = shard.sum_(self.z_sum)
        state = self.state.precise()
        rest = absorb_column(state, state["label"], state["z_y"], state["v_y"], self.kernel)
        lse = shift(rest["m_s"]) + rest["d_s"].log()
        self.z[:, -1] = self.spec.temperature * lse
        self.setting.backend.absorb_(self.state, self._kept(self.z), self.place, self.real)
        whole = finalize(self.state, self.labels, self.kernel, self.setting.ignore_index)
        small = self._small()
        values = self._teacher(small.stats) | {
            "label": torch.where(self.labels == SKIP, self.setting.ignore_index, self.labels),
            "logit_mean": torch.where(whole.stats.valid, z_sum / self.spec.columns, 0.0),
            "argmax_s": self._argmax(rest["m_s"], rest["argmax_s"]),
        }
        extras = self._power_sums(small.stats)
        stats = replace(whole.stats, extras=extras, **values)  # type: ignore[arg-type]
        return Outcome((replace(whole, stats=stats), small), (self.z,))

    def _kept(self, z: Tensor) -> Tile:
        kept = z[:, :-1]
        return Tile(kept, kept if self.kernel.compared else None, self.first_row, 0)

    def _small(self) -> Final:
        """The dense problem over kept columns and bucket, where a label outside has its place."""
        tile = Tile(self.z, self.v, self.first_row, 0)
        given = (self.category, self.small, self.setting.ignore_index)
        return statistics_of_tile(self.setting.backend, tile, *given)

    def _argmax(self, best: Tensor, column: Tensor) -> Tensor:
        """The student's first most probable column, of the rest's best one and the kept."""
        z, at = (self.z[:, :-1] / self.spec.temperature).max(1)
        return torch.where(z > best, self.ids.gather(1, at[:, None])[:, 0], column)

    def _teacher(self, small: RowStats) -> dict[str, Tensor]:
        """The teacher's own statistics, completed by what was captured or by an even tail."""
        top, at = self.v[:, :-1].double().max(1)
        top = top / self.spec.temperature
        log_tail = self.v[:, -1].double() - small.lse_t
        each = log_tail - self.missing.clamp_min(1).log()
        compared = (self.labels >= 0) & (self.labels < self.spec.compared)
        beyond = torch.where(compared, each, NEG_INF)
        entropy = small.entropy_t + times(log_tail.exp(), self.missing.clamp_min(1).log())
        given = self.captured[0]
        values = {
            "lse_t": small.lse_t,
            "entropy_t": entropy if given is None else given.double(),
            "logp_t": torch.where(self.category < self.source.k, small.logp_t, beyond),
            "max_prob_t": (top - small.lse_t).exp(),
        }
        values = {name: torch.where(small.valid, x, 0.0) for name, x in values.items()}
        return values | {"argmax_t": self.ids.gather(1, at[:, None])[:, 0]}

    def _power_sums(self, small: RowStats) -> dict[Extra, tuple[Tensor, ...]]:
        """The tilts that read the teacher alone, completed in the same way."""
        made: dict[Extra, tuple[Tensor, ...]] = {}
        log_tail, n = self.v[:, -1].double() - small.lse_t, self.missing.clamp_min(1)
        for tilt in self.source.teacher_tilts(self.spec):
            value = small.power_sum(tilt.a, tilt.b)
            more = times((tilt.b * log_tail).exp(), n ** (1 - tilt.b) - 1)
            value = torch.where(self.missing > 0, (value.exp() + more).log(), value)
            given = self.captured[1]
            if given is not None and tilt.b == self.source.gamma:
                value = given.double()
            made[tilt] = (torch.where(small.valid, value + tilt.b * small.lse_t, 0.0),)
        return made

    def absorb_pairs(self, i: int, x: Tensor) -> None:
        """Nothing: the second read is over the small problem."""

    def close_pairs(self) -> Outcome:
        """Never called."""
        raise NotImplementedError

    def open_vjp(self, outcome: Outcome, coefficients: Sequence[Coefficients]) -> None:
        """Gradients in the kept logits and the bucket; what the bucket's asks of the rest."""
        backend, wide, cap = self.setting.backend, self.setting.wide, self.spec.student
        (z,), (whole, small) = outcome.memory, coefficients
        g = torch.empty_like(z)
        small = replace(small, labels=self.category).to(wide)
        backend.vjp(g, Tile(z, self.v, self.first_row, 0), small, self.small)
        row = dict(zip(COEFFICIENTS, whole.row, strict=True))
        row["lse_t"] = row["lse_s"]  # the student stands on both sides of the whole
        # Where the map to real logits is linear, the tiles' pass writes M to kept columns too.
        at_kept = row if cap.cap else row | {"M": torch.zeros_like(row["M"])}
        own = torch.empty_like(z[:, :-1], memory_format=torch.contiguous_format)
        backend.vjp(own, self._kept(z), self._coefficients(at_kept, self.place), self.real)
        slope = cap.scale * (1 - (z[:, :-1] / cap.cap) ** 2 if cap.cap else 1.0)
        values = (g[:, :-1] + own) * slope
        self.values = values.masked_fill_((self.labels == SKIP)[:, None], 0.0)
        row |= _over_rest(row, z[:, -1].double() / self.spec.temperature, g[:, -1].double())
        self.coefficients = self._coefficients(row, self.outside)

    def _coefficients(self, row: dict[str, Tensor], labels: Tensor) -> Coefficients:
        none = labels.new_zeros(0, len(labels), dtype=row["A"].dtype)
        made = Coefficients(torch.stack(list(row.values())), labels, none, none)
        return made.to(self.setting.wide)

    def vjp(self, i: int, x: Tensor, out: Tensor) -> None:
        """Pass 2."""
        tile, local, inside = self._masked(i, x, gather=False)
        self.setting.backend.vjp(out, tile, self.coefficients, self.kernel)
        cap = self.spec.student
        if len(self.scratch):
            slope = tile.student
            if cap.cap:  # 0 at the kept columns, which are masked
                slope.div_(cap.cap).square_().neg_().add_(1).clamp_min_(0)
                out.mul_(slope.masked_fill_((self.labels == SKIP)[:, None], 0.0))
            out.mul_(cap.scale)
        out.scatter_add_(1, local, torch.where(inside, self.values, 0.0).to(out.dtype))


def _over_rest(row: dict[str, Tensor], lse: Tensor, bucket: Tensor) -> dict[str, Tensor]:
    """Coefficients about the rest's own log-sum-exp, of which none overflows however small it is.

    With ``lp = lp' + δ`` for ``lp' = u - lse``, ``e^lp·(A + B·lp) = e^lp'·e^δ·(A + B·δ + B·lp')``.

    Args:
        row: about the log-sum-exp of all columns.
        lse: of the rest, -inf where there is none.
        bucket: derivative of the loss by the bucket's logit.
    """
    present = lse > NEG_INF
    present |= lse.isnan()
    delta = torch.where(present, lse - row["lse_s"], NEG_INF)
    weight = delta.exp()
    more = times(weight * row["B"], delta) + torch.where(present, bucket, 0.0)
    centre = torch.where(present, lse, 0.0)
    return {
        "lse_s": centre, "lse_t": centre, "B": weight * row["B"],
        "A": weight * row["A"] + more, "A_y": weight * row["A_y"] + more,
    }  # fmt: skip
