"""Rates of a CPU's matrix products of 16-bit operands: each way that keeps fp32, beside torch's.

``python -m benchmarks.products`` prints GFLOP/s, with one thread and with all: of wall time, and of
the process's own time where the machine is shared (``--own``; one thread only).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bgkernels.backends.native import products

ROWS, HIDDEN, WIDTH = 1024, 896, 4096
GFLOP = 2 * ROWS * HIDDEN * WIDTH / 1e9
Work = Callable[[], object]


def works(dtype: torch.dtype) -> dict[str, dict[str, Work]]:
    """For each way: logits of a tile, and what its gradient adds to dX and puts into dW."""
    x, w, d = (torch.randn(n, m) for n, m in ((ROWS, HIDDEN), (WIDTH, HIDDEN), (ROWS, WIDTH)))
    z, dx, dw = torch.empty(ROWS, WIDTH), torch.zeros(ROWS, HIDDEN), torch.empty(WIDTH, HIDDEN)
    made = {f"torch {torch.float32}": torch_works(x, w, d, z, dx, dw)}
    x, w, d = (t.to(dtype) for t in (x, w, d))
    made[f"torch {dtype}"] = torch_works(x, w, d, *(t.to(dtype) for t in (z, dx, dw)))
    for name in products.WAYS:
        product = products.way(name, dtype)
        if product.unusable() is None:
            made[name] = {
                "logits": partial(product.mm, x, w.t(), z, False),
                "dX": partial(product.mm, d, w, dx, True),
                "dW": partial(product.mm, d.t(), x, dw, False),
            }
    return made


def torch_works(
    x: Tensor, w: Tensor, d: Tensor, z: Tensor, dx: Tensor, dw: Tensor
) -> dict[str, Work]:
    """The same three in torch, with results in the operands' dtype."""
    return {
        "logits": lambda: torch.mm(x, w.t(), out=z),
        "dX": lambda: dx.addmm_(d, w),
        "dW": lambda: torch.mm(d.t(), x, out=dw),
    }


def rates(dtype: torch.dtype, threads: int, runs: int, clock: Callable[[], float]) -> None:
    """Print a line for each way, of interleaved runs."""
    torch.set_num_threads(threads)
    made = works(dtype)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(runs + 1):
        for way, parts in made.items():
            for part, work in parts.items():
                begin = clock()
                work()
                times.setdefault((way, part), []).append(clock() - begin)
    for way, parts in made.items():
        medians = (statistics.median(times[way, part][1:]) for part in parts)
        cells = (f"{part} {GFLOP / s:4.0f}" for part, s in zip(parts, medians, strict=True))
        print(f"{threads} threads  {way:15}", "  ".join(cells), flush=True)


if __name__ == "__main__":
    own = "--own" in sys.argv
    for kind in products.HALVES:
        print(kind, "chosen:", products.chosen(kind), products.reasons(kind))
        for count in (1,) if own else sorted({1, torch.get_num_threads()}):
            rates(kind, count, 9, time.process_time if own else time.perf_counter)
