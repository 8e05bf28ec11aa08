"""The eager backend says the primitives in plain torch, for any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.backends.base import Backend, Normalisers, Tile, scale_
from bgkernels.backends.code import LEAST_BLOCK
from bgkernels.rows import stats, vjp
from bgkernels.rows.arithmetic import NEG_INF, NONE, SKIP, minus, shift, times
from bgkernels.rows.extras import Pair
from bgkernels.rows.sampling import gumbel
from bgkernels.rows.spec import COEFFICIENTS, Cap, RowSpec
from bgkernels.rows.state import RowState, empty, merge


def real_logits(raw: Tensor, cap: Cap) -> Tensor:
    """Map raw head outputs to real logits, in fp32 (fp64 stays)."""
    x = raw if raw.dtype == torch.float64 else raw.float()
    x = x * cap.scale
    return cap.cap * torch.tanh(x / cap.cap) if cap.cap else x


def real_logits_(x: Tensor, cap: Cap) -> Tensor:
    """Map raw head outputs to real logits in place."""
    x.mul_(cap.scale)
    return x.div_(cap.cap).tanh_().mul_(cap.cap) if cap.cap else x


class EagerBackend(Backend):
    """This backend is the reference text of the primitives, and the fallback."""

    name = "eager"
    scratch_bytes = 40

    def supports(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        wrong = [d for d in dtypes if not d.is_floating_point]
        return f"logits must be floating point, got {wrong[0]}" if wrong else None

    def code_block(self, device: torch.device) -> int:
        return LEAST_BLOCK

    def absorb_(
        self,
        state: RowState,
        tile: Tile,
        labels: Tensor,
        spec: RowSpec,
        normalisers: Normalisers | None = None,
    ) -> None:
        if normalisers is not None:
            self._second_read(state, tile, labels, normalisers, spec)
            return
        z, v_t = _logits(tile, spec)
        if tile.code is not None:
            tile.code.write(z, v_t)
        tile_state = empty(len(z), spec, dtype=z.dtype, device=z.device)
        column = self._choose_label(tile_state, z, v_t, tile, labels)
        held_out = torch.zeros_like(z, dtype=torch.bool)
        held_out.scatter_(1, column.clamp_min(0)[:, None], (column >= 0)[:, None])
        z = z.masked_fill(held_out, NEG_INF)
        if spec.logit_sum:
            tile_state["z_sum"].copy_(z.masked_fill(held_out, 0.0).sum(1))
        if not spec.shared_softmax:
            m_c = z.amax(1)
            tile_state["m_c"].copy_(m_c)
            tile_state["d_c"].copy_((z - shift(m_c)[:, None]).exp().sum(1))
        if v_t is not None:
            u = z[:, : tile.compared] / spec.temperature
            v = (v_t / spec.temperature).masked_fill(held_out[:, : tile.compared], NEG_INF)
            self._absorb_pair(tile_state, u, v, tile.first_column)
        merged = merge(state, tile_state)
        skip = labels == SKIP
        state.floats.copy_(torch.where(skip, state.floats, merged.floats))
        state.ints.copy_(torch.where(skip, state.ints, merged.ints))

    def _choose_label(
        self, state: RowState, z: Tensor, v_t: Tensor | None, tile: Tile, labels: Tensor
    ) -> Tensor:
        """Write the label's rows of the state; return its column within the tile, or NONE."""
        spec = state.spec
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
        state["score"].copy_(score)
        state["label"].copy_(torch.where(present, column + tile.first_column, NONE))
        state["z_y"].copy_(torch.where(present, z.gather(1, at)[:, 0], NEG_INF))
        if v_t is not None:
            v_y = v_t.gather(1, at.clamp_max(tile.compared - 1))[:, 0] / spec.temperature
            state["v_y"].copy_(torch.where(present & (column < tile.compared), v_y, NEG_INF))
        return column

    def _absorb_pair(self, state: RowState, u: Tensor, v: Tensor, first_column: int) -> None:
        """Write the sums over compared columns, of which the label's is -inf in both."""
        for side, x in (("s", u), ("t", v)):
            m, index = x.max(1)
            state[f"m_{side}"].copy_(m)
            state[f"argmax_{side}"].copy_(torch.where(m == NEG_INF, NONE, index + first_column))
        du, dv = u - shift(state["m_s"])[:, None], v - shift(state["m_t"])[:, None]
        for side, x, gap in (("s", du, du - dv), ("t", dv, dv - du)):
            e = x.exp()
            state[f"d_{side}"].copy_(e.sum(1))
            state[f"h_{side}"].copy_(times(e, x).sum(1))
            state[f"k_{side}"].copy_(times(e, gap).sum(1))
        for i, extra in enumerate(state.spec.extras):
            sums = extra.absorb(Pair(u, v, du, dv), state.spec.temperature)
            for target, value in zip(state.extra(i), sums, strict=False):
                target.copy_(value)

    def _second_read(
        self, state: RowState, tile: Tile, labels: Tensor, normalisers: Normalisers, spec: RowSpec
    ) -> None:
        """Add to the sums of the statistics that need both normalisers."""
        z, v = _coded(tile, spec)
        if v is None:
            return
        pair = _log_probs(z[:, : tile.compared], v, *normalisers, spec)
        for i, extra in enumerate(spec.extras):
            if extra.second_read:
                sums = torch.stack(extra.absorb_pair(pair))
                state.extra(i).add_(sums.masked_fill(labels == SKIP, 0.0))

    def finalize(self, state: RowState, labels: Tensor, spec: RowSpec, out: Tensor) -> None:
        stats.finalize(state, labels, out)

    def fold(self, statistics: Tensor, grads: Tensor, labels: Tensor, spec: RowSpec) -> Tensor:
        return vjp.fold(statistics, grads, spec)

    def vjp(
        self, out: Tensor, tile: Tile, coefficients: Tensor, labels: Tensor, spec: RowSpec
    ) -> None:
        z, v = _coded(tile, spec)
        factors = coefficients.to(z.dtype)[..., None]
        row = dict(zip(COEFFICIENTS, factors, strict=False))
        at_label = torch.arange(z.shape[1], device=z.device) == labels[:, None] - tile.first_column
        d = row["M"] + torch.zeros_like(z)
        if not spec.shared_softmax:
            hard = torch.where(at_label, row["H_y"], row["H"])
            d += times(hard, minus(z, coefficients[2]).exp())
        if v is not None:
            inside = at_label[:, : tile.compared]
            pair = _log_probs(z[:, : tile.compared], v, coefficients[0], coefficients[1], spec)
            d[:, : tile.compared] += self._vjp_pair(pair, coefficients, factors, inside, spec)
        d += torch.where(at_label, row["hot"], 0.0)
        if spec.student.cap:
            d *= 1 - (z / spec.student.cap) ** 2
        d *= spec.student.scale
        out.copy_(d.masked_fill(labels[:, None] == SKIP, 0.0))

    def scale_(self, x: Tensor, factor: Tensor) -> None:
        scale_(x, factor)

    def _vjp_pair(
        self, pair: Pair, coefficients: Tensor, factors: Tensor, at_label: Tensor, spec: RowSpec
    ) -> Tensor:
        """Return the gradient over compared columns in their real logits."""
        row = dict(zip(COEFFICIENTS, factors, strict=False))
        lp, lq = pair.s, pair.t
        p, q = lp.exp(), lq.exp()
        a = torch.where(at_label, row["A_y"], row["A"])
        d = a * p - times(torch.where(at_label, row["D_y"], row["D"]), q)
        d += times(p, times(row["B"], lp) - times(row["C"], lq))
        for extra, place in zip(spec.extras, spec.factors, strict=True):
            d += extra.vjp(pair, coefficients[place], spec.temperature)
        return d


def _logits(tile: Tile, spec: RowSpec) -> tuple[Tensor, Tensor | None]:
    """Return both models' real logits."""
    z = real_logits(tile.student, spec.student)
    return z, None if tile.teacher is None else real_logits(tile.teacher, spec.teacher)


def _coded(tile: Tile, spec: RowSpec) -> tuple[Tensor, Tensor | None]:
    """Return them from the tile's code, if it has one: after the first read of pass 1."""
    if tile.code is None:
        return _logits(tile, spec)
    z, v = tile.code.read(tile.compared)
    return z, None if tile.teacher is None else v


def _log_probs(z: Tensor, v: Tensor, lse_s: Tensor, lse_t: Tensor, spec: RowSpec) -> Pair:
    """Return tempered logits and log-probabilities of the compared columns."""
    u, v = z / spec.temperature, v / spec.temperature
    return Pair(u, v, minus(u, lse_s), minus(v, lse_t))
