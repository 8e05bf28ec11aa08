"""Logits are multiplied inline where the primitives that read them multiply them by blocks."""

from __future__ import annotations

import torch

from bgkernels.streaming.kept import codable
from bgkernels.streaming.problem import Problem, Tensors

LEAST_ROWS = 128
"""Rows of a call whose products are worth it: blocks of rows are shared out among threads."""
SPAN, HEIGHT = 1024, 64
"""Most columns and rows of a block (csrc/cpu/multiplied.cpp)."""


def inline_bytes(problem: Problem) -> int:
    """Bytes of packed operands and of blocks of logits; 0: logits are multiplied before."""
    heads = [x for x in (problem.student, problem.teacher.tensors) if x]
    if len(heads) > 1 and not codable(problem):
        return 0
    if len(problem.labels) < LEAST_ROWS or not all(_multiplied(x, problem) for x in heads):
        return 0
    depth = sum(x[0].shape[1] for x in heads if x[0] is not None)
    blocks = torch.get_num_threads() * len(heads) * HEIGHT * SPAN * 4
    return 2 * SPAN * depth + blocks


def _multiplied(head: Tensors, problem: Problem) -> bool:
    """Whether the backend multiplies a head's tiles from its tensors as they are."""
    if len(head) < 2:
        return False
    hidden, weight = (x for x in head[:2] if x is not None)
    product = problem.product(hidden)
    return hidden.dtype == weight.dtype == product and problem.backend.multiplies(
        product, hidden.device
    )
