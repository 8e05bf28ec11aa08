"""Rows of logits at their worst, their labels, and the ways to cut them into tiles."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from bgkernels.backends import BACKENDS
from bgkernels.backends.base import Tile, close
from bgkernels.rows.arithmetic import NONE, SKIP
from bgkernels.rows.extras import Extra, Mixture, Tempered, Tilt, TotalVariation
from bgkernels.rows.spec import INTS, RowSpec
from bgkernels.rows.state import RowState, empty
from bgkernels.rows.stats import Statistics
from tests.problems import CPU, normal

INF = math.inf
ROWS, COLUMNS = 6, 40
STYLES = ("normal", "ties", "offset", "masked in one", "masked in both")
EXTRAS: tuple[Extra, ...] = (
    Mixture(0.3), Tempered(1.0), Tilt(0.0, 0.1), TotalVariation(), Tempered(0.4),
    Tilt(0.5, 0.2, moments=True),
)  # fmt: skip
"""Of every kind; they follow each other in no order."""
SIGNED = (Tilt(-0.4, 0.4), Tilt(0.0, 0.0, moments=True))
"""Infinite where one model alone masks a column."""
Situation = tuple[Tensor, Tensor, Tensor, RowSpec]
"""Logits of student and teacher ``(ROWS, COLUMNS)`` in fp64, label codes, what is computed."""


def columns(style: str, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of both models."""
    z, v = (normal(ROWS, COLUMNS, seed=2 * seed + i, std=3.0) for i in (0, 1))
    if style == "ties":
        z, v = (x.round().clamp(-2, 2) for x in (z, v))
    elif style == "offset":
        z, v = z + 300, v - 500
    elif style.startswith("masked"):
        masks = [normal(ROWS, COLUMNS, seed=2 * seed + i) > 0.3 for i in (5, 6)]
        z, v = z.masked_fill(masks[0], -INF), v.masked_fill(masks[style == "masked in one"], -INF)
    return z, v


def codes(rule: str, seed: int) -> Tensor:
    """Labels of each kind: skipped, in a tile, beyond the compared columns, in no column."""
    if rule != "index":
        return torch.tensor([NONE, NONE, SKIP, NONE, NONE, NONE])
    return torch.tensor([0, COLUMNS - 1, SKIP, COLUMNS, seed % COLUMNS, 3 * seed % COLUMNS])


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    """One of them."""
    style, seed = draw(st.sampled_from(STYLES)), draw(st.integers(0, 999))
    rule = draw(st.sampled_from(("index", "argmax", "sample")))
    extras = EXTRAS if style == "masked in one" else EXTRAS + SIGNED
    spec = RowSpec(
        COLUMNS,
        draw(st.sampled_from((COLUMNS, COLUMNS - 7))),
        temperature=draw(st.sampled_from((1.0, 2.5))),
        label_rule=rule,
        seed=seed,
        extras=extras if draw(st.booleans()) else (),
        logit_sum=True,
    )
    return *columns(style, seed), codes(rule, seed), spec


cuts = st.lists(st.integers(1, COLUMNS - 1), min_size=1, max_size=6, unique=True)


def ranges(edges: list[int]) -> list[slice]:
    """The column ranges between these edges."""
    return [slice(a, b) for a, b in pairwise([0, *sorted(edges), COLUMNS])]


def tiles(situation: Situation, order: list[slice]) -> list[Tile]:
    """The tiles of these column ranges."""
    z, v, _, spec = situation
    shared = [slice(part.start, min(part.stop, spec.compared)) for part in order]
    return [
        Tile(z[:, part], v[:, both] if both.stop > both.start else None, 0, part.start)
        for part, both in zip(order, shared, strict=True)
    ]


def absorbed(situation: Situation, order: list[slice], backend: str = "eager") -> RowState:
    """The state after these column ranges."""
    z, _, labels, spec = situation
    state = empty(len(z), spec, dtype=z.dtype, device=CPU)
    for tile in tiles(situation, order):
        BACKENDS[backend].absorb_(state, tile, labels, spec)
    return state


def statistics(
    situation: Situation, order: list[slice], backend: str = "eager"
) -> tuple[RowState, Statistics]:
    """The state and the statistics after both reads of these column ranges."""
    z, _, labels, spec = situation
    values = torch.full((spec.field_count, len(z)), math.nan, dtype=torch.float64)
    out = Statistics((spec,), values, torch.zeros(len(INTS), len(z), dtype=torch.int64))
    state = absorbed(situation, order, backend)
    close(BACKENDS[backend], state, labels, out)
    if spec.second_read:
        normalisers = out["lse_s"].clone(), out["lse_t"].clone()
        for tile in tiles(situation, order):
            BACKENDS[backend].absorb_(state, tile, labels, spec, normalisers)
        BACKENDS[backend].finalize(state, labels, spec, out.values)
    return state, out
