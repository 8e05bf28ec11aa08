"""Plain torch, any device and dtype: the reference text of the two primitives, and the fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.backends.base import Tile
from bgkernels.rows.sampling import gumbel
from bgkernels.rows.spec import Cap, RowSpec
from bgkernels.rows.state import (
    NEG_INF,
    NONE,
    SKIP,
    TILT,
    RowState,
    empty,
    merge,
    shift,
    tilted,
    times,
)
from bgkernels.rows.vjp import COEFFICIENTS, Coefficients

LOG_RATIO_BOUND = 80.0
"""Bound on ``lq - lp`` inside a mixture: beyond it one of the two probabilities is below e⁻⁸⁰."""


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

    def absorb_(self, state: RowState, tile: Tile, labels: Tensor, spec: RowSpec) -> None:
        """Pass 1."""
        z = real_logits(tile.student, spec.student)
        part = empty(len(z), len(spec.tilts), dtype=z.dtype, device=z.device)
        v_t = self._teacher(tile, spec)
        column = self._choose_label(part, z, v_t, tile, labels, spec)
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
            self._absorb_pair(part, u, v, tile.first_column, spec)
        merged = merge(state, part, spec)
        skip = labels == SKIP
        state.floats.copy_(torch.where(skip, state.floats, merged.floats))
        state.ints.copy_(torch.where(skip, state.ints, merged.ints))

    def _teacher(self, tile: Tile, spec: RowSpec) -> Tensor | None:
        return None if tile.teacher is None else real_logits(tile.teacher, spec.teacher)

    def _choose_label(
        self,
        part: RowState,
        z: Tensor,
        v_t: Tensor | None,
        tile: Tile,
        labels: Tensor,
        spec: RowSpec,
    ) -> Tensor:
        """Fill the label's columns of ``part``; return its column within the tile, or NONE."""
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
        found = column >= 0
        compared = found & (column < tile.compared)
        part["score"].copy_(score)
        part["label"].copy_(torch.where(found, column + tile.first_column, NONE))
        part["z_y"].copy_(torch.where(found, z.gather(1, at)[:, 0], NEG_INF))
        if v_t is not None:
            v_y = v_t.gather(1, at.clamp_max(tile.compared - 1))[:, 0] / spec.temperature
            part["v_y"].copy_(torch.where(compared, v_y, NEG_INF))
        return column

    def _absorb_pair(
        self, part: RowState, u: Tensor, v: Tensor, first_column: int, spec: RowSpec
    ) -> None:
        """Sums over compared columns, the label's column being -inf in both."""
        for side, x in (("s", u), ("t", v)):
            m, index = x.max(1)
            part[f"m_{side}"].copy_(m)
            part[f"argmax_{side}"].copy_(torch.where(m == NEG_INF, NONE, index + first_column))
        du, dv = u - shift(part["m_s"])[:, None], v - shift(part["m_t"])[:, None]
        for side, own, other in (("s", du, dv), ("t", dv, du)):
            e = own.exp()
            part[f"d_{side}"].copy_(e.sum(1))
            part[f"h_{side}"].copy_(times(e, own).sum(1))
            part[f"k_{side}"].copy_(times(e, own - other).sum(1))
        for i, tilt in enumerate(spec.tilts):
            w = tilted(tilt, u, v)
            m = w.amax(1)
            e = (w - shift(m)[:, None]).exp()
            columns = [m, e.sum(1)]
            if tilt.moments:
                x = du - dv
                columns += [times(e, x).sum(1), times(e, x * x).sum(1)]
            for target, value in zip(part.tilt(i), columns, strict=False):
                target.copy_(value)

    def absorb_pairs_(
        self, sums: Tensor, tile: Tile, lse_s: Tensor, lse_t: Tensor, spec: RowSpec
    ) -> None:
        """Pass 1, second read."""
        if tile.teacher is None:
            return
        lp, lq, _ = self._log_probs(tile, lse_s, lse_t, spec)
        p, q = lp.exp(), lq.exp()
        parts = []
        for mixture in spec.mixtures:
            ratio, log_ratio_s, log_ratio_t = mixture_terms(lp, lq, mixture.omega)
            parts += [times(q, log_ratio_t), times(p, log_ratio_s), times(p, ratio)]
        if spec.total_variation:
            parts += [(p - q).abs() / 2, p * torch.sign(p - q)]
        sums += torch.stack([x.sum(1) for x in parts])

    def _log_probs(
        self, tile: Tile, lse_s: Tensor, lse_t: Tensor, spec: RowSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """lp and lq over the compared columns, and the real student logits of all columns."""
        assert tile.teacher is not None
        z = real_logits(tile.student, spec.student)
        lp = z[:, : tile.compared] / spec.temperature - lse_s[:, None]
        lq = real_logits(tile.teacher, spec.teacher) / spec.temperature - lse_t[:, None]
        return lp, lq, z

    def vjp(self, out: Tensor, tile: Tile, coefficients: Coefficients, spec: RowSpec) -> None:
        """Pass 2."""
        row = {name: x[:, None] for name, x in zip(COEFFICIENTS, coefficients.row, strict=True)}
        z = real_logits(tile.student, spec.student)
        column = coefficients.labels[:, None] - tile.first_column
        at_label = torch.arange(z.shape[1], device=z.device) == column
        d = torch.where(at_label, row["H_y"], row["H"])
        if spec.shared_softmax:
            d = row["M"] + torch.zeros_like(z)
        else:
            d = times(d, (z - row["lse_c"]).exp()) + row["M"]
        if tile.teacher is not None:
            d[:, : tile.compared] += self._vjp_pair(
                tile, coefficients, row, at_label[:, : tile.compared], spec
            )
        d += torch.where(at_label, row["hot"], 0.0)
        if spec.student.cap:
            d *= 1 - (z / spec.student.cap) ** 2
        d *= spec.student.scale
        out.copy_(d.masked_fill(coefficients.labels[:, None] == SKIP, 0.0))

    def _vjp_pair(
        self,
        tile: Tile,
        coefficients: Coefficients,
        row: dict[str, Tensor],
        at_label: Tensor,
        spec: RowSpec,
    ) -> Tensor:
        """The part of the gradient over compared columns, before the soft-cap."""
        lp, lq, _ = self._log_probs(tile, coefficients.row[0], coefficients.row[1], spec)
        p, q = lp.exp(), lq.exp()
        a = torch.where(at_label, row["A_y"], row["A"])
        d_t = torch.where(at_label, row["D_y"], row["D"])
        d = a * p - times(d_t, q)
        d += times(p, scaled_rows(row["B"], lp) - scaled_rows(row["C"], lq))
        for tilt, (lse, p0, p1, p2) in zip(
            spec.tilts, coefficients.tilts[..., None].unflatten(0, (-1, len(TILT))), strict=True
        ):
            u, v = lp + row["lse_s"], lq + row["lse_t"]
            weight = (tilted(tilt, u, v) - lse).exp()
            terms = p0 + (p1 + p2 * (u - v)) * (u - v) if tilt.moments else p0
            d += times(weight, terms)
        return d + self._vjp_second_read(lp, lq, p, q, coefficients.pairs[..., None], spec)

    def _vjp_second_read(
        self, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, pairs: Tensor, spec: RowSpec
    ) -> Tensor:
        d = torch.zeros_like(p)
        for i, mixture in enumerate(spec.mixtures):
            y0, y1, y2 = pairs[3 * i : 3 * i + 3]
            ratio, log_ratio, _ = mixture_terms(lp, lq, mixture.omega)
            d += times(p, y0 + y1 * ratio + y2 * log_ratio)
        if spec.total_variation:
            d += p * (pairs[-2] + pairs[-1] * torch.sign(p - q))
        return d


def scaled_rows(weight: Tensor, x: Tensor) -> Tensor:
    """``weight · x`` with 0 · (±inf) = 0, ``weight`` being ``(rows, 1)``."""
    return torch.where(weight == 0, 0.0, weight * x)


def mixture_terms(lp: Tensor, lq: Tensor, omega: float) -> tuple[Tensor, Tensor, Tensor]:
    """``p_t/m``, ``log(p_s/m)`` and ``log(p_t/m)`` for ``m = omega·p_t + (1-omega)·p_s``.

    Finite where a column is masked in both models.
    """
    absent = (lp == NEG_INF) & (lq == NEG_INF)
    delta = torch.where(absent, 0.0, lq - lp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    log_ratio_t = -torch.log1p((1 - omega) * torch.expm1(-delta))
    return log_ratio_t.exp(), -torch.log1p(omega * torch.expm1(delta)), log_ratio_t
