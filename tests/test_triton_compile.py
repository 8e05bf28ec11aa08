"""Triton kernels compiled ahead of time, without a device: nothing spills, and loads are wide.

``python -m tests.test_triton_compile sm_90`` prints the table of one architecture.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from bgkernels.backends import triton as host
from bgkernels.spec import Cap, Mixture, RowSpec, Tilt, TotalVariation

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
V = 4096


@dataclass(frozen=True)
class Variant:
    """What decides over the code of a kernel.

    Args:
        kernel: absorb, merge, pairs or vjp.
        spec: of the rows.
        dtypes: of student, teacher and gradient.
        teacher: whether there is one.
        split: whether several programs share a row.
        aligned: whether rows start on 16 bytes.
        number: type of run-time numbers: fp64 is what some tracing compilers pass.
        wide: of interest on every architecture, not on one.
    """

    name: str
    kernel: str
    spec: RowSpec
    dtypes: tuple[str, str, str] = ("fp32", "fp32", "bf16")
    teacher: bool = True
    split: bool = False
    aligned: bool = True
    number: str = "fp32"
    everywhere: bool = False


BF16, FP32, FP16 = ("bf16",) * 3, ("fp32",) * 3, ("fp16", "fp32", "fp16")
ENTROPY = (Tilt(0, 0.1),)
ALPHA_BETA = (Tilt(0.7, 0.2), Tilt(0, 0.9), Tilt(0.9, 0))
MOMENTS = (Tilt(0, 0, True), Tilt(-0.3, 0.3))
CAPS = {"student": Cap(1.5, 30.0), "teacher": Cap(1.0, 30.0)}
SHARED, TEMPERED = RowSpec(V, V), RowSpec(V, V, 2.0)


def spec(**kwargs: Any) -> RowSpec:
    return RowSpec(V, V, **kwargs)


VARIANTS = (
    Variant("plain", "absorb", SHARED, FP32, everywhere=True),
    Variant("plain", "absorb", SHARED, BF16),
    Variant("unaligned", "absorb", SHARED, BF16, aligned=False),
    Variant("entropy", "absorb", spec(extras=ENTROPY), BF16),
    Variant("entropy, T", "absorb", spec(temperature=2.0, extras=ENTROPY), everywhere=True),
    Variant("smoothing, fp64 numbers", "absorb", spec(temperature=2.0, logit_sum=True), FP16,
            number="fp64"),
    Variant("argmax, split", "absorb", spec(label_rule="argmax"), BF16, split=True),
    Variant("sample, T", "absorb", spec(temperature=2.0, label_rule="sample", extras=ENTROPY),
            everywhere=True),
    Variant("alpha-beta, T", "absorb", spec(temperature=2.0, extras=ENTROPY + ALPHA_BETA),
            everywhere=True),
    Variant("moments", "absorb", spec(extras=ENTROPY + MOMENTS)),
    Variant("capped, T", "absorb", spec(temperature=2.0, extras=ENTROPY, **CAPS)),
    Variant("cross-entropy", "absorb", RowSpec(V, 0, logit_sum=True), BF16, teacher=False),
    Variant("index", "merge", spec(temperature=2.0, extras=ENTROPY)),
    Variant("sample, moments", "merge", spec(label_rule="sample", extras=MOMENTS),
            everywhere=True),
    Variant("jsd", "pairs", spec(extras=(Mixture(0.5),)), everywhere=True),
    Variant("jsd", "pairs", spec(extras=(Mixture(0.5),)), BF16),
    Variant("all, capped", "pairs",
            spec(temperature=2.0, extras=(Mixture(0.5), Mixture(0.1), TotalVariation()), **CAPS)),
    Variant("plain", "vjp", SHARED, everywhere=True),
    Variant("plain", "vjp", SHARED, BF16),
    Variant("T", "vjp", TEMPERED, FP32),
    Variant("alpha-beta, T", "vjp", spec(temperature=2.0, extras=ENTROPY + ALPHA_BETA)),
    Variant("moments, fp64 numbers", "vjp", spec(extras=ENTROPY + MOMENTS), number="fp64"),
    Variant("jsd", "vjp", spec(extras=(*ENTROPY, Mixture(0.5))), everywhere=True),
    Variant("all, capped", "vjp",
            spec(temperature=2.0, extras=(Mixture(0.5), Mixture(0.1), TotalVariation()), **CAPS)),
    Variant("cross-entropy", "vjp", RowSpec(V, 0, logit_sum=True), BF16, teacher=False),
)  # fmt: skip
