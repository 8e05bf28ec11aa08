"""This module chooses between the :mod:`.ways` in which a CPU multiplies 16-bit matrices.

torch's own product rounds its result to the operands' dtype: 8 bits of a logit in bf16, of which
nothing is left in the difference between a teacher and a student near it. Three others keep what
was added up, and the first that this machine runs at speed is chosen:

* ``brgemm``: blocks over oneDNN's micro-kernel, which torch exports;
* ``cblas``: the mixed products of MKL, where torch was built with it;
* ``widen``: fp32 products of widened operands.

``BGKERNELS_CPU_PRODUCT`` in the environment, or :func:`using`, names one instead. Where that one
cannot multiply a dtype, operands are widened. :func:`reasons` says why.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bgkernels.backends.base import Factors
from bgkernels.backends.native.call import Multiplied
from bgkernels.backends.native.ways import Blocked, Cblas, Product, Widened

if TYPE_CHECKING:
    from bgkernels.backends.native import _C

VARIABLE = "BGKERNELS_CPU_PRODUCT"
HALVES = (torch.bfloat16, torch.float16)
WAYS: dict[str, type[Blocked | Cblas | Widened]] = {
    "brgemm": Blocked,
    "cblas": Cblas,
    "widen": Widened,
}
PACKED_BYTES = 4 << 20
"""Of packed operands that ``brgemm`` holds for each thread (csrc/cpu/product.cpp)."""
MOST_PACKED_BYTES = 32 << 20
"""The same for all threads."""
_forced: list[str] = []


@functools.cache
def way(name: str, dtype: torch.dtype) -> Product:
    """Return the way of that name to multiply matrices of a 16-bit dtype."""
    return WAYS[name](dtype)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Multiply in the named way, in all threads, whatever the environment says."""
    _forced.append(_checked(name))
    try:
        yield
    finally:
        _forced.pop()


def chosen(dtype: torch.dtype) -> str:
    """Return the name of the way in which matrices of a 16-bit dtype are multiplied."""
    return _decide(dtype)[0]


def reasons(dtype: torch.dtype) -> str:
    """Say why the ways before the chosen one are not taken; empty where it is the first."""
    return "; ".join(_decide(dtype)[1])


def mm(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """Write ``a @ b`` of 16-bit matrices to fp32 or 16-bit ``out``, or add it to fp32 ``out``."""
    if a.numel() and b.numel():
        way(chosen(a.dtype), a.dtype).mm(a, b, out, add)
    elif not add:
        out.zero_()
    return out


def multiplied(student: Factors, teacher: Factors | None) -> Multiplied:
    """Return the factors of both models' logits as ``brgemm`` takes them."""
    return _model(student), None if teacher is None else _model(teacher)


def _model(x: Factors) -> _C.Model:
    blocked = way("brgemm", x.hidden.dtype)
    assert isinstance(blocked, Blocked)
    return blocked.factors(x.hidden, x.weight.t()), 0 if x.bias is None else x.bias.data_ptr()


def _decide(dtype: torch.dtype) -> tuple[str, list[str]]:
    name = _forced[-1] if _forced else _checked(os.environ.get(VARIABLE) or "auto")
    refusals: list[str] = []
    for candidate in WAYS if name == "auto" else (name, "widen"):
        product = way(candidate, dtype)
        reason = (product.slow() if name == "auto" else None) or product.unusable()
        if reason is None:
            return candidate, refusals
        refusals.append(f"{candidate}: {reason}")
    raise AssertionError("widening is always usable")


def _checked(name: str) -> str:
    if name in ("auto", *WAYS):
        return name
    raise ValueError(f"{VARIABLE} must be one of auto, {', '.join(WAYS)}; got {name!r}")
