"""Compiled CPU kernels agree with the eager backend on whatever rows a fuzzer thinks of.

Tensors end where their memory ends, so that a sanitizer (``make sanitize``) sees an access beyond.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bgkernels.backends.native import NativeBackend
from bgkernels.rows.extras import Mixture, Tempered, Tilt, TotalVariation
from bgkernels.rows.spec import Cap, RowSpec
from tests.conformance import DIFFERENTIABLE, KINDS, Case, check

EXTRAS = (Tilt(0.0, 0.3), Tilt(0.4, 0.6, True), Tempered(1.0), Mixture(0.3), TotalVariation())
NEG_INF, NAN = float("-inf"), float("nan")


def at_the_end(x: Tensor, dtype: torch.dtype, before: int, gap: int) -> Tensor:
    """The same values in rows ``gap`` apart, the last of which ends with its memory."""
    rows, columns = x.shape
    stride = columns + gap
    memory = torch.full((before + (rows - 1) * stride + columns,), NAN, dtype=dtype)
    view = memory.as_strided((rows, columns), (stride, 1), before)
    view.copy_(x)
    return view


@st.composite
def cases(draw: st.DrawFn, infinite: str | None) -> Case:
    """Some rows of a specification; a model without some columns makes a divergence infinite."""
    columns, rows = draw(st.integers(40, 300)), draw(st.integers(1, 5))
    compared = draw(st.sampled_from([columns, columns, columns - 7, 0]))
    extras = tuple(draw(st.lists(st.sampled_from(EXTRAS), unique=True, max_size=3)))
    spec = RowSpec(
        columns,
        compared,
        draw(st.sampled_from([1.0, 0.7, 4.0])),
        student=Cap(draw(st.sampled_from([1.0, 0.5])), draw(st.sampled_from([0.0, 30.0]))),
        teacher=Cap(cap=draw(st.sampled_from([0.0, 20.0]))),
        logit_sum=draw(st.booleans()),
        extras=extras if compared else (),
    )
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scale = draw(st.sampled_from([0.0, 1.0, 4.0 if columns > 100 else 2.0]))
    student = scale * torch.randn(rows, columns, generator=g)
    teacher = scale * torch.randn(rows, compared, generator=g)
    labels = torch.randint(0, columns, (rows,), generator=g)
    absent = torch.rand(rows, columns, generator=g) < draw(st.sampled_from([0.0, 0.3, 0.7]))
    absent.scatter_(1, labels[:, None], False)
    absent[:, 0] = False  # so that some compared column has both models
    if infinite != "kl_ts":
        teacher[absent[:, :compared]] = NEG_INF
    if infinite != "kl_st":
        student[absent] = NEG_INF
    labels[torch.rand(rows, generator=g) < 0.2] = -2
    cuts = tuple(sorted(draw(st.sets(st.integers(1, columns - 1), max_size=3))))
    place = draw(st.integers(0, 19)), draw(st.integers(0, 19))
    kinds = draw(st.text("fbh", min_size=2, max_size=2))
    return Case(
        spec,
        at_the_end(student, KINDS[kinds[0]], *place),
        at_the_end(teacher, KINDS[kinds[1]], *place) if compared else None,
        labels,
        cuts,
        draw(st.integers(0, 9)),
    )


@pytest.mark.parametrize("infinite", [None, "kl_ts", "kl_st"])
@given(st.data())
def test_rows_are_those_of_the_eager_backend(infinite: str | None, data: st.DataObject) -> None:
    names = tuple(name for name in DIFFERENTIABLE if name != infinite)
    check(NativeBackend(), data.draw(cases(infinite)), names=names)
