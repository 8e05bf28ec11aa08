"""This module computes statistics of logits in NumPy arrays, on the CPU, without copying them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bgkernels.loss import reduction as loss
from bgkernels.loss.options import Options
from bgkernels.teachers import LogitsTeacher

Array = NDArray[Any]


@dataclass(frozen=True)
class NumpyRowStats:
    """It has the fields of :class:`bgkernels.RowStats` as arrays, in the logits' leading shape.

    Floating-point arrays are float32, or float64 for float64 logits.
    """

    lse_s: Array
    lse_t: Array
    entropy_s: Array
    entropy_t: Array
    kl_ts: Array
    kl_st: Array
    logp_s: Array
    logp_t: Array
    max_prob_s: Array
    max_prob_t: Array
    argmax_s: Array
    argmax_t: Array
    label: Array
    nll: Array
    lse_hard: Array
    logit_mean: Array
    valid: Array


def row_stats(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array | str = "teacher_argmax",
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    seed: int | None = None,
) -> NumpyRowStats:
    """Compute statistics of each row of logits.

    Args:
        student_logits: ``(..., V)`` float32, float64 or float16; the last axis must be contiguous,
            else it is copied.
        teacher_logits: ``(..., V_t)``, the same leading shape.
        labels: ``(...)`` integers, ``"teacher_argmax"`` or ``"teacher_sample"``.
        temperature, ignore_index, vocab_size, seed: as in :func:`bgkernels.linear_row_stats`.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.

    Example:
        >>> student, teacher = np.zeros((2, 4), np.float32), np.eye(2, 4, dtype=np.float32)
        >>> row_stats(student, teacher).argmax_t
        array([0, 1])
    """
    options = Options(
        temperature=temperature, ignore_index=ignore_index, vocab_size=vocab_size, seed=seed
    )
    with torch.no_grad():
        stats = loss.row_stats(
            {"student_logits": _tensor("student_logits", student_logits)},
            LogitsTeacher(_tensor("teacher_logits", teacher_logits)),
            labels if isinstance(labels, str) else _tensor("labels", labels),
            options,
        )
    arrays = {f.name: getattr(stats, f.name).numpy() for f in fields(NumpyRowStats)}
    return NumpyRowStats(**arrays)


def _tensor(name: str, array: object) -> Tensor:
    """Return a tensor on the memory of an array, which is only read."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"`{name}` must be a numpy.ndarray; got {type(array).__name__}")
    if array.dtype.kind not in "fiu" or not array.dtype.isnative:
        raise TypeError(f"`{name}` must hold numbers in native byte order; got {array.dtype}")
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    with warnings.catch_warnings():  # of read-only memory
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
