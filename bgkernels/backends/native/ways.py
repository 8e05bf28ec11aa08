"""Each class here multiplies 16-bit matrices on a CPU, and leaves fp32 results.

Functions that torch's CPU library exports are looked up by name and tried on a small product before
anything else. In whatever order another version of torch takes the arguments, the trial provides
all the memory that they point to.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from bgkernels.backends.native.call import DTYPES, MISSING

if MISSING is None:
    from bgkernels.backends.native import _C

TRIED = ((2, 8), (3, 0))
"""Versions of torch, from and below, in whose library functions are looked up."""
NO_INSTRUCTIONS = "the processor has no instructions for it"
WRONG = "its numbers are not those of a small product"


class Product(Protocol):
    """A product is a way to multiply matrices of one 16-bit dtype."""

    def unusable(self) -> str | None:
        """Return None, or the reason why it cannot run here."""

    def slow(self) -> str | None:
        """Return None, or the reason why widened operands are multiplied as fast."""

    def mm(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        """Write ``a (m, k) @ b (k, n)`` to ``out``, or add it to fp32 ``out``; no size is 0."""


class Blocked(Product):
    """It runs blocks over oneDNN's micro-kernel, which torch exports (csrc/cpu/product.cpp)."""

    NAMES: ClassVar = {
        torch.bfloat16: "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb",
        torch.float16: "_ZN2at6native7cpublas6brgemmEllllllbPKN3c104HalfES5_Pfb",
    }
    RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kernels = address(self.NAMES[dtype]), address(self.RELEASE)

    def unusable(self) -> str | None:
        return self._fault if torch._C._get_mkldnn_enabled() else "torch.backends.mkldnn is off"

    @functools.cached_property
    def _fault(self) -> str | None:
        if MISSING is not None:
            return f"the compiled module cannot be imported: {MISSING}"
        if not all(self.kernels):
            return f"torch {torch.__version__} exports no micro-kernel of a known name"
        reason = _C.check_product(self.kernels, DTYPES[self.dtype])
        return reason.partition("\n")[0] or None

    def slow(self) -> str | None:
        return None if multiplies(self.dtype) else NO_INSTRUCTIONS

    def factors(self, a: Tensor, b: Tensor) -> _C.Factors:
        """Return ``a (m, k) @ b (k, n)`` as the compiled module takes it."""
        sizes = a.shape[0], b.shape[1], a.shape[1]
        left, right = ((x.data_ptr(), x.stride(0), x.stride(1)) for x in (a, b))
        return self.kernels, DTYPES[self.dtype], sizes, left, right

    def mm(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        direct = out.stride(1) == 1 and out.dtype in (torch.float32, torch.bfloat16)
        to = out if direct else out.new_empty(out.shape, dtype=torch.float32)
        result = to.data_ptr(), to.stride(0), to.dtype == torch.bfloat16, add and direct
        _C.product(self.factors(a, b), result, torch.get_num_threads())
        if not direct:
            _ = out.add_(to) if add else out.copy_(to)


class Cblas(Product):
    """It calls MKL's ``cblas_gemm_bf16bf16f32`` and ``cblas_gemm_f16f16f32``."""

    NAMES: ClassVar = {
        torch.bfloat16: "cblas_gemm_bf16bf16f32",
        torch.float16: "cblas_gemm_f16f16f32",
    }
    ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.address = dtype, address(self.NAMES[dtype])

    def unusable(self) -> str | None:
        return self._fault

    @functools.cached_property
    def _fault(self) -> str | None:
        if not torch.backends.mkl.is_available() or not self.address:
            return f"torch {torch.__version__} exports no {self.NAMES[self.dtype]}"
        # Sizes differ, and any of them in the place of any other stays within 64 · 64 elements.
        numbers = torch.arange(4096, device="cpu").remainder(7).to(self.dtype).view(64, 64)
        a, b = numbers[:3, :22], numbers[7:29, :48]
        room = torch.full((192, 64), -0.375, dtype=torch.float32, device="cpu")
        expected, result = room.clone(), room[64:67, :48]
        for add in (False, True):
            expected[64:67, :48] = a.float() @ b.float() + add * expected[64:67, :48]
            self.mm(a, b, result, add)
            if not torch.equal(room, expected):
                return WRONG
        return None

    def slow(self) -> str | None:
        if not multiplies(self.dtype):
            return NO_INSTRUCTIONS
        return None if "GenuineIntel" in processor() else "MKL widens on other makers' processors"

    @functools.cached_property
    def _function(self) -> Any:
        size, factor = ctypes.c_int64, ctypes.c_float  # 32 bits are read as the lower half
        matrix: list[Any] = [ctypes.c_void_p, size]
        types = [*[size] * 6, factor, *matrix, *matrix, factor, *matrix]
        return ctypes.CFUNCTYPE(None, *types)(self.address)

    def mm(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        direct = out.dtype == torch.float32 and out.stride(1) == 1 and bool(leading(out))
        to = out if direct else out.new_empty(out.shape, dtype=torch.float32)
        a, b = (x if leading(x) else x.contiguous() for x in (a, b))
        orders = (self.PLAIN if x.stride(1) == 1 else self.TRANSPOSED for x in (a, b))
        self._function(
            self.ROW_MAJOR, *orders, a.shape[0], b.shape[1], a.shape[1],
            1.0, a.data_ptr(), leading(a), b.data_ptr(), leading(b),
            float(add and direct), to.data_ptr(), leading(to),
        )  # fmt: skip
        if not direct:
            _ = out.add_(to) if add else out.copy_(to)


class Widened(Product):
    """It takes torch's fp32 product of widened operands, which runs anywhere."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def unusable(self) -> str | None:
        return None

    def slow(self) -> str | None:
        return None

    def mm(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        product = torch.mm(a.float(), b.float())
        _ = out.add_(product) if add else out.copy_(product)


def leading(x: Tensor) -> int:
    """Return the leading dimension by which BLAS knows a matrix, or 0 where it cannot."""
    rows, columns = x.shape
    if x.stride(1) == 1 and (x.stride(0) >= columns or rows == 1):
        return max(x.stride(0), columns)
    if x.stride(0) == 1 and (x.stride(1) >= rows or columns == 1):
        return max(x.stride(1), rows)
    return 0


@functools.cache
def address(name: str) -> int:
    """Return the address of a function in torch's CPU library, or 0."""
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
    """Tell whether the processor has instructions that multiply pairs of a 16-bit dtype."""
    names = {
        torch.bfloat16: ("_is_avx512_bf16_supported",),
        torch.float16: ("_is_amx_fp16_supported",),
    }[dtype]
    if any(getattr(torch.cpu, name, bool)() for name in names):
        return True
    return dtype == torch.float16 and "avx512_fp16" in processor()


@functools.cache
def processor() -> str:
    """Return what the system says of the first processor."""
    try:
        return Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return os.environ.get("PROCESSOR_IDENTIFIER", "")
