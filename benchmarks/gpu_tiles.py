"""What the ``COST`` of the planner computes of a GPU, measured: a line to write there instead."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from benchmarks.cases import Case, Problem
from benchmarks.gpu_measure import GIB, Bench, Row, Step, memcpy, products
from bgkernels.streaming import cost, driver, planner

WIDTHS = (4096, 8192, 16_384, 32_768, 65_536)
Ours = Callable[[int], Callable[[Problem], Step]]
"""From a memory budget to a step of ours."""


@contextmanager
def only(device: str, width: int) -> Iterator[None]:
    """The planner considers tiles of this width alone."""
    widths, known = planner.WIDTHS, cost.cost_of(device)
    planner.WIDTHS = (width,)
    cost.COST[device] = replace(known, width=width)
    _forget()
    try:
        yield
    finally:
        planner.WIDTHS, cost.COST[device] = widths, known
        _forget()


def _forget() -> None:
    """No plan that was made before counts."""
    planner._search.cache_clear()
    driver.PLANS.clear()


def widths(b: Bench, case: Case, ours: Ours) -> Iterator[Row]:
    """A step at each budget and width of a tile; ``ratio`` to products."""
    p = b.problem(b.case(case))
    bare = b.race({"": products(p)}).get("", {}).get("ms", 0.0)
    every = itertools.product((1, 4, 0.5), WIDTHS)
    for gib, width in itertools.islice(every, 2 if b.dry else None):
        with only(b.device.type, width):
            row = b.race({"": ours(int(gib * GIB))(p)}, 2.0)[""]
        ratio = {"ratio": round(row["ms"] / bare, 3)} if "ms" in row and bare else {}
        yield {"GiB": gib, "width": width} | row | ratio
        if b.left < 20:
            return


def costs(b: Bench, ours: Ours) -> Row:
    """The planner's units of this device, as the planner's ``Cost`` names them."""
    n, few, many = (32, 2, 16) if b.dry else (8192, 64, 8192)
    x = torch.randn(n, n, device=b.device, dtype=torch.float32 if b.dry else torch.bfloat16)
    steps = {rows: lambda rows=rows: x[:rows] @ x for rows in (few, many)}
    ms = [row["ms"] for row in b.race({str(k): v for k, v in steps.items()}, 1.0).values()]
    rate = many * n * n / ms[1]  # multiply-adds a millisecond
    # A product of r rows takes (r + overhead) units of time.
    overhead = (few * ms[1] - many * ms[0]) / (ms[0] - ms[1])
    return {
        "overhead": round(max(overhead, 0.0)),
        "byte": round(rate / memcpy(b) / 1e6, 1),
        "launch": float(f"{launch(b, ours) * rate:.1g}"),
    }


def launch(b: Bench, ours: Ours, tiles: int = 128) -> float:
    """Milliseconds that one more tile takes in both passes, where its work is next to nothing."""
    case = Case("launch", 16, 64, 64, 64 * tiles, dtype="bfloat16")
    p, ms = b.problem(b.case(case)), []
    for width in (64, 64 * tiles):
        with only(b.device.type, width):
            ms.append(b.race({"": ours(GIB)(p)}, 1.0)[""]["ms"])
    return max(ms[0] - ms[1], 0.0) / (2 * (tiles - 1))


def tiles(b: Bench, case: Case, ours: Ours) -> Iterator[Row]:
    """The measured units with the narrowest tiles within 1 % of the best, then all widths."""
    found = list(widths(b, case, ours))
    timed = [row for row in found if "ms" in row and row["GiB"] == 1]
    least = min((row["ms"] for row in timed), default=0.0)
    good = [{"width": row["width"]} for row in timed if row["ms"] <= 1.01 * least]
    yield {"for cost.COST": f"{costs(b, ours) | (good[0] if good else {})}"}
    yield from found
