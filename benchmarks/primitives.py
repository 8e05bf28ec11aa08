"""Pass 1 and pass 2 on their own: the calls that the driver makes, recorded and played again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import bgkernels as bg
from benchmarks.limits import Memcpy
from bgkernels.backends import BACKENDS

VOCAB = 32_768
ROWS = {"eager": 256}
"""Fewer than 1,024 where a backend is slow; both matrices still miss the caches."""
ROUTINGS = ("static", "entropy")
"""Constant weights; and the default policy, whose power sum is one more exponential an element."""
DTYPES = ("float32", "bfloat16")
PASSES = ("pass 1", "pass 2")


@dataclass(frozen=True)
class Pass:
    """The calls of one pass over all tiles of a pair of logits matrices.

    Args:
        calls: in order.
        bytes: that they have to read and write.
    """

    calls: list[Callable[[], Any]]
    bytes: int

    @torch.no_grad()
    def run(self) -> None:
        """Make the calls."""
        for call in self.calls:
            call()


class Recorder:
    """A backend that keeps the calls it gets."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.calls: dict[str, list[Callable[[], Any]]] = {"absorb_": [], "vjp": []}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if name not in self.calls:
            return value

        def recorded(*args: Any) -> Any:
            self.calls[name].append(lambda: value(*args))
            return value(*args)

        return recorded


def usable(dtype: str) -> list[str]:
    """The backends that serve logits of this dtype here."""
    kinds = (getattr(torch, dtype),)
    return [n for n, b in BACKENDS.items() if b.supports(torch.device("cpu"), kinds) is None]


def passes(backend: str, dtype: str, routing: str, rows: int = 0, vocab: int = VOCAB) -> list[Pass]:
    """Pass 1, which reads both logits; and pass 2, which reads them and writes the gradient."""
    rows, kind = rows or ROWS.get(backend, 1024), getattr(torch, dtype)
    s, t = (torch.randn(rows, vocab).mul_(3).to(kind) for _ in range(2))
    recorder = Recorder(BACKENDS[backend])
    with mock.patch.dict(BACKENDS, {backend: recorder}):
        bg.hybrid_distillation(
            s.requires_grad_(), bg.LogitsTeacher(t), torch.randint(vocab, (rows,)),
            routing=routing, backend=backend, mode="fused",
        )  # fmt: skip
    reads = s.nbytes + t.nbytes
    return [Pass(recorder.calls["absorb_"], reads), Pass(recorder.calls["vjp"], reads + s.nbytes)]


def study(runs: int = 5) -> list[dict[str, Any]]:
    """Rates of both passes beside a copy of memory, on one thread and on all."""
    found = []
    copy, threads = Memcpy(), torch.get_num_threads()
    variants = [(b, d, r) for d in DTYPES for b in usable(d) for r in ROUTINGS]
    for backend, dtype, routing in variants:
        slow = backend in ROWS
        works = [copy, *passes(backend, dtype, routing)]
        for n in (threads,) if slow else sorted({1, threads}):
            torch.set_num_threads(n)
            times = interleaved(works, 1 if slow else runs)
            rates = [work.bytes / s / 1e9 for work, s in zip(works, times, strict=True)]
            label = {"backend": backend, "dtype": dtype, "routing": routing, "threads": n}
            found.append(label | dict(zip(("memcpy", *PASSES), rates, strict=True)))
        torch.set_num_threads(threads)
    return found


def interleaved(works: list[Any], runs: int) -> list[float]:
    """The median time of each; what ran first has warmed up."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(runs + 1):
        for work, taken in zip(works, times, strict=True):
            begin = time.perf_counter()
            work.run()
            taken.append(time.perf_counter() - begin)
    return [sorted(x[1:])[runs // 2] for x in times]
