"""What bounds a step from below: its matrix products alone, or a copy of memory."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case, Problem
from bgkernels.streaming import gemm

WIDTHS = (1024, 2048, 4096, 8192, 16384)
PROBE_COLUMNS = 8192
MIB = 1 << 20
BARE = ("limit", "bare")
"""Kinds of entries that have no loss."""


@dataclass(frozen=True)
class Tiling:
    """How the products are run: in which dtype, and so many columns of the vocabulary at a time."""

    dtype: torch.dtype
    width: int

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, tiles of {self.width:,}"


class Products:
    """The matrix products of a case, and nothing else.

    A tile of the vocabulary goes through all of them while it is in cache, and is widened once
    where they run in a wider dtype: less than any loss can do with, because the gradient of a tile
    is known only when all tiles have been seen.
    """

    def __init__(self, problem: Problem, tiling: Tiling) -> None:
        self.problem, self.width = problem, min(tiling.width, problem.case.vocab)
        self.dtype, case = tiling.dtype, problem.case
        new = functools.partial(torch.empty, dtype=tiling.dtype)
        self.z, self.t = new(case.rows, self.width), new(case.rows, self.width)
        self.grads = {
            name: torch.empty_like(getattr(problem, name).detach())
            for name in ("input", "weight")
            if name in case.products
        }
        self.dx = new(case.rows, case.hidden_s) if "input" in self.grads else None
        self.wide = [new(self.width, h) for h in (case.hidden_s, case.hidden_t, case.hidden_s)]

    @torch.no_grad()
    def run(self, columns: int | None = None) -> list[Tensor]:
        """Over the leading ``columns``, or all; the gradients of the hidden states and the head."""
        p, vocab = self.problem, columns or self.problem.case.vocab
        x, dx = p.input.to(self.dtype), self.dx
        t_x = p.t_input.to(self.dtype) if "teacher" in p.case.products else None
        if dx is not None:
            dx.zero_()
        for start in range(0, vocab, self.width):
            part = slice(start, min(start + self.width, vocab))
            w = self._tile(p.weight[part], 0)
            z = self._logits(x, w, self.z)
            if t_x is not None:
                self._logits(t_x, self._tile(p.t_weight[part], 1), self.t)
            if dx is not None:
                self._gradients(part, z, w, x, dx)
        if dx is not None:
            self.grads["input"].copy_(dx)
        return list(self.grads.values())

    def _logits(self, x: Tensor, w: Tensor, buffer: Tensor) -> Tensor:
        """``x @ w.T``, a contiguous matrix at the start of a buffer."""
        out = buffer.view(-1)[: len(x) * len(w)].view(len(x), len(w))
        return torch.mm(x, w.t(), out=out)

    def _gradients(self, part: slice, z: Tensor, w: Tensor, x: Tensor, dx: Tensor) -> None:
        """What a tile adds to dX, and its dW."""
        dx.addmm_(z, w)
        target = self.grads["weight"][part]
        if target.dtype == self.dtype:
            torch.mm(z.t(), x, out=target)
        else:
            target.copy_(torch.mm(z.t(), x, out=self.wide[2][: len(target)]))

    def _tile(self, weight: Tensor, scratch: int) -> Tensor:
        if weight.dtype == self.dtype:
            return weight
        return self.wide[scratch][: len(weight)].copy_(weight)


class WideProducts(Products):
    """The same products as this library multiplies them: results of 16-bit operands in fp32."""

    def __init__(self, problem: Problem, width: int) -> None:
        super().__init__(problem, Tiling(problem.weight.dtype, width))
        self.z, self.t = self.z.float(), self.t.float()
        self.d = torch.zeros(self.z.shape, dtype=self.dtype)
        self.dx = None if self.dx is None else self.dx.float()

    def _logits(self, x: Tensor, w: Tensor, buffer: Tensor) -> Tensor:
        return gemm.mm(x, w.t(), gemm.matrix(buffer.view(-1), len(x), len(w)))

    def _gradients(self, part: slice, z: Tensor, w: Tensor, x: Tensor, dx: Tensor) -> None:
        """Of a matrix of zeros beside the logits."""
        d = gemm.matrix(self.d.view(-1), *z.shape)
        gemm.add_mm_(dx, d, w, self._scratch)
        gemm.mm_narrow(d.t(), x, self.grads["weight"][part], self._scratch)

    def _scratch(self) -> Tensor:
        raise ValueError(f"products of {self.dtype} need none on this machine")


@functools.cache
def expected(rows: int, hidden_s: int, hidden_t: int, dtype: torch.dtype) -> float:
    """Seconds a vocabulary column takes in the four products, from one small tile."""
    few = min(rows, 64)
    problem = Problem.of(
        Case("probe", few, hidden_s, hidden_t, 512, dtype=str(dtype).removeprefix("torch."))
    )
    products = Products(problem, Tiling(dtype, 512))
    return min(_seconds(products, 512) for _ in range(5)) * rows / few / 512


def expected_step(case: Case) -> float:
    """Seconds of the products in the dtype of the inputs, at most and roughly."""
    if not case.products:
        return 0.0
    dtype = getattr(torch, case.dtype)
    return expected(case.rows, case.hidden_s, case.hidden_t, dtype) * case.vocab


def best_tiling(problem: Problem) -> Tiling:
    """The fastest way through the first columns: native or widened, in tiles of some width."""
    case, native = problem.case, problem.weight.dtype
    cost = {
        d: expected(case.rows, case.hidden_s, case.hidden_t, d) for d in {native, torch.float32}
    }
    dtypes = [d for d in cost if cost[d] <= 2 * min(cost.values())]
    widths = [w for w in WIDTHS if w < case.vocab] or [case.vocab]
    candidates = [Tiling(d, w) for d in dtypes for w in widths]
    best: dict[Tiling, float] = {}
    for _ in range(2):
        for tiling in candidates:
            columns = min(case.vocab, max(PROBE_COLUMNS, tiling.width))
            seconds = _seconds(Products(problem, tiling), columns) / columns
            best[tiling] = min(best.get(tiling, seconds), seconds)
    return min(best, key=best.__getitem__)


def _seconds(products: Products, columns: int) -> float:
    begin = time.perf_counter()
    products.run(columns)
    return time.perf_counter() - begin


class Memcpy:
    """Copies of memory that misses every cache; a byte counts where it is read and written."""

    def __init__(self, moved: int = 512 * MIB) -> None:
        self.source, self.target = (torch.ones(moved // 8) for _ in range(2))
        self.bytes = self.source.nbytes + self.target.nbytes

    def run(self) -> None:
        """One copy."""
        self.target.copy_(self.source)
