"""The coding of kept tiles: what it keeps, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bgkernels.backends.native import coding as native
from bgkernels.backends.native.call import MISSING
from bgkernels.rows.arithmetic import SKIP
from bgkernels.rows.spec import Cap
from bgkernels.streaming import coding

if MISSING is None:
    from bgkernels.backends.native import _C

INF, NAN = math.inf, math.nan
HALF_UNIT = 2.0**-11
PLAIN = (Cap(), Cap())
CAPS = [
    PLAIN,
    (Cap(0.25), Cap(3.0)),
    (Cap(-1.0), Cap(-0.5)),
    (Cap(1.0, 30.0), Cap(-2.0, 50.0)),
]
SHAPES = [(1300, 1290), (1024, 1024), (700, 0), (37, 30), (1, 1)]
"""Columns of the student and of the teacher: blocks with and without a tail, none, padding."""


@pytest.fixture(params=["torch", *(_C.cpu_targets() if MISSING is None else ())])
def coder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The reference in torch, or the compiled functions of an instruction set."""
    if request.param == "torch":
        monkeypatch.setattr(native, "serves", lambda x: False)
        yield "torch"
        return
    before = _C.cpu_target()
    _C.set_cpu_target(request.param)
    yield str(request.param)
    _C.set_cpu_target(before)


def tiles(width: int, compared: int, gap: float = 0.1) -> tuple[Tensor, Tensor | None]:
    x = 5 * torch.randn(40, width)
    return x, x[:, :compared] + gap * torch.randn(40, compared) if compared else None


def coded(
    x: Tensor, v: Tensor | None, caps: coding.Caps = PLAIN, skipped: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor | None] | None:
    """The tiles after coding and decoding, or None where they are refused."""
    compared = 0 if v is None else v.shape[1]
    code = torch.full((len(x), coding.words(x.shape[1], compared)), NAN)
    chosen = torch.zeros(len(x), dtype=torch.long)
    chosen[list(skipped)] = SKIP
    if not coding.encode(x, v, caps, code, chosen):
        return None
    out = torch.full_like(x, NAN), None if v is None else torch.full_like(v, NAN)
    for teacher, (to, cap) in enumerate(zip(out, caps, strict=True)):
        if to is not None:
            coding.decode(code, compared, cap, bool(teacher), to, chosen)
    return out


@pytest.mark.parametrize("gap", [20.0, 0.1, 1e-3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("caps", CAPS)
def test_probabilities_and_differences_keep_eleven_bits(
    shape: tuple[int, int], caps: coding.Caps, gap: float, coder: str
) -> None:
    """The docstring's bounds, about the maximum of each block."""
    x, v = tiles(*shape, gap)
    found = coded(x, v, caps)
    assert found is not None
    assert torch.equal(found[0][:, shape[1] :], x[:, shape[1] :])
    if v is None or found[1] is None:
        return
    for first in range(0, shape[1], coding.BLOCK):
        block = slice(first, min(first + coding.BLOCK, shape[1]))
        pairs = [
            [y[:, block].double() * cap.scale for y in pair]
            for pair, cap in zip(((x, found[0]), (v, found[1])), caps, strict=True)
        ]
        distances = []
        for exact, ours in pairs:
            top = exact.amax(1, keepdim=True)
            wrong = (ours - top).exp() - (exact - top).exp()
            assert wrong.abs().max() <= HALF_UNIT / math.e * 1.01 + 1e-5
            distances.append((exact - top, ours - top))
        (u, ours_u), (w, ours_w) = distances
        slack = 1e-6 * (u.abs() + w.abs() + 100)  # logits are in fp32
        assert (((ours_u - ours_w) - (u - w)).abs() <= HALF_UNIT * (u - w).abs() + slack).all()


@pytest.mark.skipif(MISSING is not None, reason=f"no compiled module: {MISSING}")
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_codes_are_those_of_the_reference(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, v = tiles(*shape)
    x[3, ::3], x[5] = -INF, -INF
    if v is not None:
        v[3, ::2], v[5] = -INF, -INF
    codes, labels = [], torch.zeros(len(x), dtype=torch.long)
    for serves in (native.serves, lambda x: False):
        monkeypatch.setattr(native, "serves", serves)
        codes.append(torch.full((len(x), coding.words(*shape)), NAN))
        assert coding.encode(x, v, PLAIN, codes[-1], labels)
    assert torch.equal(*(code.view(torch.int16) for code in codes))


def test_columns_that_are_ruled_out_stay_so(coder: str) -> None:
    """By one model, by both, in all of a block, and in all of a row."""
    x, v = tiles(1100, 1090)
    assert v is not None
    x[1, 5:9], v[1, 7:11] = -INF, -INF
    x[2, :512], v[2, :512] = -INF, -INF
    x[3], v[4] = -INF, -INF
    x[5], v[5] = -INF, -INF
    found = coded(x, v)
    assert found is not None and found[1] is not None
    for exact, ours in zip((x, v), found, strict=True):
        assert torch.equal(exact == -INF, ours == -INF) and not ours.isnan().any()
    alone = found[0][1, 9:11], x[1, 9:11]
    torch.testing.assert_close(*alone, rtol=1e-2, atol=0)


FAULTS: dict[str, tuple[int, float]] = {
    "NaN of the student": (0, NAN),
    "NaN of the teacher": (1, NAN),
    "infinity of the student": (0, INF),
    "infinity of the teacher": (1, INF),
    "a student's logit too far below": (0, -7e4),
    "a teacher's logit too far below": (1, -7e4),
    "a maximum too far above": (0, 7e4),
    "the largest number": (1, torch.finfo(torch.float32).max),
    "the least number": (0, torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("column", [0, 513, 1089])
def test_what_fp16_cannot_say_is_refused(fault: str, column: int, coder: str) -> None:
    model, value = FAULTS[fault]
    pair = tiles(1100, 1090)
    tile = pair[model]
    assert tile is not None
    tile[7, column] = value
    assert coded(*pair) is None
    assert coded(*pair, skipped=(7,)) is not None, "nobody reads a row that takes no part"


def test_extremes_that_fp16_can_say_are_kept(coder: str) -> None:
    x, v = tiles(600, 600)
    assert v is not None
    x[1, 3] = v[1, 3] = -6e4  # of no probability in either
    x[2], v[2] = x[2] + 1e6, v[2] - 1e6
    found = coded(x, v)
    assert found is not None and found[1] is not None
    for exact, ours in zip((x, v), found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=0.1)


def test_logits_far_beyond_a_cap_are_refused(coder: str) -> None:
    x, v = tiles(600, 600)
    assert v is not None
    x[1, 3] = 130.0
    assert coded(x, v, (Cap(1.0, 30.0), Cap())) is None
    assert coded(x, v, (Cap(0.5, 30.0), Cap())) is not None
    assert coded(x, v, (Cap(-1.0, 30.0), Cap())) is not None
