"""CPU products of 16-bit matrices: every way that this machine has, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.backends.native import products, ways
from bgkernels.backends.native.call import DTYPES, MISSING
from bgkernels.streaming import gemm
from tests.conftest import Tiling

BLOCKED = products.way("brgemm", torch.bfloat16)
CPU = torch.device("cpu")
SIZES = [(1, 1, 1), (3, 5, 7), (64, 128, 64), (65, 129, 33), (127, 300, 1025), (130, 257, 2050)]
"""Of a block, one beside it, and several with a tail in each direction."""


def _ways() -> Iterator[Any]:
    """Each way with each dtype; what this machine cannot do is skipped with its reason."""
    for name in products.WAYS:
        for dtype in products.HALVES:
            reason = products.way(name, dtype).unusable()
            marks = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
            yield pytest.param(name, dtype, marks=marks, id=f"{name}-{dtype}".replace("torch.", ""))


@pytest.fixture(autouse=True)
def multiplied() -> str:
    """Left to the machine."""
    return "auto"


each_way = pytest.mark.parametrize(("way", "dtype"), list(_ways()))


@pytest.fixture(params=[True, False], ids=["rows", "columns"])
def order(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def framed(x: Tensor, by_rows: bool) -> Tensor:
    """The same numbers, rows or columns contiguous, within a larger matrix of NaNs."""
    source = x if by_rows else x.t()
    frame = source.new_full([n + 5 for n in source.shape], torch.nan)
    frame[2:-3, 3:-2] = source
    return frame[2:-3, 3:-2] if by_rows else frame[2:-3, 3:-2].t()


def matrices(size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    m, n, k = size
    return torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)


@each_way
@pytest.mark.parametrize("size", SIZES)
def test_products_are_added_up_in_fp32(
    way: str, dtype: torch.dtype, size: tuple[int, int, int], order: bool
) -> None:
    a, b = matrices(size, dtype)
    exact = a.double() @ b.double()
    scale = a.double().norm(dim=1)[:, None] * b.double().norm(dim=0)
    before = torch.randn(exact.shape)
    with products.using(way):
        assert products.chosen(dtype) == way
        for left in (framed(a, True), framed(a, False)):
            right = framed(b, order)
            for add in (False, True):
                out = framed(before, True)
                frame = out._base
                assert frame is not None
                products.mm(left, right, out, add)
                expected = exact + add * before
                error = (out - expected).abs() / (scale + add * before.abs())
                assert error.max() < 4 * torch.finfo(torch.float32).eps
                assert frame.isnan().sum() == frame.numel() - out.numel()


@each_way
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_a_narrow_result_is_rounded_once(way: str, dtype: torch.dtype, to: torch.dtype) -> None:
    a, b = (x / 4 for x in matrices((70, 260, 1100), dtype))
    out, wide = framed(torch.zeros(70, 260, dtype=to), True), torch.zeros(70, 260)
    with products.using(way):
        products.mm(a, b, out)
        products.mm(a, b, wide)
    assert torch.equal(out, wide.to(to))


@each_way
def test_infinities_and_nans_stay_in_their_rows_and_columns(way: str, dtype: torch.dtype) -> None:
    a, b = matrices((67, 131, 35), dtype)
    a[3, 34], a[66, 0], b[5, 130] = torch.nan, torch.inf, torch.nan
    out = torch.empty(67, 131)
    with products.using(way):
        products.mm(a, b, out)
    assert torch.equal(out.isnan(), (a.double() @ b.double()).isnan())
    assert torch.equal(out.isinf(), (a.double() @ b.double()).isinf())


@each_way
def test_nothing_times_nothing(way: str, dtype: torch.dtype) -> None:
    with products.using(way):
        for m, n, k in ((0, 4, 3), (4, 0, 3), (2, 3, 0)):
            a, b = torch.empty(m, k, dtype=dtype), torch.empty(k, n, dtype=dtype)
            out = torch.ones(m, n)
            assert torch.equal(products.mm(a, b, out, add=True), torch.ones(m, n))
            assert torch.equal(products.mm(a, b, out), torch.zeros(m, n))


def test_threads_do_not_change_a_bit() -> None:
    if BLOCKED.unusable():
        pytest.skip("the blocked product cannot run here")
    threads, results = torch.get_num_threads(), []
    a, b = matrices((200, 900, 1500), torch.bfloat16)
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            for left in (a, a.t().contiguous().t()):
                results.append(torch.empty(200, 900))
                BLOCKED.mm(left, b, results[-1], False)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, results[0]) for x in results)


def test_a_kernel_that_is_switched_off_later_costs_time_alone() -> None:
    """It throws then, and the blocks are computed in loops."""
    if BLOCKED.unusable():
        pytest.skip("the blocked product cannot run here")
    a, b = matrices((70, 40, 33), torch.bfloat16)
    out = torch.ones(70, 40)
    try:
        torch._C._set_mkldnn_enabled(False)
        assert products.chosen(torch.bfloat16) == "widen"
        assert "mkldnn is off" in products.reasons(torch.bfloat16)
        BLOCKED.mm(a, b, out, True)
    finally:
        torch._C._set_mkldnn_enabled(True)
    torch.testing.assert_close(out, a.float() @ b.float() + 1, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(MISSING is not None, reason=f"no compiled module: {MISSING}")
@pytest.mark.parametrize("fault", ["nothing", "order", "no sum", "beyond"])
def test_a_kernel_with_other_numbers_is_refused(fault: str) -> None:
    from bgkernels.backends.native import _C

    size, pointer = ctypes.c_int64, ctypes.c_void_p
    types = [*[size] * 6, ctypes.c_bool, pointer, pointer, pointer, ctypes.c_bool]

    def kernel(*given: Any) -> None:
        m, n, k, lda, ldb, ldc, add, a, b, c, _ = given
        if fault == "nothing":
            return
        if fault == "order":
            m, n = n, m
        for i in range(m + (fault == "beyond")):
            for j in range(n):
                total = 0.0
                for d in range(k):
                    left = _half(a + 2 * (i * lda + d))
                    total += left * _half(b + 2 * ((d // 2 * ldb + j) * 2 + d % 2))
                at = ctypes.c_float.from_address(c + 4 * (i * ldc + j))
                at.value = total + (at.value if add and fault != "no sum" else 0.0)

    function = ctypes.CFUNCTYPE(None, *types)(kernel)
    address = ctypes.cast(function, pointer).value
    assert address is not None
    reason = _C.check_product((address, 0), DTYPES[torch.bfloat16])
    assert reason == "its numbers are not those of a small product"


def _half(address: int) -> float:
    bits = ctypes.c_uint32(ctypes.c_uint16.from_address(address).value << 16)
    return float(ctypes.c_float.from_buffer(bits).value)


def test_a_torch_without_the_functions_widens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "address", lambda name: 0)
    monkeypatch.setattr(products, "way", lambda name, dtype: products.WAYS[name](dtype))
    for dtype in products.HALVES:
        for name in products.WAYS:
            with products.using(name):
                assert products.chosen(dtype) == "widen"
                assert ("exports no" in products.reasons(dtype)) == (name != "widen")


def test_other_versions_of_torch_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    find = ways.address.__wrapped__
    for version, tried in (("2.7.1", False), ("3.0.0a0+git", False), ("2.8.0+cpu", True)):
        monkeypatch.setattr(torch, "__version__", version)
        assert bool(find("cblas_sgemm")) <= tried
    assert not find("no_such_function")


def test_the_environment_and_the_caller_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in products.WAYS:
        monkeypatch.setenv(products.VARIABLE, name)
        for dtype in products.HALVES:
            usable = products.way(name, dtype).unusable() is None
            assert products.chosen(dtype) == (name if usable else "widen")
            assert gemm.product_dtype(dtype, CPU) == (
                dtype if usable and name != "widen" else torch.float32
            )
            with products.using("widen"):
                assert products.chosen(dtype) == "widen"
    monkeypatch.setenv(products.VARIABLE, "fast")
    with pytest.raises(ValueError, match="must be one of auto, brgemm, cblas, widen; got 'fast'"):
        products.chosen(torch.bfloat16)
    with pytest.raises(ValueError, match="got 'faster'"), products.using("faster"):
        pass


def test_the_choice_is_shown() -> None:
    shown = bg.show_config()
    for dtype, name in zip(products.HALVES, ("bfloat16", "float16"), strict=True):
        assert f"{name} products: {products.chosen(dtype)}" in shown
        assert products.reasons(dtype) in shown


Gradients = tuple[Tensor, ...]


def exact_gradients(x: Tensor, w: Tensor, w_t: Tensor, temperature: float) -> Gradients:
    """Of the sum over tokens of the forward KL divergence, times T², in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, w)]
    student = (leaves[0] @ leaves[1].t() / temperature).log_softmax(1)
    teacher = (x.detach().double() @ w_t.double().t() / temperature).log_softmax(1)
    loss = (teacher.exp() * (teacher - student)).sum() * temperature**2
    return torch.autograd.grad(loss, leaves)


@each_way
@pytest.mark.parametrize(
    ("gap", "temperature"), [(1.0, 1.0), (1.0, 4.0), (0.1, 1.0), (0.01, 1.0), (0.01, 4.0)]
)
def test_the_gradient_is_as_exact_as_its_dtype(
    way: str, dtype: torch.dtype, temperature: float, gap: float, tiling: Tiling
) -> None:
    """However near the student is to its teacher: rounded as a tile's gradient, and as dX or dW."""
    rows, hidden, vocab = 96, 64, 3000
    # fp16 has few digits of numbers below 6e-5. What a scaler of the loss does for them:
    scale, mode = (2.0**12 / gap, "recompute") if dtype == torch.float16 else (1.0, "fused")
    x = torch.randn(rows, hidden).to(dtype)
    w = (torch.randn(vocab, hidden) / 8).to(dtype)
    w_t = (w.float() + gap * torch.randn(vocab, hidden) / 8).to(dtype)
    exact = exact_gradients(x, w, w_t, temperature)
    for chunk, width, kept in ((96, 3000, 1), (96, 512, 3), (40, 640, 2), (11, 3000, 1)):
        tiling(chunk=chunk, width=width, kept=kept)
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        with products.using(way):
            loss = bg.linear_hybrid_distillation(
                *leaves, bg.LinearTeacher(x, w_t), torch.zeros(rows, dtype=torch.long),
                routing="soft", temperature=temperature, reduction="sum", mode=mode,
            )  # fmt: skip
            gradients = torch.autograd.grad(loss * scale, leaves)
        for ours, ref in zip(gradients, exact, strict=True):
            assert (ours.double() / scale - ref).norm() / ref.norm() <= 2.5e-3
