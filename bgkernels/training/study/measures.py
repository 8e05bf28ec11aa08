"""What is measured of each group of students."""

from __future__ import annotations

from bgkernels.training.claims import Measured
from bgkernels.training.study.exact import Exact
from bgkernels.training.study.world import BRIDGE, GARDEN, PLAIN

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
