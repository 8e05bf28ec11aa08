"""Plain torch, any device and dtype: the reference text of the primitives, and the fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.backends.base import Normalisers, Tile
from bgkernels.rows import stats, vjp
from bgkernels.rows.arithmetic import NEG_INF, NONE, SKIP, minus, shift, times
from bgkernels.rows.extras import Pair
from bgkernels.rows.sampling import gumbel
from bgkernels.rows.spec import COEFFICIENTS, Cap, RowSpec
from bgkernels.rows.state import RowState, empty, merge


def real_logits(raw: Tensor, cap: Cap) -> Tensor:
    """Raw head outputs to real logits, in fp32 (fp64 stays)."""
    x = raw if raw.dtype == torch.float64 else raw.float()
    x = x * cap.scale
    return cap.cap * torch.tanh(x / cap.cap) if cap.cap else x


def real_logits_(x: Tensor, cap: Cap) -> Tensor:
    """The same in place, for a buffer that holds raw head outputs."""
    x.mul_(cap.scale)
    return x.div_(cap.cap).tanh_().mul_(cap.cap) if cap.cap else x


class EagerBackend:
    """See :class:`bgkernels.backends.base.Backend`."""

    name = "eager"
    scratch_bytes = 40

    def supports(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        """None, or the reason why not."""
        wrong = [d for d in dtypes if not d.is_floating_point]
        return f"logits must be floating point, got {wrong[0]}" if wrong else None

    def absorb_(
        self, state: RowState, tile: Tile, labels: Tensor, spec: RowSpec,
        normalisers: Normalisers | None = None,
    ) -> None:  # fmt: skip
        """Pass 1."""
        if normalisers is not None:
            self._second_read(state, tile, labels, normalisers)
            return
        z = real_logits(tile.student, spec.student)
        part = empty(len(z), spec, dtype=z.dtype, device=z.device)
        v_t = None if tile.teacher is None else real_logits(tile.teacher, spec.teacher)
        column = self._choose_label(part, z, v_t, tile, labels)
        held_out = torch.zeros_like(z, dtype=torch.bool)
        held_out.scatter_(1, column.clamp_min(0)[:, None], (column >= 0)[:, None])
        z = z.masked_fill(held_out, NEG_INF)
        if spec.logit_sum:
            part["z_sum"].copy_(z.masked_fill(held_out, 0.0).sum(1))
        if not spec.shared_softmax:
            part["m_c"].copy_(z.amax(1))
            part["d_c"].copy_((z - shift(part["m_c"])[:, None]).exp().sum(1))
        if v_t is not None:
            u = z[:, : tile.compared] / spec.temperature
            v = (v_t / spec.temperature).masked_fill(held_out[:, : tile.compared], NEG_INF)
            self._absorb_pair(part, u, v, tile.first_column)
        merged = merge(state, part)
        skip = labels == SKIP
        state.floats.copy_(torch.where(skip, state.floats, merged.floats))
        state.ints.copy_(torch.where(skip, state.ints, merged.ints))

    def _choose_label(
        self, part: RowState, z: Tensor, v_t: Tensor | None, tile: Tile, labels: Tensor
    ) -> Tensor:
        """Fill the label's rows of ``part``; return its column within the tile, or NONE."""
        spec = part.spec
        if spec.label_rule == "index":
            column = labels - tile.first_column
            column = torch.where(
                (labels >= 0) & (column >= 0) & (column < z.shape[1]), column, NONE
            )
            score = torch.where(column >= 0, 0.0, NEG_INF)
        elif v_t is None:
            return torch.full_like(labels, NONE)
        else:
            noisy = v_t
            if spec.label_rule == "sample":
                corner = (tile.first_row, len(z), tile.first_column, tile.compared)
                noisy = v_t + gumbel(*corner, spec.seed, z.device)
            score, column = noisy.max(1)
        at = column.clamp_min(0)[:, None]
        present = column >= 0
        part["score"].copy_(score)
        part["label"].copy_(torch.where(present, column + tile.first_column, NONE))
        part["z_y"].copy_(torch.where(present, z.gather(1, at)[:, 0], NEG_INF))
        if v_t is not None:
            v_y = v_t.gather(1, at.clamp_max(tile.compared - 1))[:, 0] / spec.temperature
            part["v_y"].copy_(torch.where(present & (column < tile.compared), v_y, NEG_INF))
        return column

    def _absorb_pair(self, part: RowState, u: Tensor, v: Tensor, first_column: int) -> None:
        """Sums over compared columns, the label's column being -inf in both."""
        for side, x in (("s", u), ("t", v)):
            m, index = x.max(1)
            part[f"m_{side}"].copy_(m)
            part[f"argmax_{side}"].copy_(torch.where(m == NEG_INF, NONE, index + first_column))
        du, dv = u - shift(part["m_s"])[:, None], v - shift(part["m_t"])[:, None]
        for side, x, gap in (("s", du, du - dv), ("t", dv, dv - du)):
            e = x.exp()
            part[f"d_{side}"].copy_(e.sum(1))
            part[f"h_{side}"].copy_(times(e, x).sum(1))
            part[f"k_{side}"].copy_(times(e, gap).sum(1))
        for i, extra in enumerate(part.spec.extras):
            sums = extra.absorb(Pair(u, v, du, dv), part.spec.temperature)
            for target, value in zip(part.extra(i), sums, strict=False):
                target.copy_(value)

    def _second_read(
        self, state: RowState, tile: Tile, labels: Tensor, normalisers: Normalisers
    ) -> None:
        """Add to the sums of pairwise statistics."""
        if tile.teacher is None:
            return
        spec = state.spec
        pair = _log_probs(tile, *normalisers, spec)
        for i, extra in enumerate(spec.extras):
            if extra.second_read:
                sums = torch.stack(extra.absorb_pair(pair))
                state.extra(i).add_(sums.masked_fill(labels == SKIP, 0.0))

    def finalize(self, state: RowState, labels: Tensor, spec: RowSpec, out: Tensor) -> None:
        """From a state to statistics."""
        stats.finalize(state, labels, out)

    def fold(self, statistics: Tensor, grads: Tensor, labels: Tensor, spec: RowSpec) -> Tensor:
        """From derivatives to coefficients."""
        return vjp.fold(statistics, grads, spec)

    def vjp(
        self, out: Tensor, tile: Tile, coefficients: Tensor, labels: Tensor, spec: RowSpec
    ) -> None:
        """Pass 2."""
        z = real_logits(tile.student, spec.student)
        factors = coefficients.to(z.dtype)[..., None]
        row = dict(zip(COEFFICIENTS, factors, strict=False))
        at_label = torch.arange(z.shape[1], device=z.device) == labels[:, None] - tile.first_column
        d = row["M"] + torch.zeros_like(z)
        if not spec.shared_softmax:
            hard = torch.where(at_label, row["H_y"], row["H"])
            d += times(hard, minus(z, coefficients[2]).exp())
        if tile.teacher is not None:
            inside = at_label[:, : tile.compared]
            d[:, : tile.compared] += self._vjp_pair(tile, coefficients, factors, inside, spec)
        d += torch.where(at_label, row["hot"], 0.0)
        if spec.student.cap:
            d *= 1 - (z / spec.student.cap) ** 2
        d *= spec.student.scale
        out.copy_(d.masked_fill(labels[:, None] == SKIP, 0.0))

    def _vjp_pair(
        self, tile: Tile, coefficients: Tensor, factors: Tensor, at_label: Tensor, spec: RowSpec
    ) -> Tensor:
        """The part of the gradient over compared columns, before the soft-cap."""
        row = dict(zip(COEFFICIENTS, factors, strict=False))
        pair = _log_probs(tile, coefficients[0], coefficients[1], spec)
        lp, lq = pair.s, pair.t
        p, q = lp.exp(), lq.exp()
        a = torch.where(at_label, row["A_y"], row["A"])
        d = a * p - times(torch.where(at_label, row["D_y"], row["D"]), q)
        d += times(p, times(row["B"], lp) - times(row["C"], lq))
        for extra, part in zip(spec.extras, spec.factors, strict=True):
            d += extra.vjp(pair, coefficients[part], spec.temperature)
        return d


def _log_probs(tile: Tile, lse_s: Tensor, lse_t: Tensor, spec: RowSpec) -> Pair:
    """Logits and log-probabilities of the compared columns."""
    assert tile.teacher is not None
    u = real_logits(tile.student[:, : tile.compared], spec.student) / spec.temperature
    v = real_logits(tile.teacher, spec.teacher) / spec.temperature
    return Pair(u, v, minus(u, lse_s), minus(v, lse_t))
