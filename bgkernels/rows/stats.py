"""Row statistics are what pass 1 knows of each pair of rows, and what losses are written in.

:func:`finalize` turns a :class:`~bgkernels.rows.state.RowState` into a column of
:class:`Statistics`, the one matrix that goes from the backend to autograd. :class:`RowStats` shows
its rows to divergences, policies and callers, for whom they are ordinary tensors. Their
vector-Jacobian product is pass 2's business (:mod:`bgkernels.rows.vjp`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
from torch import Tensor

from bgkernels.rows.arithmetic import SKIP, log_prob, shift, times
from bgkernels.rows.extras import Extra, Mixture, Tempered, Tilt, TotalVariation
from bgkernels.rows.spec import FIELDS, INTS, RowSpec
from bgkernels.rows.state import RowState, absorb_column

AT_ONE = Tempered(1.0)
"""What routing reads where the divergence has another temperature."""


class ExtraValues(Mapping[Extra, tuple[Tensor, ...]]):
    """It maps the extra statistics of some rows to their values.

    It compares them, since there are few; a dictionary would hash them, which the compiler of torch
    2.8 cannot.
    """

    def __init__(self, pairs: Iterable[tuple[Extra, tuple[Tensor, ...]]] = ()) -> None:
        self.pairs = tuple(pairs)

    def __getitem__(self, extra: Extra) -> tuple[Tensor, ...]:
        for key, values in self.pairs:
            if key == extra:
                return values
        raise KeyError(extra)

    def __contains__(self, extra: object) -> bool:
        return any(key == extra for key, _ in self.pairs)

    def __iter__(self) -> Iterator[Extra]:
        return iter([key for key, _ in self.pairs])

    def __len__(self) -> int:
        return len(self.pairs)

    def updated(self, other: ExtraValues) -> ExtraValues:
        """Return these values and the ``other``, which replace those of the same statistics."""
        return ExtraValues([*(pair for pair in self.pairs if pair[0] not in other), *other.pairs])


def distinct(extras: Iterable[Extra]) -> tuple[Extra, ...]:
    """Return extra statistics in their order, each once, by comparing them."""
    once: list[Extra] = []
    for extra in extras:
        if extra not in once:
            once.append(extra)
    return tuple(once)


@dataclass(frozen=True)
class RowStats:
    """It holds statistics of each token's pair of distributions, in the input's leading shape.

    ``s`` is the student, ``t`` the teacher, both normalised over the ``vocab`` compared columns,
    unless a field says otherwise. What functions return is fp32 (fp64 for fp64 inputs); what a
    divergence or policy sees is fp64, so that ``1 - soft`` and differences of entropies keep their
    digits. Values of ignored rows are 0.

    Temperatures: ``T`` is that of the divergence; ``τ`` is 1 for policies and for ``return_stats``,
    and ``T`` for divergences and :func:`bgkernels.linear_row_stats`. (The statistic
    :class:`~bgkernels.Tempered` gives any other.)

    Attributes:
        lse_s, lse_t: log-sum-exp of the logits, at temperature τ.
        entropy_s, entropy_t: Shannon entropies in nats, at τ.
        kl_ts, kl_st: ``KL(teacher ‖ student)`` and ``KL(student ‖ teacher)`` in nats, at T.
        logp_s, logp_t: log-probability of the label, at τ; ``-inf`` where it is not a compared
            column.
        max_prob_s, max_prob_t: the largest probability, at τ (not differentiable).
        argmax_s, argmax_t: the most probable column, int64; the same at every temperature.
        label: the hard label, given, or chosen from the teacher; int64, ``ignore_index`` where
            ignored.
        nll: cross-entropy of the label over all the student's columns, at temperature 1.
        lse_hard, logit_mean: log-sum-exp and mean of the student's real logits over the same
            columns, at temperature 1. The mean is summed for label smoothing, ``return_stats`` and
            :func:`bgkernels.linear_row_stats`, and NaN elsewhere.
        valid: whether the row takes part; bool.
        vocab: number of compared columns.
        positions: length of a sequence: the last leading dimension of the input (1 where there is
            none).
        extras: values of the extra statistics asked for, by their class: a :class:`Tilt` at τ, a
            :class:`Mixture` or :class:`TotalVariation` at T.
        matched: whether the token has a soft label, bool; None: every one has. Where it has none,
            what is of the teacher is 0, and the loss is the hard term (:class:`MatchedTeacher`).
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
    extras: ExtraValues
    matched: Tensor | None = None

    def tilt(self, a: float, b: float, moments: bool = False) -> tuple[Tensor, ...]:
        """Return ``log Σ e^(a·u + b·v)`` of the logits at τ.

        With ``moments``, ``E[u - v]`` and ``E[(u - v)²]`` under its softmax follow.
        """
        return self._extra(Tilt(a, b, moments))

    def power_sum(self, a: float, b: float) -> Tensor:
        """Return ``log Σ p_s^a · p_t^b``, at τ."""
        return self.tilt(a, b)[0] - a * self.lse_s - b * self.lse_t

    def tempered(self, temperature: float = 1.0) -> dict[str, Tensor]:
        """Return each distribution's statistics at a temperature, by names: ``Tempered.fields``."""
        return dict(zip(Tempered.fields, self._extra(Tempered(temperature)), strict=True))

    def mixture(self, omega: float) -> tuple[Tensor, ...]:
        """Return ``KL(p_t ‖ m)``, ``KL(p_s ‖ m)`` at T, for ``m = omega·p_t + (1-omega)·p_s``."""
        return self._extra(Mixture(omega))

    def total_variation(self) -> Tensor:
        """Return ``½ Σ |p_s - p_t|``, at T."""
        return self._extra(TotalVariation())[0]

    def _extra(self, extra: Extra) -> tuple[Tensor, ...]:
        if extra not in self.extras:
            raise KeyError(
                f"{extra} was not computed: name it in `extras` (computed: {list(self.extras)})"
            )
        return self.extras[extra]

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in a fixed order: the fields, then the extras."""
        named = [getattr(self, name) for name in TENSOR_FIELDS]
        return named + [x for _, values in self.extras.pairs for x in values]

    def replaced(self, tensors: Iterable[Tensor]) -> RowStats:
        """Return the same statistics with other tensors, in the order of :meth:`tensors`."""
        values = iter(tensors)
        named = {name: next(values) for name in TENSOR_FIELDS}
        extras = ExtraValues(
            [(extra, tuple(next(values) for _ in old)) for extra, old in self.extras.pairs]
        )
        return replace(self, extras=extras, **named)  # type: ignore[arg-type]

    def at_one(self, temperature: float, extras: Iterable[Extra]) -> RowStats:
        """Return what a policy with these ``extras`` sees of statistics at a temperature: τ = 1."""
        tilts = []
        for extra in extras:
            if isinstance(extra, Tilt):
                tempered = self.extras[extra.at(temperature)]
                tilts.append((extra, tuple(x * temperature**k for k, x in enumerate(tempered))))
        values = self.extras.updated(ExtraValues(tilts))
        return replace(self, extras=values, **self.tempered())  # type: ignore[arg-type]


TENSOR_FIELDS = tuple(
    f.name for f in fields(RowStats) if f.name not in ("vocab", "positions", "extras", "matched")
)
"""Fields of :class:`RowStats` that are tensors in every call, in order."""


@dataclass(frozen=True)
class Statistics:
    """It holds the statistics of some rows beside one teacher: a matrix whose rows have names.

    Args:
        specs: of each pair of distributions that is compared; most teachers give one.
        values: ``(fields, rows)`` fp64: the fields of each pair, then what the walk remembers.
        ints: ``(3·pairs, rows)`` int64: ``INTS`` of each pair; a row that takes no part has the
            label ``SKIP``.
    """

    specs: tuple[RowSpec, ...]
    values: Tensor
    ints: Tensor

    def __getitem__(self, name: str) -> Tensor:
        """Return the matrix row of that name, of the first pair."""
        return self.ints[INTS.index(name)] if name in INTS else self.values[FIELDS.index(name)]

    def extra(self, extra: Extra) -> Tensor:
        """Return the fields of an extra statistic of the first pair, ``(fields, rows)``."""
        return self.values[self.specs[0].fields[self.specs[0].extras.index(extra)]]

    def pairs(self) -> list[Statistics]:
        """Return each pair of distributions by itself."""
        ends = list(accumulate(spec.field_count for spec in self.specs))
        return [
            Statistics(
                (spec,),
                self.values[end - spec.field_count : end],
                self.ints[len(INTS) * k : len(INTS) * (k + 1)],
            )
            for k, (spec, end) in enumerate(zip(self.specs, ends, strict=True))
        ]

    def differentiable(self) -> list[int]:
        """Return the numbers of the matrix rows that carry a gradient to the student."""
        indices, first = [], 0
        for spec in self.specs:
            indices += [first + i for i in spec.differentiable]
            first += spec.field_count
        return indices

    def leaves(self) -> list[Tensor]:
        """Return the matrix rows; those that carry a gradient are leaves of autograd."""
        rows = list(self.values.detach().unbind(0))
        for i in self.differentiable():
            rows[i].requires_grad_()
        return rows

    def connected(self, graph: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrix rows; those that carry a gradient are taken from ``graph``."""
        rows = list(self.values.detach().unbind(0))
        for i in self.differentiable():
            rows[i] = graph[i]
        return rows

    @property
    def memory(self) -> Tensor:
        """The rows after the fields, in which the walk over a teacher remembers things."""
        return self.values[sum(spec.field_count for spec in self.specs) :]

    @classmethod
    def empty(cls, spec: RowSpec, rows: int, device: torch.device) -> Statistics:
        """Return uninitialised statistics of one pair."""
        values = torch.empty(spec.field_count, rows, dtype=torch.float64, device=device)
        return cls((spec,), values, torch.empty(len(INTS), rows, dtype=torch.int64, device=device))

    def row_stats(self, ignore_index: int, rows: Sequence[Tensor] | None = None) -> RowStats:
        """Return the first pair as losses see it.

        Args:
            ignore_index: the label that is shown of rows that take no part.
            rows: the matrix rows as autograd is to know them; None: without a history.
        """
        spec, (label, argmax_s, argmax_t, *_) = self.specs[0], self.ints.unbind(0)
        x = self.values.unbind(0) if rows is None else rows
        valid = label != SKIP
        extras = ExtraValues([(extra, tuple(x[place])) for extra, place in spec.shown])
        label = torch.where(valid, label, ignore_index)
        mean = x[12] if spec.logit_sum else torch.full_like(x[12], float("nan"))
        tensors = (
            *x[:10],
            argmax_s,
            argmax_t,
            label,
            *x[10:12],
            mean,
            valid,
        )  # by position: faster
        return RowStats(*tensors, spec.compared, spec.positions, extras)  # type: ignore[call-arg, arg-type]


def finalize(state: RowState, labels: Tensor, out: Tensor) -> None:
    """Turn a state that has seen every column into statistics.

    Args:
        state: the merged state; its label is still held out. Its argmaxes become those of all
            columns, and its label ``SKIP`` in rows that take no part.
        labels: ``(rows,)`` codes that were given to pass 1; ``SKIP`` marks rows that take no part.
        out: ``(fields, rows)``, written.
    """
    state, spec = state.precise(), state.spec
    whole = absorb_column(state, state["label"], state["z_y"], state["v_y"])
    skip, zero = labels == SKIP, torch.zeros_like(state["m_s"])
    for side in "st":
        state[f"argmax_{side}"].copy_(whole[f"argmax_{side}"])

    def softmax_of(side: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log-sum-exp, ``log d``, and the probability outside the label."""
        log_d = whole[f"d_{side}"].log()
        lse = shift(whole[f"m_{side}"]) + log_d
        rest = times(state[f"d_{side}"], (shift(state[f"m_{side}"]) - lse).exp())
        return lse, log_d, rest

    values = dict.fromkeys(FIELDS, zero)
    if spec.compared:
        (lse_s, log_s, rest_s), (lse_t, log_t, rest_t) = softmax_of("s"), softmax_of("t")
        d_s, d_t = whole["d_s"], whole["d_t"]
        u_y, v_y = (state.label_logit(side) for side in "st")
        values |= {
            "lse_s": lse_s,
            "lse_t": lse_t,
            "entropy_s": (log_s - whole["h_s"] / d_s).clamp_min(0),
            "entropy_t": (log_t - whole["h_t"] / d_t).clamp_min(0),
            "kl_st": (whole["k_s"] / d_s + log_t - log_s).clamp_min(0),
            "kl_ts": (whole["k_t"] / d_t + log_s - log_t).clamp_min(0),
            "logp_s": log_prob(rest_s, u_y, lse_s),
            "logp_t": log_prob(rest_t, v_y, lse_t),
            "max_prob_s": 1 / d_s,
            "max_prob_t": 1 / d_t,
            "rest_s": rest_s,
            "rest_t": rest_t,
        }
    if spec.shared_softmax:
        values |= {"lse_hard": lse_s, "rest_c": rest_s, "nll": -values["logp_s"]}
    else:
        lse_c, _, rest_c = softmax_of("c")
        nll = -log_prob(rest_c, state["z_y"], lse_c)
        values |= {"lse_hard": lse_c, "rest_c": rest_c, "nll": nll}
    values["logit_mean"] = whole["z_sum"] / spec.columns
    # A label that no column has is a bad one that could not be refused: it must not look plausible.
    lost = torch.where(state["label"] < 0, float("nan"), 0.0)
    out[: len(FIELDS)] = torch.stack(
        [x if name.startswith("rest") else x + lost for name, x in values.items()]
    )
    for i, extra in enumerate(spec.extras):
        out[spec.fields[i]] = torch.stack(extra.finalize(i, whole, state))
    state["label"].masked_fill_(skip, SKIP)
    out.masked_fill_(skip, 0.0)
