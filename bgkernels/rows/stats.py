"""Row statistics: what pass 1 knows about each pair of rows, for losses to be written over.

:func:`finalize` turns a :class:`~bgkernels.rows.state.RowState` into :class:`RowStats`, on which
divergences, routing policies and regularisers are ordinary differentiable functions. Their
vector-Jacobian product is pass 2's business (:mod:`bgkernels.rows.vjp`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice

import torch
from torch import Tensor

from bgkernels.rows.spec import Extra, Mixture, RowSpec, Tilt, TotalVariation
from bgkernels.rows.state import SKIP, RowState, absorb_column, shift, times


@dataclass(frozen=True)
class RowStats:
    """Statistics of each token's pair of distributions, in the input's leading shape.

    What functions return is fp32 (fp64 for fp64 inputs). What a divergence or policy sees is fp64:
    ``1 - soft`` and differences of entropies keep the digits that the sums have.

    ``s`` is the student, ``t`` the teacher, both tempered by ``T`` and normalised over the
    ``vocab`` compared columns, unless a field says otherwise. Values of ignored rows are 0.

    Attributes:
        lse_s, lse_t: log-sum-exp of the tempered logits.
        entropy_s, entropy_t: Shannon entropies, in nats.
        kl_ts, kl_st: ``KL(teacher ‖ student)`` and ``KL(student ‖ teacher)``, in nats.
        logp_s, logp_t: log-probability of the label; ``-inf`` where it is not a compared column.
        max_prob_s, max_prob_t, argmax_s, argmax_t: the most probable column (int64 indices; not
            differentiable).
        label: the hard label, given, or chosen from the teacher; int64, ``ignore_index`` where
            ignored.
        nll: cross-entropy of the label at temperature 1 over all the student's columns.
        lse_hard, logit_mean: log-sum-exp and mean of the student's real logits over the same
            columns.
        valid: whether the row takes part; bool.
        vocab: number of compared columns.
        positions: length of a sequence: the last leading dimension of the input (1 where there is
            none).
        extras: values of the extra statistics asked for, by :class:`~bgkernels.rows.spec.Extra`.
    """

    lse_s: Tensor
    lse_t: Tensor
    entropy_s: Tensor
    entropy_t: Tensor
    kl_ts: Tensor
    kl_st: Tensor
    logp_s: Tensor
    logp_t: Tensor
    max_prob_s: Tensor
    max_prob_t: Tensor
    argmax_s: Tensor
    argmax_t: Tensor
    label: Tensor
    nll: Tensor
    lse_hard: Tensor
    logit_mean: Tensor
    valid: Tensor
    vocab: int
    positions: int
    extras: Mapping[Extra, tuple[Tensor, ...]]

    def tilt(self, a: float, b: float, moments: bool = False) -> tuple[Tensor, ...]:
        """``log Σ e^(a·u + b·v)`` of the tempered logits.

        With ``moments`` also E[u - v] and E[(u - v)²] under its softmax.
        """
        return self._extra(Tilt(a, b, moments))

    def power_sum(self, a: float, b: float) -> Tensor:
        """``log Σ p_s^a · p_t^b``."""
        return self.tilt(a, b)[0] - a * self.lse_s - b * self.lse_t

    def mixture(self, omega: float) -> tuple[Tensor, ...]:
        """``KL(p_t ‖ m)`` and ``KL(p_s ‖ m)``, with ``m = omega·p_t + (1-omega)·p_s``."""
        return self._extra(Mixture(omega))

    def total_variation(self) -> Tensor:
        """``½ Σ |p_s - p_t|``."""
        return self._extra(TotalVariation())[0]

    def _extra(self, extra: Extra) -> tuple[Tensor, ...]:
        if extra not in self.extras:
            raise KeyError(
                f"{extra} was not computed: name it in `extras` (computed: {list(self.extras)})"
            )
        return self.extras[extra]

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order: the fields, then the extras."""
        own = [getattr(self, name) for name in TENSOR_FIELDS]
        return own + [x for values in self.extras.values() for x in values]

    def replaced(self, tensors: Iterable[Tensor]) -> RowStats:
        """The same statistics with other tensors, in the order of :meth:`tensors`."""
        it = iter(tensors)
        own = {name: next(it) for name in TENSOR_FIELDS}
        extras = {extra: tuple(next(it) for _ in values) for extra, values in self.extras.items()}
        return replace(self, extras=extras, **own)  # type: ignore[arg-type]


TENSOR_FIELDS = tuple(
    f.name for f in fields(RowStats) if f.name not in ("vocab", "positions", "extras")
)
"""Fields of :class:`RowStats` that are tensors, in order."""

DIFFERENTIABLE = ("lse_s", "entropy_s", "kl_ts", "kl_st", "logp_s", "nll", "lse_hard", "logit_mean")
"""Fields of :class:`RowStats` that carry a gradient to the student, beside all extras."""


@dataclass(frozen=True)
class Final:
    """Finalised rows: public statistics, and what only the VJP needs.

    Args:
        stats: the statistics, without the pairwise extras until :func:`add_pairs`.
        rest_s, rest_t, rest_c: ``1 - p[label]`` of student, teacher and cross-entropy softmax,
            summed without cancellation.
        overlap: ``Σ p_s·p_t/m`` for each mixture, then ``Σ p_s·sgn(p_s - p_t)`` if the total
            variation is asked for.
    """

    stats: RowStats
    rest_s: Tensor
    rest_t: Tensor
    rest_c: Tensor
    overlap: tuple[Tensor, ...] = ()

    def flat(self) -> list[Tensor]:
        """All tensors, the statistics' first; :func:`assemble` is the inverse."""
        return [*self.stats.tensors(), self.rest_s, self.rest_t, self.rest_c, *self.overlap]


def assemble(spec: RowSpec, tensors: Iterable[Tensor]) -> Final:
    """A :class:`Final` from its :meth:`Final.flat` tensors, the first of ``tensors``."""
    it = iter(tensors)
    own = {name: next(it) for name in TENSOR_FIELDS}
    counts: dict[Extra, int] = {t: 3 if t.moments else 1 for t in spec.tilts}
    counts |= dict.fromkeys(spec.mixtures, 2)
    counts |= {TotalVariation(): 1} if spec.total_variation else {}
    extras = {extra: tuple(next(it) for _ in range(n)) for extra, n in counts.items()}
    stats = RowStats(vocab=spec.compared, positions=spec.positions, extras=extras, **own)
    overlaps = len(spec.mixtures) + spec.total_variation
    return Final(stats, next(it), next(it), next(it), tuple(islice(it, overlaps)))


def finalize(state: RowState, labels: Tensor, spec: RowSpec, ignore_index: int = -100) -> Final:
    """Turn a state that has seen every column into statistics.

    Args:
        state: the merged state; its label is still held out.
        labels: ``(rows,)`` codes that were given to pass 1; ``SKIP`` marks rows that take no part.
        spec: the specification of the pass.
        ignore_index: what ``RowStats.label`` shows in skipped rows.
    """
    state = state.precise()
    skip = labels == SKIP
    label = torch.where(skip, ignore_index, state["label"])
    all_ = absorb_column(state, state["label"], state["z_y"], state["v_y"], spec)
    zero = torch.zeros_like(state["m_s"])

    def softmax_of(side: str) -> tuple[Tensor, Tensor, Tensor]:
        """lse, log d, and the probability outside the label."""
        log_d = all_[f"d_{side}"].log()
        lse = shift(all_[f"m_{side}"]) + log_d
        rest = times(state[f"d_{side}"], (shift(state[f"m_{side}"]) - lse).exp())
        return lse, log_d, rest

    def log_prob(rest: Tensor, logit: Tensor, lse: Tensor) -> Tensor:
        return torch.where(rest < 0.5, torch.log1p(-rest), logit - lse)

    compared = (state["label"] >= 0) & (state["label"] < spec.compared)
    u_y = torch.where(compared, state["z_y"] / spec.temperature, float("-inf"))
    values: dict[str, Tensor] = {}
    rest_s = rest_t = zero
    if spec.compared:
        (lse_s, log_s, rest_s), (lse_t, log_t, rest_t) = softmax_of("s"), softmax_of("t")
        d_s, d_t = all_["d_s"], all_["d_t"]
        values = {
            "lse_s": lse_s,
            "lse_t": lse_t,
            "entropy_s": log_s - all_["h_s"] / d_s,
            "entropy_t": log_t - all_["h_t"] / d_t,
            "kl_st": all_["k_s"] / d_s + log_t - log_s,
            "kl_ts": all_["k_t"] / d_t + log_s - log_t,
            "logp_s": log_prob(rest_s, u_y, lse_s),
            "logp_t": log_prob(rest_t, state["v_y"], lse_t),
            "max_prob_s": 1 / d_s,
            "max_prob_t": 1 / d_t,
        }
        for name in ("entropy_s", "entropy_t", "kl_st", "kl_ts"):
            values[name] = values[name].clamp_min(0)
    if spec.shared_softmax:
        lse_c, rest_c, nll = values["lse_s"], rest_s, -values["logp_s"]
    else:
        lse_c, _, rest_c = softmax_of("c")
        nll = -log_prob(rest_c, state["z_y"], lse_c)
    values |= {"nll": nll, "lse_hard": lse_c, "logit_mean": all_["z_sum"] / spec.columns}
    # A label that no column has is a bad one that could not be refused: it must not look plausible.
    lost = torch.where(state["label"] < 0, float("nan"), 0.0)
    keep = {name: torch.where(skip, 0.0, values.get(name, zero) + lost) for name in _FLOAT_FIELDS}
    extras: dict[Extra, tuple[Tensor, ...]] = {}
    for i, tilt in enumerate(spec.tilts):
        extras[tilt] = tuple(torch.where(skip, 0.0, x) for x in _finalize_tilt(all_, i, tilt))
    stats = RowStats(
        **keep, label=label, valid=~skip, argmax_s=all_["argmax_s"], argmax_t=all_["argmax_t"],
        vocab=spec.compared, positions=spec.positions, extras=extras,
    )  # fmt: skip
    return Final(stats, rest_s, rest_t, rest_c)


_FLOAT_FIELDS = tuple(
    name for name in TENSOR_FIELDS if name not in ("argmax_s", "argmax_t", "label", "valid")
)


def _finalize_tilt(state: RowState, i: int, tilt: Tilt) -> tuple[Tensor, ...]:
    m, d, k, q = state.tilt(i)
    lse = shift(m) + d.log()
    if not tilt.moments:
        return (lse,)
    centre = shift(state["m_s"]) - shift(state["m_t"])
    mean = k / d
    return lse, mean + centre, q / d + centre * (2 * mean + centre)


def add_pairs(final: Final, sums: Tensor, spec: RowSpec) -> Final:
    """Add the pairwise statistics, from the sums of pass 1's second read.

    Args:
        final: what :func:`finalize` returned.
        sums: ``(3·mixtures + 2·total_variation, rows)``: for each mixture KL(p_t‖m), KL(p_s‖m), Σ
            p_s·p_t/m; then ½ Σ |p_s - p_t| and Σ p_s·sgn(p_s - p_t).
    """
    sums = torch.where(final.stats.valid, sums.to(final.stats.nll.dtype), 0.0)
    extras, overlap = dict(final.stats.extras), []
    for i, mixture in enumerate(spec.mixtures):
        kl_tm, kl_sm, both = sums[3 * i : 3 * i + 3]
        extras[mixture] = (kl_tm.clamp_min(0), kl_sm.clamp_min(0))
        overlap.append(both)
    if spec.total_variation:
        extras[TotalVariation()] = (sums[-2],)
        overlap.append(sums[-1])
    return replace(final, stats=replace(final.stats, extras=extras), overlap=tuple(overlap))
