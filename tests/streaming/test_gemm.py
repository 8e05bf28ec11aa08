"""Products that leave or gather fp32, and the scratch matrices around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bgkernels.streaming import gemm

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALF = torch.bfloat16


def test_a_device_without_products_that_add_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's CPU is one: no exception a call, and products go through scratch."""
    tried: list[Any] = []
    real: Callable[..., Tensor] = torch.addmm

    def addmm(*args: Any, **kwargs: Any) -> Tensor:
        tried.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "addmm", addmm)
    gemm.adds_wide.cache_clear()
    assert [gemm.adds_wide(HALF, CPU) for _ in range(3)] == [False] * 3
    assert len(tried) == 1


@pytest.mark.parametrize("rows, width", [(1, 1), (3, 64), (5, 65), (7, 50_257)])
def test_rows_of_a_matrix_begin_at_multiples_where_memory_has_room(rows: int, width: int) -> None:
    """Else the last tile of an odd vocabulary has rows at odd places."""
    wide = -(-width // gemm.STRIDE) * gemm.STRIDE
    x = gemm.matrix(torch.empty(rows * wide + 3), rows, width)
    assert x.shape == (rows, width) and x.stride() == (wide, 1)
    tight = gemm.matrix(torch.empty(rows * width), rows, width)
    assert tight.shape == (rows, width) and tight.is_contiguous()


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_scratch_is_planned_where_a_product_needs_it(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for adds in (False, True):
        monkeypatch.setattr(gemm, "adds_wide", lambda dtype, device, adds=adds: adds)
        assert gemm.sum_scratch_bytes(torch.float32, device) == 0
        half = gemm.sum_scratch_bytes(HALF, device)
        assert half == (4 if device == GPU and not adds else 0)
    assert gemm.scratch_bytes(HALF, torch.float16, device) == 4
    if device == GPU:  # one rounding, straight into the gradient
        assert gemm.scratch_bytes(HALF, HALF, device) == 0


@pytest.mark.gpu
def test_a_gpu_adds_products_in_place() -> None:
    a, b = (torch.randn(n, device=GPU).to(HALF) for n in ((300, 500), (500, 200)))
    start = torch.randn(300, 200, device=GPU)
    total = start.clone()

    def scratch() -> Tensor:
        assert not gemm.adds_wide(HALF, GPU)
        return torch.empty_like(total)

    gemm.add_mm_(total, a, b, scratch)
    torch.testing.assert_close(
        total.double(), start + a.double() @ b.double(), rtol=1e-4, atol=1e-3
    )
