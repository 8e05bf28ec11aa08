"""A backend whose gradient is wrong in one way: what conforms must not conform with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bgkernels.backends.base import Backend, Tile
from bgkernels.rows.spec import RowSpec


class Mutant:
    """A backend whose gradient is wrong in one way."""

    name = "mutant"

    def __init__(self, honest: Backend, fault: Callable[[Tensor, Tile], object]) -> None:
        self.honest, self.fault = honest, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self.honest, name)

    def vjp(
        self, out: Tensor, tile: Tile, coefficients: Tensor, labels: Tensor, spec: RowSpec
    ) -> None:
        self.honest.vjp(out, tile, coefficients, labels, spec)
        self.fault(out, tile)


FAULTS: dict[str, Callable[[Tensor, Tile], object]] = {
    "zeroed": lambda out, tile: out.zero_(),
    "negated": lambda out, tile: out.neg_(),
    "1 % more": lambda out, tile: out.mul_(1.01),
    "1 % less": lambda out, tile: out.mul_(0.99),
    "one tile missing": lambda out, tile: out.mul_(tile.first_column != 192),
    "the last row missing": lambda out, tile: out[-1:].zero_(),
    "10 % more in one row": lambda out, tile: out[4:5].mul_(1.1),
}
