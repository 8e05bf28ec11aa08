"""The Triton backend on a real device: sizes, synchronisation, devices, graphs, compilations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.backends import BACKENDS
from bgkernels.backends import triton as triton_backend
from bgkernels.backends.triton import TritonBackend
from bgkernels.spec import Mixture, RowSpec, Tilt
from bgkernels.stats import Final
from bgkernels.vjp import vjp_coefficients
from tests.interpreter import DEVICE
from tests.test_triton import Case, statistics

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu


def primitives(case: Case) -> tuple[Final, Tensor]:
    """Statistics, and the gradient of Σ KL(t ‖ s) + CE over the student's logits."""
    _, final = statistics(TritonBackend(), case)
    one = torch.ones_like(final.stats.nll)
    coefficients = vjp_coefficients(final, {"kl_ts": one, "nll": one}, {}, case.spec)
    TritonBackend().vjp(case.student, case.tiles()[0], coefficients, case.spec)
    return final, case.student


def on_device(rows: int, vocab: int, device: torch.device = DEVICE) -> Case:
    s, t = (
        torch.empty(rows, vocab, dtype=torch.bfloat16, device=device).normal_(std=3)
        for _ in range(2)
    )
    labels = torch.randint(vocab, (rows,), device=device)
    return Case(RowSpec(vocab, vocab, extras=(Tilt(0, 0.1), Mixture(0.5))), s, t, labels)


@pytest.mark.parametrize("rows, vocab", [(70_000, 32_768), (9_000, 248_320)])
def test_more_rows_and_elements_than_small_integers_count(rows: int, vocab: int) -> None:
    case = on_device(rows, vocab)
    some = torch.tensor([0, 1, 8_999, 65_535, 65_536, rows - 1], device=DEVICE).clamp_max(rows - 1)
    assert case.teacher is not None
    few = replace(case, student=case.student[some], teacher=case.teacher[some])
    few.labels = case.labels[some]
    final, gradient = primitives(case)
    expected, ref = primitives(few)
    for ours, want in zip(final.stats.tensors(), expected.stats.tensors(), strict=True):
        torch.testing.assert_close(ours[some], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[some], ref, rtol=2e-2, atol=1e-6)


LOSSES: dict[str, dict[str, Any]] = {
    "fused": {},
    "recompute": {"mode": "recompute", "divergence": "generalized_jsd", "temperature": 2.0},
    "sampled": {"target": "teacher_sample", "seed": 3, "divergence": "alpha_beta"},
}


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "triton", TritonBackend())
    x, w, h, w_t = (
        torch.randn(n, d, dtype=torch.bfloat16, device=DEVICE)
        for n, d in ((512, 256), (8000, 256), (512, 384), (8000, 384))
    )
    x.requires_grad_()
    w.requires_grad_()
    options: dict[str, Any] = {"target": torch.randint(8000, (512,), device=DEVICE), **LOSSES[name]}

    def step() -> None:
        bg.linear_hybrid_distillation(
            x, w, bg.LinearTeacher(h, w_t), backend="triton", **options
        ).backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    primitives(on_device(64, 1000, torch.device("cuda:1")))
    assert torch.cuda.current_device() == 0


def test_graph_capture_and_replay() -> None:
    case = on_device(300, 5000)
    original = case.student.clone()
    primitives(case)  # compiles
    expected = case.student.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        primitives(case)
    case.student.copy_(original)
    graph.replay()
    assert torch.equal(case.student, expected)


def test_sizes_and_numbers_compile_nothing_new() -> None:
    def compiled() -> int:
        made = [k for k in vars(triton_backend.kernels()).values() if hasattr(k, "device_caches")]
        return sum(len(cache[0]) for kernel in made for cache in kernel.device_caches.values())

    def run(rows: int, vocab: int, temperature: float, a: float) -> None:
        case = on_device(rows, vocab)
        extras = (Tilt(0, a), Mixture(a))
        case.spec = replace(case.spec, temperature=temperature, extras=extras)
        primitives(case)

    run(300, 4096, 2.0, 0.1)
    before = compiled()
    run(1200, 16_000, 3.0, 0.2)
    assert compiled() == before
