"""Losses with other libraries' call shapes: equal to them where they run, else to the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bgkernels.integrations import functional, liger, torchtune

N, V = 9, 37


def tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def labels(*shape: int) -> Tensor:
    y = torch.randint(V, shape)
    y.flatten()[::4] = -100
    return y


def assert_same(ours: Any, theirs: Any, given: list[Tensor]) -> None:
    """Value and gradient of two losses in the tensors given."""
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    grads = [torch.autograd.grad(loss, given) for loss in (ours, theirs)]
    for got, ref in zip(*grads, strict=True):
        torch.testing.assert_close(got, ref, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_liger_chunked_jsd(beta: float, temperature: float) -> None:
    chunked = pytest.importorskip(
        "liger_kernel.chunked_loss", reason="needs the extra `peers`: liger-kernel"
    )
    t = tensors(x=(N, 8), w=(V, 8), h=(N, 6), v=(V, 6), b=(V,), c=(V,))
    x, w, b = (t[k].float().requires_grad_() for k in "xwb")
    h, v, c = (t[k].float() for k in "hvc")
    config = {"weight_hard_loss": 0.3, "weight_soft_loss": 0.7, "beta": beta}
    config |= {"temperature": temperature, "return_soft_hard_loss": True}
    y = labels(N)
    theirs = chunked.LigerFusedLinearJSDLoss(**config, compiled=False)(x, w, h, v, y, b, c)
    ours = liger.LigerFusedLinearJSDLoss(**config)(x, w, h, v, y, b, c)
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-6)
    grads = [torch.autograd.grad(loss[0], [x, w, b]) for loss in (ours, theirs)]
    for got, ref in zip(*grads, strict=True):
        torch.testing.assert_close(got, ref, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_liger_fused_jsd_is_its_formula(labelled: bool) -> None:
    """Their kernel needs a GPU; this is the formula that its documentation states."""
    t = tensors(x=(N, 8), w=(V, 8), h=(N, 6), v=(V, 6))
    x, w = t["x"].requires_grad_(), t["w"].requires_grad_()
    y = labels(N) if labelled else None
    ours = liger.LigerFusedLinearJSD(jsd_beta=0.2, temperature=1.5)(x, w, t["h"], t["v"], y)
    s, q = (F.log_softmax(z / 1.5, -1) for z in (x @ w.T, t["h"] @ t["v"].T))
    m = (0.2 * q.exp() + 0.8 * s.exp()).log()
    rows = 0.2 * (q.exp() * (q - m)).sum(-1) + 0.8 * (s.exp() * (s - m)).sum(-1)
    assert_same(ours, rows.mean() if y is None else rows[y != -100].mean(), [x, w])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy(reduction: str, smoothing: float) -> None:
    t = tensors(x=(N, 8), w=(V, 8), b=(V,))
    x, w, b = (p.requires_grad_() for p in t.values())
    y = labels(N)
    config: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    ours = functional.linear_cross_entropy(x, w, y, linear_bias=b, **config)
    reference = F.cross_entropy(x @ w.T + b, y, **config)
    if hasattr(F, "linear_cross_entropy") and not smoothing:  # torch 2.13
        theirs = F.linear_cross_entropy(x, w, y, linear_bias=b, **config)
        torch.testing.assert_close(ours, theirs)
    upstream = torch.rand_like(reference)
    assert_same((ours * upstream).sum(), (reference * upstream).sum(), [x, w, b])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_weights(reduction: str) -> None:
    t = tensors(x=(N, 8), w=(V, 8))
    x, w = (p.requires_grad_() for p in t.values())
    y, weight = labels(N), torch.rand(V, dtype=torch.float64)
    ours = functional.linear_cross_entropy(x, w, y, weight=weight, reduction=reduction)
    theirs = F.cross_entropy(x @ w.T, y, weight, reduction=reduction)
    assert_same(ours.sum(), theirs.sum(), [x, w])


def test_linear_cross_entropy_refuses_and_forgives() -> None:
    x, w, y = torch.randn(N, 8), torch.randn(V, 8), labels(N)
    with pytest.raises(NotImplementedError, match="probabilities"):
        functional.linear_cross_entropy(x, w, torch.rand(N, V))
    with pytest.raises(NotImplementedError, match="label_smoothing"):
        functional.linear_cross_entropy(x, w, y, weight=torch.rand(V), label_smoothing=0.1)
    nothing = torch.full_like(y, -100)
    assert functional.linear_cross_entropy(x, w, nothing) == 0
    assert functional.linear_cross_entropy(x, w, nothing, weight=torch.rand(V)) == 0


def test_torchtune_forward_kl() -> None:
    """Cross-entropy with the teacher's distribution, over all tokens that have a label."""
    t = tensors(s=(2, 10, V), q=(2, 10, V))
    s, q, y = t["s"].requires_grad_(), t["q"], labels(2, 10)
    loss_fn = torchtune.ForwardKLWithChunkedOutputLoss(num_output_chunks=4)
    ours = loss_fn(s.chunk(4, dim=1), q.chunk(4, dim=1), y)
    rows = -(q.softmax(-1) * s.log_softmax(-1)).sum(-1)
    assert_same(ours, rows[y != -100].mean(), [s])


def test_torchtune_chunks_do_not_matter() -> None:
    t = tensors(s=(2, 10, V), q=(2, 10, V))
    s, q, y = t["s"].requires_grad_(), t["q"], labels(2, 10)
    losses = [
        torchtune.HybridWithChunkedOutputLoss(n, routing="confidence", temperature=2.0)(
            s.tensor_split(n, dim=1), q.tensor_split(n, dim=1), y
        )
        for n in (1, 4)
    ]
    assert_same(*losses, [s])
    with pytest.raises(ValueError, match=r"\[3, 3, 3, 1\] and \[3, 3, 2, 2\]"):
        torchtune.HybridWithChunkedOutputLoss(4)(s.chunk(4, dim=1), q.tensor_split(4, dim=1), y)
