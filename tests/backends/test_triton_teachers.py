"""Kinds of teachers through the Triton backend, in its interpreter on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.backends import BACKENDS
from bgkernels.backends.triton import TritonBackend
from bgkernels.backends.triton.launch import Launch
from tests.interpreter import DEVICE, prepare

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore:All-NaN")
prepare()
ROWS, V, C, K = 5, 150, 140, 6


def teacher(kind: str) -> tuple[Any, dict[str, Any]]:
    """A teacher, and options of a loss that suits it."""
    t = [3 * torch.randn(ROWS, C, device=DEVICE) for _ in range(2)]
    kept = t[0].log_softmax(-1).topk(K)
    ids = kept.indices.masked_fill(kept.indices == kept.indices[0, -1], -1)
    if kind in ("bucket", "renormalize", "drop"):
        heat = 1.0 if kind == "bucket" else 2.0
        return bg.TopKTeacher(ids, kept.values, kind, vocab=C), {"temperature": heat}
    pair = [bg.LogitsTeacher(x) for x in t]
    if kind == "matched":
        generator = torch.Generator(DEVICE).manual_seed(3)
        ids = [torch.randperm(n, generator=generator, device=DEVICE)[:90] for n in (V, C)]
        places = torch.tensor([2, 0, 1, -1, 4], device=DEVICE)
        return bg.MatchedTeacher(pair[0], torch.stack(ids), positions=places), {"temperature": 2.0}
    if kind == "sum":
        pair[1] = bg.TopKTeacher(ids, kept.values, vocab=C)
    return bg.MixtureTeacher(pair, (0.4, 0.6), kind), {"label_smoothing": 0.1}


@pytest.mark.parametrize(
    "kind", ["bucket", "renormalize", "drop", "sum", "distribution", "matched"]
)
def test_as_the_eager_backend(kind: str, monkeypatch: pytest.MonkeyPatch, tiling: Any) -> None:
    monkeypatch.setitem(BACKENDS, "triton", TritonBackend(Launch(64, 4, fill=8), 1))
    tiling(chunk=3, width=100)
    made, options = teacher(kind)
    x, w = torch.randn(ROWS, 4, device=DEVICE), torch.randn(V, 4, device=DEVICE)
    leaves = [x.requires_grad_(), w.requires_grad_()]
    label = torch.tensor([3, 7, -100, V - 1, 80], device=DEVICE)

    def run(backend: str, divergence: str, cap: float | None) -> list[Tensor]:
        loss = bg.linear_hybrid_distillation(
            *leaves, made, label, backend=backend, divergence=divergence, logit_softcap=cap,
            **options,
        )  # fmt: skip
        return [loss, *torch.autograd.grad(loss, leaves)]

    for case in (("forward_kl", None), ("generalized_jsd", 5.0)):
        for got, ref in zip(run("triton", *case), run("eager", *case), strict=True):
            torch.testing.assert_close(got, ref, rtol=2e-4, atol=2e-6)
