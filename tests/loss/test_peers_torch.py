"""What breaks elsewhere in a loss's dealings with torch, by number; see ``test_peers.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bgkernels as bg
from bgkernels.streaming import cost
from tests import oracle
from tests.peers import (
    NEAR,
    D,
    N,
    V,
    both,
    dense,
    of_narrow_tiles,
    pair,
    run,
)  # fmt: skip
from tests.problems import WIDEN, ways
from tests.yardstick import rel_max


def test_expanded_upstream_gradients_and_views() -> None:
    t = pair(1.0)
    big = torch.randn(2, D, N).transpose(1, 2).requires_grad_()  # (2, N, D), not contiguous
    teacher = bg.LinearTeacher(t["h"].expand(2, N, D), t["w_t"])
    y = t["y"].expand(2, N)
    loss = bg.linear_hybrid_distillation(big, t["w"], teacher, y, reduction="none")
    (ours,) = torch.autograd.grad(loss, big, torch.ones(()).expand(2, N))
    flat = big.detach().reshape(-1, D).requires_grad_()
    teacher = bg.LinearTeacher(t["h"].repeat(2, 1), t["w_t"])
    loss = bg.linear_hybrid_distillation(flat, t["w"], teacher, y.reshape(-1), reduction="sum")
    (ref,) = torch.autograd.grad(loss, flat)
    torch.testing.assert_close(ours.reshape(-1, D), ref, rtol=1e-5, atol=1e-6)


def test_logits_that_others_use_are_left_alone() -> None:
    leaf = torch.randn(8, V, requires_grad=True)
    before = leaf.detach().clone()
    activated = torch.tanh(leaf)
    loss = bg.hybrid_distillation(activated, bg.LogitsTeacher(torch.randn(8, V)), "teacher_argmax")
    (loss + activated.square().mean()).backward()
    assert torch.equal(leaf.detach(), before)
    again = torch.tanh(leaf)
    teacher = bg.LogitsTeacher(torch.randn(8, V))
    loss = bg.hybrid_distillation(again, teacher, "teacher_argmax", overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # tanh saved what was overwritten


def test_more_elements_than_int32_can_count() -> None:
    rows, vocab = 70_000, 31_000
    z = torch.randn(1, vocab).expand(rows, vocab)
    v = torch.randn(1, vocab).expand(rows, vocab)
    y = torch.full((rows,), -100)
    y[[0, 1, rows - 1]] = 7
    assert z.numel() > 2**31
    with torch.no_grad():
        loss = bg.hybrid_distillation(z, bg.LogitsTeacher(v), y, reduction="none")
    assert loss[0] == loss[1] == loss[-1] != 0 and not loss[2:-1].any()


@pytest.mark.parametrize("multiplied", ways("bf16"), indirect=True)
def test_autocast_casts_like_a_linear_layer(multiplied: str) -> None:
    """These numbers are the same in bf16."""
    t = pair(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, dx, dw = run(t)
    assert loss.dtype == dx.dtype == dw.dtype == torch.float32
    _, *exact = dense(t)
    for a, b, narrow in zip((dx, dw), exact, of_narrow_tiles(t), strict=True):
        more = narrow if multiplied != WIDEN else 0.0
        assert (a - b).abs().max() <= NEAR * b.abs().max() + more


def test_t07b_a_teacher_need_not_be_normalised() -> None:
    z, v, y = (torch.randn(6, V, dtype=torch.float64) for _ in range(3))
    y = torch.randint(V, (6,))
    shifted = v + torch.tensor([5.0, -300, 0, 40, 1e3, 2], dtype=torch.float64)[:, None]
    for a, b in zip(both(z, shifted, y), both(z, v, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    step = 1e-5 * torch.randn_like(z)
    ahead, behind = (both(z + s * step, shifted, y)[0] for s in (1, -1))
    slope = (both(z, shifted, y)[1] * step).sum()
    torch.testing.assert_close((ahead - behind) / 2, slope, rtol=1e-6, atol=0)


def test_t19b_an_adapter_on_the_head_learns_and_its_base_stays_frozen() -> None:
    t = {n: x.double() if n != "y" else x for n, x in pair(1.0).items()}
    down, up = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, D), (V, 2)))
    teacher, head = bg.LinearTeacher(t["h"], t["w_t"]), t["w"] + up @ down
    loss = bg.linear_hybrid_distillation(t["x"], head, teacher, t["y"])
    ours = torch.autograd.grad(loss, (down, up))
    logits = t["x"] @ (t["w"] + up @ down).t()
    ref = torch.autograd.grad(oracle.hybrid_loss(logits, t["h"] @ t["w_t"].t(), t["y"]), (down, up))
    assert all(rel_max(a, b) < 1e-10 for a, b in zip(ours, ref, strict=True))


@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_t22b_saved_tensor_hooks_are_honoured(mode: str) -> None:
    t, packed = pair(1.0), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: packed.append(x.shape) or x.clone(), lambda x: x.clone()
    ):
        hooked = run(t, mode=mode)
    assert packed and all(torch.equal(a, b) for a, b in zip(hooked, run(t, mode=mode), strict=True))


@pytest.mark.parametrize("options", [{}, {"mode": "recompute"}, {"routing": "risk_guided"}])
def test_nothing_waits_for_a_device(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A meta tensor has no values: whatever would copy one to the host raises.
    monkeypatch.setitem(cost.COST, "meta", cost.COST["cuda"])
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    t = {n: x.to("meta") for n, x in pair(1.0).items()}
    for divergence in bg.divergences.registry:
        ours = run(t, divergence=divergence, backend="eager", num_items=t["y"].sum(), **options)
        assert [x.device.type for x in ours] == ["meta"] * 3


@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    t = {n: x.to("cuda:1") for n, x in pair(1.0).items()}
    for a, b in zip(run(t), run({n: x.cpu() for n, x in t.items()}), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-5)
