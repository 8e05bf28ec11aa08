"""Compiled functions code kept tiles, as :mod:`bgkernels.streaming.coding` does in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.backends.native.call import MISSING, is_dense, numbers_of, rows_of
from bgkernels.rows.spec import Cap

if MISSING is None:
    from bgkernels.backends.native import _C


def serves(x: Tensor) -> bool:
    """Tell whether the compiled functions can read a tile and write it."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and is_dense(x)
    return MISSING is None and plain


def encode(
    x: Tensor, v: Tensor | None, caps: tuple[Cap, Cap], words: Tensor, labels: Tensor
) -> bool:
    """Code fp32 tiles ``x (rows, width)``, ``v (rows, compared)`` into fp32 ``words``."""
    s, t = ((float(cap.scale), float(cap.cap)) for cap in caps)
    return _C.encode(
        rows_of(x), rows_of(v), (s, t), len(x), numbers_of(words), labels.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def decode(
    words: Tensor, compared: int, cap: Cap, teacher: bool, out: Tensor, labels: Tensor
) -> None:
    """Write one model's logits of such ``words`` to fp32 ``out``."""
    _C.decode(
        numbers_of(words), compared, len(out), rows_of(out), float(cap.scale), teacher,
        labels.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
