"""Models and batches of the steps under DeepSpeed ZeRO-3, and of one process beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.models import REPORTED, batch, tiny

RATE = 0.1
CASES = {
    "untied": "llama", "tied": "llama tied", "biased": "llama", "frozen": "llama", "own": "llama",
    "trainer": "llama", "trainer tied": "llama tied",
}  # fmt: skip
"""Families of the students, by what is done with them in ``tests/zero3_step.py``."""


def student(case: str) -> Any:
    """The model of a case, before it is trained."""
    model = tiny(CASES[case], **REPORTED)
    if case == "biased":
        model.lm_head = torch.nn.Linear(REPORTED["hidden_size"], REPORTED["vocab_size"])
    model.lm_head.requires_grad_(case != "frozen")
    return model


def teacher() -> Any:
    """Another model."""
    return tiny(seed=1, **REPORTED)


def steps(case: str) -> Iterator[dict[str, Tensor]]:
    """The batches of both processes; in the second, process 1 has no label at all."""
    if case.startswith("trainer"):
        yield batch(rows=8, length=14)
        return
    yield batch(rows=4)
    data = batch(rows=4)
    data["labels"][1::2] = -100
    yield data
