"""How tensors and specifications cross into the compiled module: as addresses and strides."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from bgkernels.backends.base import Tile
from bgkernels.rows.sampling import key_of
from bgkernels.rows.spec import Cap, RowSpec

try:
    from bgkernels.backends.native import _C

    MISSING = None
except ImportError as error:
    MISSING = str(error)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES = {"index": 0, "argmax": 1, "sample": 2}


class Call:
    """The arguments that all primitives share; keeps alive what they point to."""

    def __init__(self, tile: Tile, spec: RowSpec) -> None:
        if len(spec.tilts) > _C.MAX_TILTS:
            raise NotImplementedError(
                f"the native backend takes at most {_C.MAX_TILTS} tilts in one objective, got "
                f"{len(spec.tilts)}: use backend='eager'"
            )
        self.mixtures = len(spec.mixtures)
        self.student = _rows(tile.student)
        self.teacher = None if tile.teacher is None else _rows(tile.teacher)
        self.spec = _C.Spec(
            compared=spec.compared,
            temperature=spec.temperature,
            shared_softmax=spec.shared_softmax,
            logit_sum=spec.logit_sum,
            rule=RULES[spec.label_rule],
            key=key_of(spec.seed),
            tilts=[(t.a, t.b, t.moments) for t in spec.tilts],
            omegas=[m.omega for m in spec.mixtures],
            total_variation=spec.total_variation,
        )
        self.tile = _C.Tile(
            student=logits(self.student, spec.student),
            teacher=None if self.teacher is None else logits(self.teacher, spec.teacher),
            rows=self.student.shape[0],
            first_row=tile.first_row,
            first_column=tile.first_column,
        )


class Kernels(Protocol):
    """The primitives on one device. Each returns a status (``csrc/row_args.h``), 0 for success."""

    def absorb(self, call: Call, floats: Tensor, ints: Tensor, labels: Tensor) -> int:
        """Pass 1."""

    def absorb_pairs(self, call: Call, sums: Tensor, lse_s: Tensor, lse_t: Tensor) -> int:
        """Pass 1, second read; normalisers in fp64."""

    def vjp(self, call: Call, out: Tensor, *given: Tensor) -> int:
        """Pass 2; ``given`` are row, tilt and pair coefficients in fp64, and labels."""


def logits(x: Tensor, cap: Cap) -> _C.Logits:
    """A matrix as the kernels see it."""
    return _C.Logits(x.data_ptr(), x.stride(0), x.shape[1], DTYPES[x.dtype], cap.scale, cap.cap)


def strided(x: Tensor) -> tuple[int, int]:
    """Address and stride of the columns of a state."""
    return x.data_ptr(), x.stride(0)


def is_dense(x: Tensor) -> bool:
    """Whether rows have an inner stride of 1."""
    return x.stride(1) == 1 or x.shape[1] <= 1


def doubles(x: Tensor) -> Tensor:
    """In fp64, contiguous."""
    return x.to(torch.float64).contiguous()


def _rows(x: Tensor) -> Tensor:
    return x if is_dense(x) else x.contiguous()
