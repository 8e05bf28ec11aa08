"""Tensors and specifications cross into the compiled module as addresses and strides."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bgkernels.backends.base import Tile
from bgkernels.rows.sampling import key_of
from bgkernels.rows.spec import RowSpec

try:
    from bgkernels.backends.native import _C

    MISSING = None
except ImportError as error:
    MISSING = str(error)

CODE_BLOCK = 0 if MISSING else _C.CODE_BLOCK
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Multiplied = tuple["_C.Model", "_C.Model"]
"""Student and teacher whose logits are multiplied."""
RULES = {"index": 0, "argmax": 1, "sample": 2}


class Kernels:
    """The compiled primitives run on the CPU here, on as many threads as torch uses."""

    def run(
        self,
        primitive: str,
        *args: Any,
        factors: Multiplied | None = None,
        columns_of: Tensor | None = None,
        written: tuple[Tensor, ...] = (),
    ) -> None:
        """Call a function of the compiled module.

        Logits have an inner stride of 1, normalisers and coefficients are in fp64, and labels are
        contiguous.

        Args:
            primitive: name of the function.
            args: of the function, but for the last, which says where and how it runs.
            factors: of the logits of both models, where they are multiplied as they are read.
            columns_of: the matrix whose columns several blocks of a GPU may share out.
            written: matrices ``(·, rows)`` of which each of these blocks needs one to itself.

        Raises:
            RuntimeError: the function refused its arguments.
        """
        where = torch.get_num_threads(), *(factors or (None, None))
        check_status(getattr(_C, primitive)(*args, where))

    def scale_(self, x: Tensor, factor: Tensor) -> bool:
        """Multiply a tensor in place; tell whether a function for it is there."""
        return False


def check_status(status: int) -> None:
    """Raise where a status (``csrc/row_args.h``) is not 0."""
    if status:
        raise RuntimeError(
            f"the compiled module refused its arguments, status {status}: please report it"
        )


@functools.lru_cache(maxsize=256)
def compiled(spec: RowSpec) -> _C.Spec:
    """Translate a specification for the kernels, once for all its tiles."""
    if len(spec.extras) > _C.MAX_EXTRAS:
        raise NotImplementedError(
            f"the native backend takes at most {_C.MAX_EXTRAS} extra statistics in one objective, "
            f"got {len(spec.extras)}: use backend='eager'"
        )
    return _C.Spec(
        columns=spec.columns,
        compared=spec.compared,
        temperature=spec.temperature,
        shared_softmax=spec.shared_softmax,
        logit_sum=spec.logit_sum,
        rule=RULES[spec.label_rule],
        key=key_of(spec.seed),
        student=(spec.student.scale, spec.student.cap),
        teacher=(spec.teacher.scale, spec.teacher.cap),
        extras=[
            (extra.kind, float(a), float(b), bool(moments))
            for extra in spec.extras
            for a, b, moments in (extra.parameters,)
        ],
    )


def rows_of(x: Tensor | None) -> _C.Rows:
    """Return address, row stride, columns and dtype of a matrix of logits; zeros for None."""
    if x is None:
        return 0, 0, 0, 0
    return x.data_ptr(), x.stride(0), x.size(1), DTYPES[x.dtype]


def corner_of(tile: Tile) -> _C.Corner:
    """Return number of rows, first row and first column of a tile."""
    return tile.student.size(0), tile.first_row, tile.first_column


def code_of(tile: Tile) -> _C.Codes:
    """Return words and centres of a tile's code; zeros where it has none."""
    code = tile.code
    return ((0, 0), (0, 0)) if code is None else (numbers_of(code.words), numbers_of(code.centres))


def numbers_of(x: Tensor) -> _C.Numbers:
    """Return address and stride of a matrix ``(·, rows)``."""
    return x.data_ptr(), x.stride(0)


def is_dense(x: Tensor) -> bool:
    """Tell whether rows have an inner stride of 1."""
    return x.stride(1) == 1 or x.size(1) <= 1


def dense(tile: Tile) -> Tile:
    """Return the same tile with an inner stride of 1."""
    student, teacher = tile.student, tile.teacher
    if is_dense(student) and (teacher is None or is_dense(teacher)):
        return tile
    teacher = None if teacher is None else teacher.contiguous()
    return replace(tile, student=student.contiguous(), teacher=teacher)
