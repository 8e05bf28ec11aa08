"""The compiled backend on every instruction set, and with the CUDA kernels emulated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bgkernels.backends.native import NativeBackend
from bgkernels.backends.native.call import MISSING
from tests.cuda_emulation import Emulated

if MISSING is None:
    from bgkernels.backends.native import _C

TARGETS = _C.cpu_targets() if MISSING is None else ()


@contextmanager
def on_target(name: str) -> Iterator[None]:
    """The compiled functions of an instruction set."""
    before = _C.cpu_target()
    _C.set_cpu_target(name)
    yield
    _C.set_cpu_target(before)


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that was compiled and that this processor has."""
    with on_target(request.param):
        yield request.param


@pytest.fixture(params=[*TARGETS, "cuda"])
def native(request: pytest.FixtureRequest) -> Iterator[NativeBackend]:
    """The backend on every target, and with the CUDA kernels emulated."""
    if request.param == "cuda":
        yield Emulated()
        return
    with on_target(request.param):
        yield NativeBackend()
