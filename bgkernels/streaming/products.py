"""Products of 16-bit matrices on a CPU that leave fp32 results: how this machine multiplies.

torch's own CPU product rounds its result to the operands' dtype: 8 bits of a logit in bf16, of
which nothing is left in the difference between a teacher and a student near it. Three others keep
what was added up:

* ``brgemm``: blocks over oneDNN's micro-kernel, which torch exports (``csrc/cpu/product.cpp``);
* ``cblas``: the mixed products of MKL, which torch exports where it was built with it;
* ``widen``: torch's fp32 product of operands widened to fp32. It runs anywhere.

The first that is usable and does not emulate is chosen. ``BGKERNELS_CPU_PRODUCT`` in the
environment, or :func:`using`, names one instead; where that one cannot multiply a dtype, operands
are widened.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bgkernels.backends.native.call import DTYPES, MISSING

if MISSING is None:
    from bgkernels.backends.native import _C

VARIABLE = "BGKERNELS_CPU_PRODUCT"
HALVES = (torch.bfloat16, torch.float16)
TRIED = ((2, 8), (3, 0))
"""Versions of torch, from and below, in whose libraries functions are looked up."""


class Product(Protocol):
    """A way to multiply 16-bit matrices of a CPU."""

    def unusable(self, dtype: torch.dtype) -> str | None:
        """None, or the reason why it cannot multiply matrices of a dtype here."""

    def slow(self, dtype: torch.dtype) -> str | None:
        """None, or the reason why widened operands are multiplied as fast."""

    def mm(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        """``a (m, k) @ b (k, n)`` into fp32 ``out``, or added to it; 16-bit without ``add``."""


class Blocked:
    """Blocks over the micro-kernel that torch exports as ``at::native::cpublas::brgemm``."""

    RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"
    NAMES = {
        torch.bfloat16: "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb",
        torch.float16: "_ZN2at6native7cpublas6brgemmEllllllbPKN3c104HalfES5_Pfb",
    }

    def unusable(self, dtype: torch.dtype) -> str | None:
        """None, or the reason why not."""
        if MISSING is not None:
            return f"the compiled module cannot be imported: {MISSING}"
        if not torch._C._get_mkldnn_enabled():
            return "torch.backends.mkldnn is disabled"
        return self._checked(dtype)

    @functools.cached_property
    def _addresses(self) -> dict[str, int]:
        return {name: address(name) for name in (self.RELEASE, *self.NAMES.values())}

    @functools.cache  # noqa: B019: there is one object
    def _checked(self, dtype: torch.dtype) -> str | None:
        if not all(self._kernels(dtype)):
            return f"torch {torch.__version__} exports no micro-kernel of a known name"
        reason = _C.check_product(self._kernels(dtype), DTYPES[dtype])
        return reason.partition("\n")[0] or None

    def _kernels(self, dtype: torch.dtype) -> tuple[int, int]:
        return self._addresses[self.NAMES[dtype]], self._addresses[self.RELEASE]

    def slow(self, dtype: torch.dtype) -> str | None:
        """None, or the reason why not."""
        return None if multiplies(dtype) else f"the processor does not multiply pairs of {dtype}"

    def mm(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        """See :class:`Product`."""
        direct = out.stride(1) == 1 and out.dtype in (torch.float32, torch.bfloat16)
        to = out if direct else torch.empty(out.shape, dtype=torch.float32, device=out.device)
        _C.product(
            self._kernels(a.dtype),
            DTYPES[a.dtype],
            (a.shape[0], b.shape[1], a.shape[1]),
            (a.data_ptr(), *a.stride()),
            (b.data_ptr(), *b.stride()),
            (to.data_ptr(), to.stride(0), to.dtype == torch.bfloat16, add and direct),
            torch.get_num_threads(),
        )
        if not direct:
            _ = out.add_(to) if add else out.copy_(to)


class Cblas:
    """MKL's ``cblas_gemm_bf16bf16f32`` and ``cblas_gemm_f16f16f32``, which torch exports."""

    NAMES = {torch.bfloat16: "cblas_gemm_bf16bf16f32", torch.float16: "cblas_gemm_f16f16f32"}
    ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112

    @functools.cache  # noqa: B019: there is one object
    def unusable(self, dtype: torch.dtype) -> str | None:
        """None, or the reason why not."""
        if not torch.backends.mkl.is_available() or not address(self.NAMES[dtype]):
            return f"torch {torch.__version__} exports no {self.NAMES[dtype]}"
        # Sizes differ, and any of them in the place of any other stays within 64 · 64 elements.
        numbers = torch.arange(4096, device="cpu").remainder(7).to(dtype).view(64, 64)
        left, right = numbers[:3, :22], numbers[-22:, :48]
        room = torch.full((192, 64), -0.375, dtype=torch.float32, device="cpu")
        expected, exact = room.clone(), left.float() @ right.float()
        for add in (False, True):
            expected[64:67, :48] = exact + add * expected[64:67, :48]
            self.mm(left, right, room[64:67, :48], add)
            if not torch.equal(room, expected):
                return "its numbers are not those of a small product"
        return None

    def slow(self, dtype: torch.dtype) -> str | None:
        """None, or the reason why not."""
        if not multiplies(dtype):
            return f"the processor does not multiply pairs of {dtype}"
        return None if "GenuineIntel" in processor() else "MKL widens on other makers' processors"

    @functools.cache  # noqa: B019: there is one object
    def _function(self, dtype: torch.dtype) -> ctypes._FuncPointer:
        size, pointer = ctypes.c_int64, ctypes.c_void_p  # read as they are by 32 bits, too
        matrix = [pointer, size]
        types = [size] * 6 + [ctypes.c_float, *matrix, *matrix, ctypes.c_float, *matrix]
        return ctypes.CFUNCTYPE(None, *types)(address(self.NAMES[dtype]))

    def mm(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        """See :class:`Product`."""
        direct = _leading(out) is not None and out.stride(1) == 1 and out.dtype == torch.float32
        to = out if direct else torch.empty(out.shape, dtype=torch.float32, device=out.device)
        a, b = (x if _leading(x) is not None else x.contiguous() for x in (a, b))
        self._function(a.dtype)(
            self.ROW_MAJOR, self._order(a), self._order(b), *a.shape[:1], b.shape[1], a.shape[1],
            1.0, a.data_ptr(), _leading(a), b.data_ptr(), _leading(b),
            float(add and direct), to.data_ptr(), _leading(to),
        )  # fmt: skip
        if not direct:
            _ = out.add_(to) if add else out.copy_(to)

    def _order(self, x: Tensor) -> int:
        return self.PLAIN if x.stride(1) == 1 else self.TRANSPOSED


def _leading(x: Tensor) -> int | None:
    """The leading dimension by which BLAS knows a matrix, or None where it cannot."""
    rows, columns = x.shape
    if x.stride(1) == 1 and (x.stride(0) >= columns or rows <= 1):
        return max(x.stride(0), columns, 1)
    if x.stride(0) == 1 and (x.stride(1) >= rows or columns <= 1):
        return max(x.stride(1), rows, 1)
    return None


class Widened:
    """torch's fp32 product of widened operands."""

    def unusable(self, dtype: torch.dtype) -> str | None:
        """None."""
        return None

    def slow(self, dtype: torch.dtype) -> str | None:
        """None."""
        return None

    def mm(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        """See :class:`Product`."""
        product = torch.mm(a.float(), b.float())
        _ = out.add_(product) if add else out.copy_(product)


PRODUCTS: dict[str, Product] = {"brgemm": Blocked(), "cblas": Cblas(), "widen": Widened()}
_forced: list[str] = []


@contextmanager
def using(name: str) -> Iterator[None]:
    """Multiply in the named way, in all threads, whatever the environment says."""
    _forced.append(_known(name))
    try:
        yield
    finally:
        _forced.pop()


def chosen(dtype: torch.dtype) -> str:
    """The name of the way in which matrices of a 16-bit dtype are multiplied."""
    return _decided(dtype)[0]


def reasons(dtype: torch.dtype) -> str:
    """Why the ways before the chosen one are not taken; empty where it is the first."""
    return _decided(dtype)[1]


def mm(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """``a @ b`` of 16-bit matrices into fp32 or 16-bit ``out``, or added to fp32 ``out``."""
    if not out.numel():
        return out
    if a.shape[1]:
        PRODUCTS[chosen(a.dtype)].mm(a, b, out, add)
    elif not add:
        out.zero_()
    return out


def _decided(dtype: torch.dtype) -> tuple[str, str]:
    name = _forced[-1] if _forced else _known(os.environ.get(VARIABLE) or "auto")
    seen = []
    for candidate in PRODUCTS if name == "auto" else (name, "widen"):
        product = PRODUCTS[candidate]
        reason = product.unusable(dtype)
        if name == "auto" and reason is None:
            reason = product.slow(dtype)
        if reason is None:
            return candidate, "; ".join(seen)
        seen.append(f"{candidate}: {reason}")
    raise AssertionError("widening is always usable")


def _known(name: str) -> str:
    if name in ("auto", *PRODUCTS):
        return name
    raise ValueError(f"{VARIABLE} must be one of auto, {', '.join(PRODUCTS)}; got {name!r}")


@functools.cache
def address(name: str) -> int:
    """Address of a function in torch's CPU library, or 0."""
    version = tuple(int(x) for x in torch.__version__.split(".")[:2])
    if not TRIED[0] <= version < TRIED[1]:
        return 0
    file = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(
        sys.platform, "libtorch_cpu.so"
    )
    for path in (str(Path(torch.__file__).parent / "lib" / file), file):
        try:
            function = getattr(ctypes.CDLL(path), name)
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether the processor has instructions that multiply pairs of a 16-bit dtype."""
    names = {
        torch.bfloat16: ("_is_avx512_bf16_supported",),
        torch.float16: ("_is_amx_fp16_supported",),
    }[dtype]
    if any(getattr(torch.cpu, name, bool)() for name in names):
        return True
    return dtype == torch.float16 and "avx512_fp16" in processor()


@functools.cache
def processor() -> str:
    """What the system says of the first processor."""
    try:
        return Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return os.environ.get("PROCESSOR_IDENTIFIER", "")
