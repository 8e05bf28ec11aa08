"""Claims about methods, each put to students of the same seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 4000

Measured = Mapping[str, Tensor]
"""Name of a measure to its value for each student, ``(students,)``."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with a 95 % percentile bootstrap interval (Efron 1979).

    Args:
        mean, low, high: of the values.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Interval:
        """From one value a seed; the same values give the same interval.

        Example:
            >>> Interval.of(torch.tensor([1.0, 1.0, 1.0]))
            Interval(mean=1.0, low=1.0, high=1.0)
        """
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
        means = values.double()[drawn].mean(-1)
        low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return cls(float(values.double().mean()), low, high)


@dataclass(frozen=True)
class Claim:
    """``measure`` of ``better`` is smaller than that of ``worse``, or larger.

    Args:
        text: in words.
        measure: its name.
        better, worse: methods.
        larger: whether larger is better.
        margin: by how much ``better`` may fall short and the claim still hold.
    """

    text: str
    measure: str
    better: str
    worse: str
    larger: bool = False
    margin: float = 0.0


@dataclass(frozen=True)
class Finding:
    """A claim against the students of one group.

    Args:
        claim: what was asked.
        group: whose students: their size, or the name of their setting.
        difference: by how much ``better`` is better, paired by seed: positive where the claim
            holds.
        wins: share of the seeds in which it is positive.
    """

    claim: Claim
    group: int | str
    difference: Interval
    wins: float

    @property
    def verdict(self) -> str:
        """``"holds"`` or ``"fails"`` where the interval leaves out ``-margin``, else ``"open"``."""
        if self.difference.low > -self.claim.margin:
            return "holds"
        return "fails" if self.difference.high < -self.claim.margin else "open"


def judge(claim: Claim, group: int | str, measured: Mapping[str, Measured]) -> Finding:
    """Compare two methods on the same seeds.

    Example:
        >>> claim = Claim("one is less wrong than two", "wrong", "one", "two")
        >>> wrong = {"one": torch.tensor([1.0, 2.0]), "two": torch.tensor([2.0, 4.0])}
        >>> judge(claim, "all", {name: {"wrong": x} for name, x in wrong.items()}).verdict
        'holds'
    """
    gap = measured[claim.worse][claim.measure] - measured[claim.better][claim.measure]
    gap = -gap if claim.larger else gap
    return Finding(claim, group, Interval.of(gap), float((gap > 0).double().mean()))
