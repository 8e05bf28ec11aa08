"""The driver: chunkings agree, budgets hold, and only what is asked for is done."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bgkernels as bg
from bgkernels.backends import BACKENDS
from bgkernels.streaming import driver, planner
from bgkernels.streaming.planner import Plan, Workload
from tests.conftest import Tiling
from tests.problems import WIDEN, ways

N, D, D_T, V = 23, 12, 9, 301


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    labels = torch.randint(V, (N,))
    labels[::7] = -100
    return {
        "x": torch.randn(N, D, dtype=dtype, requires_grad=True),
        "w": torch.randn(V, D, dtype=dtype, requires_grad=True),
        "b": torch.randn(V, dtype=dtype, requires_grad=True),
        "h": torch.randn(N, D_T, dtype=dtype),
        "w_t": torch.randn(V, D_T, dtype=dtype),
        "y": labels,
    }


def loss_of(t: dict[str, Tensor], **options: Any) -> Tensor:
    teacher = bg.LinearTeacher(t["h"], t["w_t"])
    return bg.linear_hybrid_distillation(
        t["x"], t["w"], teacher, t["y"], linear_bias=t["b"], **options
    )


def grads_of(loss: Tensor, t: dict[str, Tensor], **more: Any) -> list[Tensor]:
    leaves = [x for x in t.values() if x.requires_grad]
    return list(torch.autograd.grad(loss, leaves, **more))


TILINGS = [
    (23, 301, 1),
    (23, 64, 1),
    (23, 64, 3),
    (23, 64, 5),
    (5, 64, 2),
    (1, 150, 1),
    (8, 300, 2),
]


@pytest.mark.parametrize("divergence", ["forward_kl", "generalized_jsd"])
@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_every_tiling_gives_the_same(divergence: str, mode: str, tiling: Tiling) -> None:
    t = tensors()
    expected: list[Tensor] | None = None
    for chunk, width, kept in TILINGS:
        tiling(chunk=chunk, width=width, kept=kept)
        loss = loss_of(t, divergence=divergence, mode=mode, temperature=1.5)
        got = [loss, *grads_of(loss, t)]
        expected = expected or got
        for ours, ref in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, ref, rtol=1e-10, atol=1e-12)


def test_budgets_from_least_to_ample_agree() -> None:
    t = tensors()
    reference = grads_of(loss_of(t), t)
    for budget in (30_000, 60_000, 200_000, 10_000_000):
        for ours, ref in zip(grads_of(loss_of(t, memory_budget=budget), t), reference, strict=True):
            torch.testing.assert_close(ours, ref, rtol=1e-10, atol=1e-12)


Planner = Callable[[Workload, "int | None"], Plan]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Planner], list[Plan]]:
    """``planned(by)`` lets a function plan; the plans that it will make."""

    def replaced(by: Planner) -> list[Plan]:
        plans: list[Plan] = []

        def watched(work: Workload, budget: int | None) -> Plan:
            plans.append(by(work, budget))
            return plans[-1]

        monkeypatch.setattr(driver, "plan", watched)
        driver.PLANS.clear()
        return plans

    return replaced


@pytest.mark.parametrize("divergence", ["forward_kl", "generalized_jsd"])
@pytest.mark.parametrize(
    ("dtype", "multiplied"),
    [(torch.float32, WIDEN), *((torch.bfloat16, way) for way in ways("bf16"))],
    indirect=["multiplied"],
)
def test_tiles_kept_in_the_gradient_of_the_weight_change_no_bit(
    divergence: str, dtype: torch.dtype, multiplied: str, planned: Any
) -> None:
    """A tile in memory that the gradient does not need yet is the same as in memory of its own."""
    t = {n: x if n == "y" else x.to(dtype) for n, x in tensors(torch.float32).items()}
    t |= {n: t[n].detach().requires_grad_() for n in "xwb"}
    lent = []
    for width in (16, 30, 64, 100):

        def lending(work: Workload, _: int | None, width: int = width) -> Plan:
            tiles = -(-V // width)
            count = planner._lent(work, tiles, width, N * width * work.logit_bytes)
            lent.append(count)
            return Plan(N, V, N, width, tiles, 0, lent=count, pair_bytes=work.logit_bytes)

        planned(lending)
        ours = grads_of(loss_of(t, divergence=divergence), t)
        planned(lambda work, budget: replace(lending(work, budget), lent=0))
        for a, b in zip(ours, grads_of(loss_of(t, divergence=divergence), t), strict=True):
            assert torch.equal(a, b)
    assert max(lent) >= 2, lent


def test_the_smallest_budgets_walk_groups_of_columns(planned: Any) -> None:
    """With a 16-bit head: dW in groups where its fp32 sum does not fit, then dX in its own walk."""
    t = tensors(torch.float32)
    tall = {n: x.detach().repeat(9, *[1] * (x.ndim - 1)) for n, x in t.items() if n in ("w", "b")}
    t |= tall | {"w_t": t["w_t"].repeat(9, 1)}
    t = {
        n: x if n == "y" else x.detach().bfloat16().requires_grad_(n in "xwb") for n, x in t.items()
    }
    plans: list[Plan] = planned(planner.plan)
    reference, walks, budget = grads_of(loss_of(t), t), [], 300_000
    while True:
        plans.clear()
        try:
            ours = grads_of(loss_of(t, memory_budget=budget), t)
        except planner.BudgetError:
            break
        for a, b in zip(ours, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-4)
        assert all(p.bytes <= budget for p in plans)
        walks.append(tuple(p.groups > 1 for p in plans))
        budget = int(budget / 1.02)
    fused, both, apart = (False,), (False, True), (False, False, True)
    assert [walk for walk, _ in groupby(walks)] == [fused, both, apart]


def test_no_rows_and_no_labels_cost_nothing() -> None:
    for rows in (0, 4):
        x = torch.randn(rows, D, requires_grad=True)
        w = torch.randn(V, D, requires_grad=True)
        teacher = bg.LinearTeacher(torch.randn(rows, D_T), torch.randn(V, D_T))
        y = torch.full((rows,), -100)
        for mode in ("fused", "recompute"):
            loss = bg.linear_hybrid_distillation(x, w, teacher, y, mode=mode)
            dx, dw = torch.autograd.grad(loss, (x, w))
            assert loss == 0 and not dx.any() and not dw.any()


@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_only_what_is_asked_for_gets_a_gradient(mode: str) -> None:
    t = tensors()
    full = dict(zip("xwb", grads_of(loss_of(t, mode=mode), t), strict=True))
    for asked in ("x", "w", "b", "xb", "wb"):
        part = {n: x.detach().requires_grad_(n in asked) if n in "xwb" else x for n, x in t.items()}
        got = grads_of(loss_of(part, mode=mode), part)
        for name, ours in zip([n for n in "xwb" if n in asked], got, strict=True):
            torch.testing.assert_close(ours, full[name], rtol=1e-12, atol=1e-14)


class Spy:
    """Counts the calls of a backend."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.calls: list[str] = []
        for method in ("absorb_", "vjp"):
            real = getattr(BACKENDS[name], method)
            monkeypatch.setattr(BACKENDS[name], method, self.counted(method, real), raising=True)

    def counted(self, method: str, real: Any) -> Any:
        def call(*args: Any) -> None:
            self.calls.append(method)
            real(*args)

        return call


def test_without_gradient_only_pass_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    t, spy = tensors(), Spy(monkeypatch, "eager")
    with torch.no_grad():
        loss_of(t)
    assert set(spy.calls) == {"absorb_"}
    with torch.inference_mode():
        loss_of(t, mode="fused")
    assert set(spy.calls) == {"absorb_"}


def test_a_frozen_head_multiplies_and_allocates_no_weight_gradient() -> None:
    t = tensors(torch.float32)
    frozen = t | {"w": t["w"].detach(), "b": t["b"].detach()}
    weight, teacher = (t[name].untyped_storage().data_ptr() for name in ("w", "w_t"))
    created: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = f(*args, **(kwargs or {}))
            big = isinstance(out, Tensor) and out.shape == (V, D)
            if big and out.untyped_storage().data_ptr() not in (weight, teacher):
                created.append(str(f))
            return out

    with Watch():
        loss_of(frozen).backward()
    assert not created


@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_a_kept_graph_gives_the_same_twice(mode: str) -> None:
    t = tensors()
    loss = loss_of(t, mode=mode) * 1.7
    first = [g.clone() for g in grads_of(loss, t, retain_graph=True)]
    for ours, ref in zip(grads_of(loss, t), first, strict=True):
        torch.testing.assert_close(ours, ref, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_a_gradient_that_autograd_keeps_is_not_shared(mode: str) -> None:
    t = tensors()
    loss = loss_of(t, mode=mode)
    loss.backward(retain_graph=True)
    first = t["w"].grad.clone()
    loss.backward()
    torch.testing.assert_close(t["w"].grad, 2 * first, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", ["fused", "recompute"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_offloading(mode: str, reentrant: bool) -> None:
    t = tensors()
    reference = grads_of(loss_of(t, mode=mode), t)

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return loss_of(t | {"x": x, "w": w, "b": b}, mode=mode)

    leaves = [t[n] for n in "xwb"]
    loss = checkpoint(run, *leaves, use_reentrant=reentrant)
    loss.backward()
    for leaf, ref in zip(leaves, reference, strict=True):
        torch.testing.assert_close(leaf.grad, ref, rtol=1e-12, atol=1e-14)
    with torch.autograd.graph.save_on_cpu():
        offloaded = loss_of(t, mode=mode)
    for ours, ref in zip(grads_of(offloaded, t), reference, strict=True):
        torch.testing.assert_close(ours, ref, rtol=1e-12, atol=1e-14)


def test_strided_inputs_and_expanded_upstream_gradients() -> None:
    t = tensors()
    wide = torch.randn(2 * D, N, dtype=torch.float64)
    strided = t | {"x": wide[::2].t().detach().requires_grad_(), "h": t["h"].t().contiguous().t()}
    dense = strided | {"x": strided["x"].detach().contiguous().requires_grad_()}
    ours, ref = (loss_of(x, reduction="none") for x in (strided, dense))
    upstream = torch.tensor(0.3, dtype=torch.float64).expand(N)
    for a, b in zip(
        grads_of(ours, strided, grad_outputs=upstream),
        grads_of(ref, dense, grad_outputs=upstream.contiguous()),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_autocast_takes_master_weights() -> None:
    t = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(t | {"x": t["x"].detach().bfloat16().requires_grad_()})
    reference = loss_of(t)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=2e-2, atol=1e-2)
    loss.backward()
    assert t["w"].grad.dtype == torch.float32


def test_a_tied_embedding_gets_both_gradients() -> None:
    table = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    tokens, t = torch.randint(V, (N,)), tensors()
    loss = loss_of(t | {"x": table[tokens], "w": table})
    (tied,) = torch.autograd.grad(loss, table)
    parts = [table.detach().clone().requires_grad_() for _ in range(2)]
    apart = loss_of(t | {"x": parts[0][tokens], "w": parts[1]})
    torch.testing.assert_close(tied, sum(torch.autograd.grad(apart, parts)))


def test_double_backward_is_refused() -> None:
    t = tensors()
    (dx, *_) = grads_of(loss_of(t), t, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        dx.sum().backward()


PEAK = """
import os, resource, sys, torch, bgkernels as bg

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def step(rows, vocab, kind, budget):
    x, h, w, w_t = (t[:n].detach() for t, n in zip(tensors, (rows, rows, vocab, vocab)))
    teacher = bg.LinearTeacher(h, w_t)
    if kind == "top-k":
        ids = torch.arange(0, vocab, vocab // 200)[:200].expand(rows, 200)
        teacher = bg.TopKTeacher(ids, torch.full((rows, 200), -9.0))
    elif kind != "linear":
        teacher = bg.MixtureTeacher([teacher, teacher], (0.5, 0.5), kind)
    args = x.requires_grad_(), w.requires_grad_(), teacher, torch.arange(rows)
    bg.linear_hybrid_distillation(*args, memory_budget=budget).backward()
    return w.grad.nbytes

for argument in sys.argv[1:]:
    budget, kind, way = argument.split()
    if os.fork():  # a process of its own has a high-water mark of its own
        assert os.wait()[1] == 0
        continue
    os.environ["BGKERNELS_CPU_PRODUCT"] = way
    torch.set_num_threads(2)  # each has memory of its own for operands
    shapes = (256, 64), (256, 96), (60_000, 64), (60_000, 96)
    tensors = [torch.empty(n, dtype=torch.bfloat16).normal_() for n in shapes]
    step(8, 1000, kind, int(budget))
    base = peak()
    kept = step(256, 60_000, kind, int(budget))
    print(argument, peak() - base - kept, sep=":", flush=True)
    os._exit(0)
"""
PEAKS = [(mebibytes, "linear", way) for mebibytes in (16, 48, 160) for way in ways("bf16")]
OF_LIBRARIES = 2 * (4 << 20)
"""What products in 16 bits take beside, in oneDNN or MKL: code, and packed operands of a thread."""
PEAKS += [(32, kind, WIDEN) for kind in ("top-k", "sum", "distribution")]


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """Bytes that each of ``PEAKS`` takes beside its inputs and gradients."""
    arguments = [f"{mebibytes << 20} {kind} {way}" for mebibytes, kind, way in PEAKS]
    command, root = [sys.executable, "-c", PEAK, *arguments], Path(__file__).resolve().parents[2]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    lines = (line.split(":") for line in done.stdout.splitlines())
    return {argument: int(used) for argument, used in lines}


@pytest.mark.skipif(sys.platform != "linux", reason="a process is forked, and counts in KiB")
@pytest.mark.parametrize(("mebibytes", "kind", "way"), PEAKS)
def test_peak_memory_stays_in_the_budget(
    mebibytes: int, kind: str, way: str, peaks: dict[str, int]
) -> None:
    budget = mebibytes << 20
    more = OF_LIBRARIES if way != WIDEN else 0
    assert peaks[f"{budget} {kind} {way}"] <= 1.1 * budget + more
