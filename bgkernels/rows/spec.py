"""A specification tells a backend about the rows of one call, and lays out its three matrices.

State, statistics and coefficients of many rows are matrices with a column for each row of logits.
Their leading rows have the names below; those of the extra statistics follow in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

from bgkernels.rows.caching import lazy, remembered
from bgkernels.rows.extras import Extra

FLOATS = ("m_s", "d_s", "h_s", "k_s", "m_t", "d_t", "h_t", "k_t",
          "m_c", "d_c", "z_sum", "score", "z_y", "v_y")  # fmt: skip
"""Rows of ``RowState.floats``."""
INTS = ("label", "argmax_s", "argmax_t")
"""Rows of ``RowState.ints`` and of ``Statistics.ints``."""
FIELDS = ("lse_s", "lse_t", "entropy_s", "entropy_t", "kl_ts", "kl_st", "logp_s", "logp_t",
          "max_prob_s", "max_prob_t", "nll", "lse_hard", "logit_mean",
          "rest_s", "rest_t", "rest_c")  # fmt: skip
"""Rows of ``Statistics.values``. ``rest`` is ``1 - p[label]`` of the student's, the teacher's and
the cross-entropy's softmax, summed without cancellation."""
DIFFERENTIABLE = ("lse_s", "entropy_s", "kl_ts", "kl_st", "logp_s", "nll", "lse_hard", "logit_mean")
"""Fields that carry a gradient to the student, beside all extras."""
COEFFICIENTS = ("lse_s", "lse_t", "lse_c", "A", "B", "C", "D", "H", "M", "A_y", "D_y", "H_y", "hot")
"""Rows of the coefficients of pass 2: see :mod:`bgkernels.rows.vjp`."""


class Cap(NamedTuple):
    """A cap maps raw head outputs ``x`` to real logits ``cap·tanh(scale·x / cap)``.

    Where ``cap`` is 0, real logits are ``scale·x``.
    """

    scale: float = 1.0
    cap: float = 0.0


@remembered
def cap_of(scale: float, softcap: float | None) -> Cap:
    """The map from raw to real logits of a model."""
    return Cap(float(scale), float(softcap or 0))


@dataclass(frozen=True)
class RowSpec:
    """It says all that a backend needs to know about the rows of one call, beside the logits.

    Args:
        columns: student columns of the cross-entropy.
        compared: leading columns on which the two models are compared (0: no teacher).
        temperature: ``T`` of the comparison.
        label_rule: ``"index"``, ``"argmax"`` or ``"sample"``.
        seed: 64-bit seed of the sample.
        student, teacher: maps from raw to real logits.
        extras: extra statistics, in the order of their sums, fields and factors.
        logit_sum: accumulate ``z_sum`` (label smoothing).
        positions: rows a sequence, for policies that look at neighbours.
    """

    columns: int
    compared: int
    temperature: float = 1.0
    label_rule: str = "index"
    seed: int = 0
    student: Cap = Cap()
    teacher: Cap = Cap()
    extras: tuple[Extra, ...] = ()
    logit_sum: bool = False
    positions: int = 1

    @lazy
    def shared_softmax(self) -> bool:
        """Whether cross-entropy and comparison use one softmax; ``m_c, d_c`` then stay empty."""
        return self.temperature == 1.0 and self.columns == self.compared

    @lazy
    def second_read(self) -> bool:
        """Whether pass 1 reads twice: pairwise statistics need both normalisers first."""
        return any(extra.second_read for extra in self.extras)

    @lazy
    def sums(self) -> tuple[slice, ...]:
        """Where the sums of each extra are among the rows of the state."""
        return _slices(len(FLOATS), (len(extra.sums) for extra in self.extras))

    @lazy
    def fields(self) -> tuple[slice, ...]:
        """Where the fields of each extra are among the rows of the statistics."""
        return _slices(len(FIELDS), (len(extra.fields) for extra in self.extras))

    @lazy
    def factors(self) -> tuple[slice, ...]:
        """Where the factors of each extra are among the rows of the coefficients."""
        return _slices(len(COEFFICIENTS), (len(extra.factors) for extra in self.extras))

    @lazy
    def shown(self) -> tuple[tuple[Extra, slice], ...]:
        """Each extra, and its rows of the statistics that users see."""
        places = zip(self.extras, self.fields, strict=True)
        return tuple((e, slice(place.start, place.start + e.public)) for e, place in places)

    @lazy
    def differentiable(self) -> tuple[int, ...]:
        """Rows of the statistics that carry a gradient to the student."""
        places = zip(self.extras, self.fields, strict=True)
        extras = (place.start + i for extra, place in places for i in extra.differentiable)
        return (*map(FIELDS.index, DIFFERENTIABLE), *extras)

    def __hash__(self) -> int:
        return self._hash

    @lazy
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    @lazy
    def sum_count(self) -> int:
        """Number of rows of the state."""
        return self.sums[-1].stop if self.extras else len(FLOATS)

    @lazy
    def field_count(self) -> int:
        """Number of rows of the statistics."""
        return self.fields[-1].stop if self.extras else len(FIELDS)

    @lazy
    def factor_count(self) -> int:
        """Number of rows of the coefficients."""
        return self.factors[-1].stop if self.extras else len(COEFFICIENTS)


def _slices(start: int, counts: Iterable[int]) -> tuple[slice, ...]:
    slices = []
    for count in counts:
        slices.append(slice(start, start + count))
        start += count
    return tuple(slices)
