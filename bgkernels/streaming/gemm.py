"""Matrix products choose a dtype to run in, and leave results in fp32 where they can."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bgkernels.backends.native import products

STRIDE = 64
"""Rows of scratch matrices begin at multiples of so many elements: loads and products want it."""


def matrix(memory: Tensor, rows: int, width: int) -> Tensor:
    """Return ``(rows, width)`` in flat memory, strided by a multiple of STRIDE if it has room."""
    stride = -(-width // STRIDE) * STRIDE
    stride = stride if rows * stride <= memory.numel() else width
    return memory[: rows * stride].view(rows, stride)[:, :width]


@functools.cache
def adds_wide(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether a device adds products of 16-bit operands to fp32 in place: tried once."""
    a = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
        return bool((total == 17).all())
    except (RuntimeError, TypeError):  # an older torch, or a device without it
        return False


def _half_on_cpu(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and dtype in products.HALVES


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to multiply ``dtype`` in: itself, or fp32 where operands are widened."""
    widened = _half_on_cpu(dtype, device) and products.chosen(dtype) == "widen"
    return torch.float32 if widened else dtype


def logits_dtype(product: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of computed logits: fp32 where the device can keep its accumulators."""
    keeps_fp32 = device.type in ("cpu", "cuda") and product != torch.float64
    return torch.float32 if keeps_fp32 else product


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write ``a @ b`` to ``out``, whose dtype may be wider than the operands'."""
    if _half_on_cpu(a.dtype, a.device):
        return products.mm(a, b, out)
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a, b))


def add_mm_(total: Tensor, a: Tensor, b: Tensor, scratch: Callable[[], Tensor]) -> Tensor:
    """Add ``a @ b`` to ``total``, through ``scratch()`` where a product cannot add to its dtype."""
    if _half_on_cpu(a.dtype, a.device):
        return products.mm(a, b, total, add=True)
    if total.dtype == a.dtype:
        return total.addmm_(a, b)
    if total.dtype == torch.float32 and adds_wide(a.dtype, a.device):
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.add_(mm(a, b, scratch()))


def mm_narrow(a: Tensor, b: Tensor, out: Tensor, scratch: Callable[[], Tensor]) -> Tensor:
    """Write ``a @ b``, added up in fp32, to ``out`` of any dtype, if need be by ``scratch()``.

    A GPU rounds its fp32 sums once, to the operands' dtype.
    """
    if _half_on_cpu(a.dtype, a.device):
        return products.mm(a, b, out)
    direct = out.dtype.itemsize >= 4 or (a.is_cuda and out.dtype == a.dtype)
    return mm(a, b, out) if direct else out.copy_(mm(a, b, scratch()))


def scratch_bytes(product: torch.dtype, to: torch.dtype, device: torch.device) -> int:
    """Return the bytes of an element of scratch by which a product reaches a gradient's dtype."""
    if _half_on_cpu(product, device):
        direct = to == torch.float32 or (products.chosen(product) == "brgemm" and to == product)
        return 0 if direct and to != torch.float16 else 4
    on_gpu = device.type == "cuda"
    return 0 if to.itemsize >= 4 or (on_gpu and to == product) else 4


def sum_scratch_bytes(product: torch.dtype, device: torch.device) -> int:
    """Return the bytes of an element of scratch by which a product is added to a sum in fp32."""
    direct = product.itemsize >= 4 or _half_on_cpu(product, device) or adds_wide(product, device)
    return 0 if direct else 4


def packing_bytes(dtypes: Iterable[torch.dtype], device: torch.device) -> int:
    """Return the bytes of packed operands that a product of one of these dtypes takes."""
    half = (x for x in dtypes if _half_on_cpu(x, device))
    packs = any(products.chosen(dtype) == "brgemm" for dtype in half)
    most = products.PACKED_BYTES * torch.get_num_threads()
    return min(most, products.MOST_PACKED_BYTES) * packs


def rate(dtype: torch.dtype) -> float:
    """Return the multiply-adds a second of a CPU's products, measured once for some 50 ms."""
    return _rate(dtype, way())


@functools.cache
def _rate(dtype: torch.dtype, way: object) -> float:
    rows, depth, width = 512, 1024, 2048
    a, b = torch.ones(rows, depth, dtype=dtype), torch.ones(width, depth, dtype=dtype)
    out, times = torch.empty(rows, width, dtype=logits_dtype(dtype, a.device)), []
    for _ in range(4):
        begin = time.perf_counter()
        mm(a, b.t(), out)
        times.append(time.perf_counter() - begin)
    return rows * depth * width / min(times)


def way() -> object:
    """Return how a CPU multiplies 16-bit operands, and with how many threads: plans need it."""
    return torch.get_num_threads(), *(products.chosen(dtype) for dtype in products.HALVES)
