"""What is measured of each group of students, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bgkernels.training.study.exact import Exact
from bgkernels.training.study.world import BRIDGE, GARDEN, PLAIN

RESAMPLES = 4000
KINDS = {"bridge": BRIDGE, "garden": GARDEN, "plain": PLAIN}

MEASURES = {
    "taught_loss": "L_T",
    "own_loss": "L_θ",
    "bias": "EB",
    "bias_bridge": "EB from bridges",
    "bias_garden": "EB from gardens",
    "bias_plain": "EB from plain steps",
    "error_bridge": "κ-weighted error, bridges",
    "error_garden": "κ-weighted error, gardens",
    "broken": "P(broken)",
    "distance": "distance of states",
}
"""Losses and biases in nats a token, the weighted errors in nats a text."""

Measured = dict[str, Tensor]
"""Name of a measure to its value for each student, ``(students,)``."""


def measure(exact: Exact, reference: Exact) -> Measured:
    """All measures of some students.

    Args:
        exact: the students.
        reference: those of the same seeds whose κ weighs the errors.
    """
    steps, bias = exact.world.steps, exact.bias
    error = exact.weighted_error(reference.risk)
    at = {name: exact.world.kinds == kind for name, kind in KINDS.items()}
    taught, own = exact.taught_loss.sum(-1) / steps, exact.own_loss.sum(-1) / steps
    return {
        "taught_loss": taught,
        "own_loss": own,
        "bias": own - taught,
        **{f"bias_{name}": bias[:, where].sum(-1) / steps for name, where in at.items()},
        **{f"error_{name}": error[:, at[name]].sum(-1) for name in ("bridge", "garden")},
        "broken": exact.broken,
        "distance": exact.distance,
    }


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
