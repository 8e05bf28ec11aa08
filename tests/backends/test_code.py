"""The code of a tile: what it keeps of both models' logits, whoever writes or reads it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bgkernels.backends.base import Backend, Tile
from bgkernels.backends.code import LEAST_BLOCK, Code, row_words
from bgkernels.backends.eager import EagerBackend, real_logits
from bgkernels.backends.native import NativeBackend
from bgkernels.rows.arithmetic import NONE, SKIP
from bgkernels.rows.extras import TotalVariation
from bgkernels.rows.spec import Cap, RowSpec
from bgkernels.rows.state import empty
from tests.backends.conftest import TARGETS, on_target

INF = math.inf
HALF_UNIT = 2.0**-11
ROWS = 40
CAPS = [
    (Cap(), Cap()),
    (Cap(0.25), Cap(3.0)),
    (Cap(-1.0), Cap(-0.5)),
    (Cap(1.0, 30.0), Cap(-2.0, 50.0)),
]
SHAPES = [(1300, 1290), (1024, 1024), (700, 0), (37, 30), (1, 1)]
"""Columns of the student and of the teacher: blocks with and without a tail, none, padding."""


@pytest.fixture(params=["eager", *TARGETS])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The reference, or the compiled functions of an instruction set."""
    if request.param == "eager":
        yield EagerBackend()
        return
    with on_target(request.param):
        yield NativeBackend()


def tiles(width: int, compared: int, gap: float = 0.1) -> tuple[Tensor, Tensor | None]:
    x = 5 * torch.randn(ROWS, width)
    return x, x[:, :compared] + gap * torch.randn(ROWS, compared) if compared else None


def spec_of(x: Tensor, v: Tensor | None, caps: tuple[Cap, Cap] = CAPS[0]) -> RowSpec:
    compared = 0 if v is None else v.shape[1]
    return RowSpec(
        columns=x.shape[1], compared=compared, temperature=1.5, student=caps[0], teacher=caps[1],
        extras=(TotalVariation(),) if compared else (),
    )  # fmt: skip


def written(backend: Backend, x: Tensor, v: Tensor | None, caps: tuple[Cap, Cap] = CAPS[0]) -> Tile:
    """The tile with its code, which pass 1 of a backend has written between guards."""
    width, block = x.shape[1], backend.code_block(x.device)
    words = torch.full((ROWS, width + 3), -7, dtype=torch.int32)
    code = Code(words[:, :width], torch.zeros(ROWS, 2 * math.ceil(width / block)), block)
    assert block % LEAST_BLOCK == 0
    assert code.words.numel() + code.centres.numel() <= ROWS * row_words(width)
    spec, tile = spec_of(x, v, caps), Tile(x, v, 0, 0, code)
    state = empty(ROWS, spec, dtype=torch.float32, device=x.device)
    backend.absorb_(state, tile, torch.arange(ROWS) % width, spec)
    assert (words[:, width:] == -7).all(), "beyond the tile"
    return tile


def told(tile: Tile) -> tuple[Tensor, Tensor]:
    assert tile.code is not None
    return tile.code.read(tile.compared)


@pytest.mark.parametrize("gap", [20.0, 1e-3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("caps", CAPS)
def test_probabilities_and_differences_keep_eleven_bits(
    shape: tuple[int, int], caps: tuple[Cap, Cap], gap: float, backend: Backend
) -> None:
    """The docstring's bounds; the label's column is part of it."""
    x, v = tiles(*shape, gap)
    tile = written(backend, x, v, caps)
    z, w = told(tile)
    torch.testing.assert_close(z[:, shape[1] :], real_logits(x, caps[0])[:, shape[1] :])
    if v is None or tile.code is None:
        return
    for i, first in enumerate(range(0, shape[1], tile.code.block)):
        columns = slice(first, min(first + tile.code.block, shape[1]))
        distances = []
        for k, (raw, cap, found) in enumerate(zip((x, v), caps, (z, w), strict=True)):
            centre = tile.code.centres[:, 2 * i + k, None].double()
            exact = real_logits(raw[:, columns].double(), cap) - centre
            ours = found[:, columns] - centre
            assert exact.max() <= 1e-4, "the maximum of this block or of several"
            assert (ours.exp() - exact.exp()).abs().max() <= HALF_UNIT / math.e * 1.01 + 1e-5
            distances.append((exact, ours))
        (du, ours_s), (dv, ours_t) = distances
        slack = 1e-6 * (du.abs() + dv.abs() + 100)  # logits are in fp32
        between, kept = du - dv, ours_s - ours_t
        assert ((kept - between).abs() <= HALF_UNIT * between.abs() + slack).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_and_second_reads_are_those_of_what_the_code_tells(
    shape: tuple[int, int], backend: Backend
) -> None:
    """Nothing of the tile itself is read, but its shape."""
    x, v = tiles(*shape)
    spec, tile = spec_of(x, v), written(backend, x, v)
    z, w = told(tile)
    plain = Tile(z, None if v is None else w, 0, 0)
    coded = Tile(torch.full_like(x, math.nan), v if v is None else v * math.nan, 0, 0, tile.code)
    normalisers = (z.double() / 1.5).logsumexp(1), (z.double() / 1.5).logsumexp(1) + 0.01
    coefficients = torch.randn(spec.factor_count, ROWS, dtype=torch.float64)
    coefficients[0], coefficients[1], coefficients[2] = *normalisers, z.double().logsumexp(1)
    labels = torch.arange(ROWS) % shape[0]
    labels[5] = SKIP
    results = []
    for read in (plain, coded):
        gradient = torch.empty_like(x)
        backend.vjp(gradient, read, coefficients, labels, spec)
        state = empty(ROWS, spec, dtype=torch.float32, device=x.device)
        backend.absorb_(state, read, labels, spec, normalisers)
        results.append((gradient, state.floats))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert results[0][0].abs().max() > 0


def test_columns_that_are_ruled_out_stay_so(backend: Backend) -> None:
    """By one model, by both, in all of a block, and in all of a row."""
    x, v = tiles(1100, 1090)
    assert v is not None
    x[1, 5:9], v[1, 7:11] = -INF, -INF
    x[2, :1024], v[2, :1024] = -INF, -INF
    x[3], v[4] = -INF, -INF
    x[5], v[5] = -INF, -INF
    ours = told(written(backend, x, v))
    for exact, found in zip((x, v), ours, strict=True):
        assert torch.equal(exact == -INF, found == -INF) and not found.isnan().any()
    torch.testing.assert_close(ours[0][1, 9:11], x[1, 9:11], rtol=1e-2, atol=0)


def test_columns_too_far_below_count_as_ruled_out(backend: Backend) -> None:
    x, v = tiles(600, 600)
    assert v is not None
    x[1, 3], v[1, 4], v[2, 3] = -7e4, -7e4, torch.finfo(torch.float32).min
    x[3, 5] = v[3, 5] = -7e4
    x[4], v[4] = x[4] + 1e6, v[4] - 1e6
    z, w = told(written(backend, x, v))
    assert z[1, 3] == w[1, 4] == w[2, 3] == z[3, 5] == w[3, 5] == -INF
    torch.testing.assert_close(z[4], x[4], rtol=1e-6, atol=0.1)
    torch.testing.assert_close(w[4], v[4], rtol=1e-6, atol=0.1)
    assert z[1:4].isfinite().sum() == 3 * 600 - 2


def test_rows_that_take_no_part_are_left_out(backend: Backend) -> None:
    x, v = tiles(300, 300)
    spec, labels = spec_of(x, v), torch.full((ROWS,), NONE)
    code = Code(torch.zeros(ROWS, 300, dtype=torch.int32), torch.zeros(ROWS, 4), LEAST_BLOCK)
    labels[::2] = SKIP
    state = empty(ROWS, spec, dtype=torch.float32, device=x.device)
    backend.absorb_(state, Tile(x, v, 0, 0, code), labels, spec)
    assert code.words[1::2].any(1).all()
