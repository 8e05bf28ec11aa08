"""What the theory of bridges and gardens says of the study, each put to the same seeds."""

from __future__ import annotations

from dataclasses import dataclass

from bgkernels.training.study.measures import Interval, Measured

HYBRID = "confidence"
"""The hybrid that the claims are about: the soft label's weight is ``1 - max π_T``."""


@dataclass(frozen=True)
class Claim:
    """``measure`` of ``better`` is smaller than that of ``worse``.

    Args:
        text: in words.
        measure: a key of :data:`~bgkernels.training.study.measures.MEASURES`.
        better, worse: methods.
    """

    text: str
    measure: str
    better: str
    worse: str


CLAIMS = (
    Claim("At bridges, hard errs less than soft", "error_bridge", "hard", "soft"),
    Claim("In gardens, soft errs less than hard", "error_garden", "soft", "hard"),
    Claim("On the teacher's texts, soft is closer than the hybrid", "taught_loss", "soft", HYBRID),
    Claim("On the teacher's texts, the hybrid is closer than hard", "taught_loss", HYBRID, "hard"),
    Claim("The hybrid has less exposure bias than soft", "bias", HYBRID, "soft"),
    Claim("The hybrid has less exposure bias than hard", "bias", HYBRID, "hard"),
    Claim("Free-running, the hybrid is closer than soft", "own_loss", HYBRID, "soft"),
    Claim("Free-running, the hybrid is closer than hard", "own_loss", HYBRID, "hard"),
    Claim("Free-running, the hybrid is closer than a static mix", "own_loss", HYBRID, "static"),
    Claim("Free-running, the hybrid is closer than its reverse", "own_loss", HYBRID, "reverse"),
    Claim("The hybrid breaks fewer texts than soft", "broken", HYBRID, "soft"),
    Claim("Free-running, on-policy is closer than the hybrid", "own_loss", "on-policy", HYBRID),
    Claim("On-policy breaks fewer texts than the hybrid", "broken", "on-policy", HYBRID),
)


@dataclass(frozen=True)
class Finding:
    """A claim against the students of one size.

    Args:
        claim: what was asked.
        hidden: size of the students.
        difference: ``worse - better``, paired by seed: positive where the claim holds.
        wins: share of the seeds in which it is positive.
    """

    claim: Claim
    hidden: int
    difference: Interval
    wins: float

    @property
    def verdict(self) -> str:
        """``"holds"`` or ``"fails"`` where the interval leaves out 0, else ``"open"``."""
        if self.difference.low > 0:
            return "holds"
        return "fails" if self.difference.high < 0 else "open"


def judge(claim: Claim, hidden: int, measured: dict[str, Measured]) -> Finding:
    """Compare two methods on the same seeds."""
    gap = measured[claim.worse][claim.measure] - measured[claim.better][claim.measure]
    return Finding(claim, hidden, Interval.of(gap), float((gap > 0).double().mean()))
