"""What a model does to the output of its head, measured: a scale, a soft-cap, or more than that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VALUES = (0.0, 2.0**-10, -(2.0**-10), 1.0, -3.0, 8.0, 60.0, 2.0**24)
"""Logits that a model is shown: around zero for the scale, far out for the cap."""
MASKED = -1e4
"""Logits that are lower whatever the head says are a mask."""


class NotAHead(ValueError):
    """What a model does to its logits cannot be written as a scale and a soft-cap; says what."""


@dataclass(frozen=True)
class Curve:
    """``cap·tanh(scale·x / cap)``, elementwise.

    Args:
        scale: a factor.
        cap: None: no tanh.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Real logits of the head's output."""
        x = x * self.scale
        return self.cap * torch.tanh(x / self.cap) if self.cap else x


def grid(like: Tensor) -> Tensor:
    """Known logits in the shape ``(..., positions, V)`` of others, in fp32 or wider."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    values = torch.tensor(VALUES, dtype=dtype, device=like.device)
    steps = [torch.arange(n, device=like.device) for n in like.shape[-2:]]
    return values[(steps[0][:, None] + steps[1]) % len(VALUES)].expand(like.shape)


def fit(real: Tensor, vocab: int, config: Any) -> Curve:
    """The curve through what became of :func:`grid`.

    Args:
        real: ``(batch, positions, V)`` logits that the model returned.
        vocab: columns of the head.
        config: of the model; where a number of it explains the scale or the cap, it is taken for
            the rounded one that was measured.

    Raises:
        NotAHead: it is no such curve.
    """
    if real.ndim != 3 or real.shape[-1] != vocab:
        raise NotAHead(
            f"it returns logits of shape {tuple(real.shape)}, and its head has {vocab} columns"
        )
    raw = grid(real).to(torch.promote_types(real.dtype, torch.float32))
    real = real.to(raw.dtype)
    masked = (real <= MASKED).all(1).all(0)
    if masked.any():
        raise NotAHead(
            f"it masks {int(masked.sum())} of the {vocab} columns, the first of which is "
            f"{int(masked.nonzero()[0])}"
        )
    zero, small, large = (real[raw == VALUES[i]] for i in (0, 1, 7))
    if zero.numel() == 0 or zero.any():
        raise NotAHead("it adds something after its head")
    scale = _explained(float(small[0]) / VALUES[1], config)
    cap = None
    if float(large[0]) != float("inf") and not math.isclose(
        float(large[0]), scale * VALUES[7], rel_tol=1e-2
    ):
        cap = _explained(float(large[0]), config)
    curve = Curve(scale, cap)
    expected = curve(raw)
    tolerance = 2e-2 if real.dtype != raw.dtype else 1e-5
    if not scale or not torch.allclose(real, expected, rtol=tolerance, atol=1e-6):
        raise NotAHead("it is another function of them")
    return curve


def _explained(measured: float, config: Any) -> float:
    """A number of the configuration, or its inverse, to which a measured one was rounded."""
    near = [v for v in (1.0, *_numbers(config)) if math.isclose(v, measured, rel_tol=1e-6)]
    return min(near, key=lambda v: abs(v - measured), default=measured)


def _numbers(config: Any) -> Iterator[float]:
    for value in vars(config).values():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
            yield float(value)
            yield 1 / value
