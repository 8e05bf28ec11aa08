"""Fixtures of all tests: backends, forced tilings, and memory that starts as NaN."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from bgkernels.backends import BACKENDS
from bgkernels.backends.native import products
from bgkernels.streaming import driver
from bgkernels.streaming.planner import Plan
from tests.problems import CPU, WIDEN

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("suite")

REASON = products.way("brgemm", torch.bfloat16).unusable()
needs_brgemm = pytest.mark.skipif(REASON is not None, reason=f"brgemm: {REASON}")
"""Of tests whose logits the compiled primitives multiply, in 16 bits."""
SENTINEL = -(2**40) - 77
"""What unwritten integers hold: no column, no label code."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):  # a keyword may be the name of a folder
            item.add_marker(skip)


def _backends() -> Iterator[Any]:
    """Every registered backend; one that this machine cannot run is skipped with its reason."""
    for name, backend in BACKENDS.items():
        reason = backend.supports(CPU, (torch.float32,))
        marks = [pytest.mark.skip(reason=f"{name} on cpu: {reason}")] if reason else []
        yield pytest.param(name, marks=marks)


@pytest.fixture(scope="session", params=_backends())
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend that serves fp32 logits on this CPU."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def multiplied(request: pytest.FixtureRequest) -> Iterator[str]:
    """How a CPU multiplies 16-bit tensors: widened to fp32, or as an indirect parameter says.

    The processor has no say, so that a test means the same everywhere.
    """
    way = str(getattr(request, "param", WIDEN))
    with products.using(way):
        yield way


@pytest.fixture(autouse=True)
def _plans_of_no_other_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "PLANS", {})


def _poison(x: Tensor) -> Tensor:
    if x.is_floating_point():
        return x.fill_(float("nan"))
    return x if x.dtype == torch.bool else x.fill_(max(SENTINEL, torch.iinfo(x.dtype).min))


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_unwritten_memory(monkeypatch)


def poison_unwritten_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison what the package allocates without writing it, so that it cannot pass for a result."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            x = allocate(*args, **kwargs)
            return _poison(x) if caller.partition(".")[0] == "bgkernels" else x

        return wrapper

    owners = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    for owner, name in [*owners, (Tensor, "new_empty"), (Tensor, "new_empty_strided")]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


Tiling = Callable[..., None]


@pytest.fixture
def tiling(monkeypatch: pytest.MonkeyPatch) -> Tiling:
    """``tiling(chunk, width, kept)`` replaces the planner's choice, so that little is cut often."""

    def force(chunk: int, width: int, kept: int = 1) -> None:
        def plan(work: Any, budget: int | None) -> Plan:
            tiles = -(-work.columns // width)
            return Plan(work.rows, work.columns, chunk, width, min(kept, tiles), 0)

        monkeypatch.setattr(driver, "plan", plan)
        driver.PLANS.clear()

    return force
