"""Matrix products of a chunk: in which dtype they run, and where their results go."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for a 16-bit dtype; without them torch crawls."""
    name = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }.get(dtype)
    return name is None or bool(getattr(torch.ops.mkldnn, name)())


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to multiply ``dtype`` in: itself, or fp32 on a CPU without instructions for it."""
    return torch.float32 if device.type == "cpu" and not _cpu_multiplies(dtype) else dtype


def logits_dtype(product: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of computed logits: fp32 where the device can keep its accumulators."""
    return torch.float32 if device.type == "cuda" and product != torch.float64 else product


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b`` into ``out``, whose dtype may be wider than the operands'."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a, b))


def add_mm_(total: Tensor, a: Tensor, b: Tensor, scratch: Tensor) -> Tensor:
    """``total += a @ b``, through ``scratch`` where the product cannot add to its dtype."""
    if total.dtype == a.dtype:
        return total.addmm_(a, b)
    return total.add_(mm(a, b, scratch))


def way() -> object:
    """How 16-bit operands are multiplied on a CPU: plans depend on it."""
    return _cpu_multiplies(torch.bfloat16), _cpu_multiplies(torch.float16)
