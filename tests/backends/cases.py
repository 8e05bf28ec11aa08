"""Specifications and labels on which the compiled kernels meet the eager backend."""

from __future__ import annotations

import torch

from bgkernels.rows.arithmetic import NONE, SKIP
from bgkernels.rows.extras import Mixture, Tempered, Tilt, TotalVariation
from bgkernels.rows.spec import Cap, RowSpec

NAN, INF = float("nan"), float("inf")
BLOCK, LANES = 512, 16  # csrc/cpu/blocks.h on AVX2, twice as on baseline; the widest vectors
WIDTH = 2 * BLOCK + 22
PADDED = WIDTH - 30


def exact(temperature: float) -> float:
    """A temperature nearby whose inverse, by which the kernels multiply, is a float."""
    return 1 / torch.tensor(1 / temperature).item()


LABELS = [3, BLOCK, SKIP, WIDTH - 1, *range(100, 1000, 100)]  # enough rows for a yardstick
TILTS = (
    Tilt(0, 0.1), Tilt(0.5, 0), Tilt(0.3, 0.6), Tilt(-0.4, 0.7), Tilt(0, 0, True),
    Tilt(0.8, 0, True), Tilt(0.3, 0.3, True),
)  # fmt: skip
PAIRS = (Mixture(0.5), Mixture(0.1), TotalVariation())
MIXED = (Mixture(0.5), Tilt(0.3, 0.6, True), TotalVariation(), Tempered(), Tilt(0, 0.1),
         Mixture(0.1), Tempered(exact(0.5)))  # fmt: skip
CAPS = {"student": Cap(1.5, 8.0), "teacher": Cap(0.5, 12.0)}
CASES: dict[str, tuple[RowSpec, str]] = {
    "plain": (RowSpec(WIDTH, WIDTH), "ff"),
    "bf16": (RowSpec(WIDTH, WIDTH, logit_sum=True), "bb"),
    "fp16": (RowSpec(WIDTH, WIDTH), "hh"),
    "padded": (RowSpec(WIDTH, PADDED), "hb"),
    "tempered": (RowSpec(WIDTH, WIDTH, exact(3.0)), "fb"),
    "padded, tempered": (RowSpec(WIDTH, PADDED, 2.0, logit_sum=True), "bf"),
    "cross-entropy": (RowSpec(WIDTH, 0, logit_sum=True), "h"),
    "argmax": (RowSpec(WIDTH, WIDTH, label_rule="argmax", logit_sum=True), "bb"),
    "argmax, padded": (RowSpec(WIDTH, PADDED, exact(1.5), "argmax", extras=TILTS[2:5]), "fb"),
    "sample": (
        RowSpec(WIDTH, PADDED, exact(0.7), "sample", seed=2**63 - 5, extras=TILTS[:1]),
        "hh",
    ),
    "tilts": (RowSpec(WIDTH, WIDTH, exact(1.3), extras=TILTS), "ff"),
    "pairs": (RowSpec(WIDTH, WIDTH, extras=PAIRS), "fb"),
    "capped": (RowSpec(WIDTH, PADDED, 2.0, extras=(Mixture(0.7), Tilt(0, 0.1)), **CAPS), "ff"),
    "tempered statistics": (RowSpec(WIDTH, WIDTH, exact(3.0), extras=(Tempered(),)), "ff"),
    "mixed kinds": (RowSpec(WIDTH, PADDED, exact(1.3), extras=MIXED, logit_sum=True), "bf"),
    "mixed kinds, argmax": (RowSpec(WIDTH, PADDED, 2.0, "argmax", extras=MIXED), "fb"),
    "scaled": (RowSpec(WIDTH, PADDED, student=Cap(0.25), teacher=Cap(-2.0), extras=PAIRS), "hf"),
}


def labels_of(spec: RowSpec) -> list[int]:
    """A label for each of 13 rows, or none where the specification's rule chooses it."""
    return LABELS if spec.label_rule == "index" else [NONE, NONE, SKIP, *[NONE] * 10]
