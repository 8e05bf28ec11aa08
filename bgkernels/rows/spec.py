"""What a backend is told about the rows of one call, beside the logits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tilt:
    """``log Σ e^(a·u + b·v)`` over the compared columns.

    With the first two moments of ``u - v`` under its softmax.

    Args:
        a, b: exponents of student and teacher.
        moments: also accumulate the moments (needed by the limits of alpha-beta only).
    """

    a: float
    b: float
    moments: bool = False


@dataclass(frozen=True)
class Mixture:
    """``KL(p_t ‖ m)`` and ``KL(p_s ‖ m)`` for ``m = omega·p_t + (1-omega)·p_s``, 0 < omega < 1."""

    omega: float


@dataclass(frozen=True)
class TotalVariation:
    """``½ Σ |p_s - p_t|``."""


Extra = Tilt | Mixture | TotalVariation


@dataclass(frozen=True)
class Cap:
    """The map from raw head outputs to real logits: ``cap·tanh(scale·x / cap)``.

    ``scale·x`` where ``cap`` is 0.
    """

    scale: float = 1.0
    cap: float = 0.0


@dataclass(frozen=True)
class ClosedWeights:
    """Hard and soft weight of a row, constant or a function of the teacher's distribution.

    Args:
        kind: one of ``CLOSED_WEIGHTS``.
        hard, soft: the weights themselves, of ``"constant"``.
        tau, sharpness: of ``"threshold"``.
        reversed: the two change places.
    """

    kind: str = "constant"
    hard: float = 0.0
    soft: float = 0.0
    tau: float = 0.0
    sharpness: float = 0.0
    reversed: bool = False


CLOSED_WEIGHTS = ("constant", "label", "max", "power", "shannon", "threshold")
"""In the order of ``Policy`` in ``csrc/row_args.h``; functions of that name in ``routing.py``."""


@dataclass(frozen=True)
class ClosedDivergence:
    """``kl_ts·KL(t ‖ s) + kl_st·KL(s ‖ t) + kl_tm·KL(t ‖ m) + kl_sm·KL(s ‖ m) + variation·TV``.

    ``m`` is the mixture among the extras.
    """

    kl_ts: float = 0.0
    kl_st: float = 0.0
    kl_tm: float = 0.0
    kl_sm: float = 0.0
    variation: float = 0.0


@dataclass(frozen=True)
class ClosedForm:
    """A loss whose coefficients of pass 2 a backend can compute itself, between the passes.

    ``hard·CE + soft·T²·divergence + z_loss·lse²``.
    """

    divergence: ClosedDivergence
    weights: ClosedWeights
    label_smoothing: float
    z_loss: float


@dataclass(frozen=True)
class RowSpec:
    """All that a backend needs to know about the rows of one call, beside the logits.

    Args:
        columns: student columns of the cross-entropy.
        compared: leading columns on which the two models are compared (0: no teacher).
        temperature: ``T`` of the comparison.
        label_rule: ``"index"``, ``"argmax"`` or ``"sample"``.
        seed: 64-bit seed of the sample.
        student, teacher: maps from raw to real logits.
        extras: extra statistics, in the order asked for.
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

    @property
    def shared_softmax(self) -> bool:
        """Whether cross-entropy and comparison use one softmax; ``m_c, d_c`` then stay empty."""
        return self.temperature == 1.0 and self.columns == self.compared

    @property
    def tilts(self) -> tuple[Tilt, ...]:
        """The tilts among the extras."""
        return tuple(e for e in self.extras if isinstance(e, Tilt))

    @property
    def mixtures(self) -> tuple[Mixture, ...]:
        """The mixtures among the extras."""
        return tuple(e for e in self.extras if isinstance(e, Mixture))

    @property
    def total_variation(self) -> bool:
        """Whether the total variation is among the extras."""
        return any(isinstance(e, TotalVariation) for e in self.extras)

    @property
    def second_read(self) -> bool:
        """Whether pass 1 reads twice: pairwise statistics need both normalisers first."""
        return bool(self.mixtures) or self.total_variation

    @property
    def pair_sums(self) -> int:
        """Numbers a row that the second read adds up."""
        return 3 * len(self.mixtures) + 2 * self.total_variation
