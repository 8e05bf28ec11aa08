"""What breaks elsewhere, by number: each test is a defect that users of similar losses reported.

T25 (compiled graphs) is in ``test_compile.py``; T24 and T27 need a GPU (``test_triton_gpu.py``);
T28 (sharded and tied heads) is in ``test_dtensor.py`` and ``test_distributed.py``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import bgkernels as bg
from bgkernels.streaming import planner
from tests import oracle
from tests.conftest import Tiling
from tests.yardstick import projection, rel_max

N, D, D_T, V = 24, 16, 12, 500


def pair(noise: float, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A student and a teacher of one width, whose logits differ by ``noise`` of their size."""
    x, w = torch.randn(N, D), torch.randn(V, D) * scale / math.sqrt(D)
    h = x + noise * torch.randn(N, D)
    t = {"x": x, "w": w, "h": h, "w_t": w.clone()}
    return {name: v.bfloat16().to(dtype) for name, v in t.items()} | {"y": torch.randint(V, (N,))}


def run(t: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the gradients of input and weight."""
    x, w = (t[n].detach().requires_grad_() for n in "xw")
    teacher = bg.LinearTeacher(t["h"], t["w_t"])
    loss = bg.linear_hybrid_distillation(x, w, teacher, t["y"], **options)
    return (loss, *torch.autograd.grad(loss.sum(), (x, w)))


def dense(t: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the oracle in float64."""
    x, w = (t[n].detach().double().requires_grad_() for n in "xw")
    loss = oracle.hybrid_loss(x @ w.t(), t["h"].double() @ t["w_t"].double().t(), t["y"], **options)
    return (loss, *torch.autograd.grad(loss.sum(), (x, w)))


def both(logits: Tensor, teacher: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient from logits."""
    z = logits.detach().clone().requires_grad_()
    loss = bg.hybrid_distillation(z, bg.LogitsTeacher(teacher), y, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


@pytest.mark.parametrize("noise", [1.0, 0.03, 0.005])
@pytest.mark.parametrize("scale", [1.0, 8.0, 64.0, 640.0])
def test_t01_nearly_equal_models_and_large_logits(noise: float, scale: float) -> None:
    t = pair(noise, scale)
    ours, ref = (f(t, divergence="generalized_jsd", routing="soft") for f in (run, dense))
    eager = run({n: x.double() if n != "y" else x for n, x in t.items()}, backend="eager",
                divergence="generalized_jsd", routing="soft")  # fmt: skip
    # fp32 logits of size s have an error of about s·1e-7, beside a difference of noise·s; where the
    # models share no token the gradient vanishes, and the rounding of its terms remains.
    floor = 1e-5 + 1e-6 * max(scale, 1.0) / min(noise, 1.0)
    for a, b, factor in zip(ours[1:], ref[1:], (t["w"], t["x"]), strict=True):
        rounding = (4e-6 + 4e-7 * scale) / N * factor.abs().max()
        assert (a - b).abs().max() < floor * b.abs().max() + rounding
    assert (eager[1] - ref[1]).abs().max() < 1e-8 * ref[1].abs().max() + 1e-14 * scale


@pytest.mark.parametrize("p", [0.99, 0.999, 0.99999])
def test_t02_gradient_of_a_well_known_label(p: float) -> None:
    logits = torch.zeros(1, V)
    logits[0, 3] = math.log(p / (1 - p) * (V - 1))
    _, d = both(logits, torch.randn(1, V), torch.tensor([3]), routing="hard")
    z = logits.double()
    exact = F.softmax(z, -1)[0, 3] - 1
    rest = -F.softmax(z, -1)[0].sum().sub(F.softmax(z, -1)[0, 3])
    assert abs(d[0, 3].item() / rest.item() - 1) < 1e-5
    assert abs(exact.item() / rest.item() - 1) < 1e-9


def test_t03_dw_error_is_independent_of_chunks(tiling: Tiling) -> None:
    t = pair(1.0, dtype=torch.bfloat16)
    reference = dense(t)[2]
    errors = []
    for chunk in (24, 12, 3, 1):
        tiling(chunk=chunk, width=256, kept=2)
        errors.append(rel_max(run(t)[2], reference))
    assert max(errors) < 1.2 * errors[0] + 1e-6


@pytest.mark.parametrize("mode", ["auto", "recompute"])
def test_t04_none_takes_each_tokens_upstream_gradient(mode: str) -> None:
    t, upstream = pair(1.0), torch.randn(N) * (torch.rand(N) > 0.3)
    x = t["x"].detach().requires_grad_()
    teacher = bg.LinearTeacher(t["h"], t["w_t"])
    loss = bg.linear_hybrid_distillation(x, t["w"], teacher, t["y"], reduction="none", mode=mode)
    loss.backward(upstream)
    exact = t["x"].double().requires_grad_()
    rows = oracle.hybrid_loss(
        exact @ t["w"].double().t(),
        t["h"].double() @ t["w_t"].double().t(),
        t["y"],
        reduction="none",
    )
    rows.backward(upstream.double())
    assert x.grad is not None and exact.grad is not None
    assert rel_max(x.grad, exact.grad) < 1e-5


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jeffreys", "generalized_jsd"])
def test_t05_a_divergence_is_never_negative(name: str) -> None:
    z = torch.randn(64, V) * 5
    loss, d = both(z, z + 1e-4 * torch.randn(64, V), torch.zeros(64, dtype=torch.int64),
                   divergence=name, routing="soft", reduction="none")  # fmt: skip
    assert (loss >= 0).all() and d.abs().sum() > 0


@pytest.mark.parametrize("name", list(bg.divergences.registry))
def test_t06_low_temperature_keeps_gradients_finite(name: str) -> None:
    z, v = torch.randn(8, V) * 3, torch.randn(8, V) * 3
    loss, d = both(z, v, torch.zeros(8, dtype=torch.int64), divergence=name, temperature=0.05)
    assert loss.isfinite() and d.isfinite().all()


def test_t07_gradients_over_bf16_logits_are_rounded_once() -> None:
    z, v = torch.randn(16, V).bfloat16(), torch.randn(16, V).bfloat16()
    y = torch.randint(V, (16,))
    _, apart = both(z, v, y)
    again = z.clone().requires_grad_()
    leaf = again * 1  # overwriting a leaf's memory would lose the caller's values
    loss = bg.hybrid_distillation(leaf, bg.LogitsTeacher(v), y, overwrite_logits=True)
    (over,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(over, apart)
    exact = both(z.double(), v.double(), y)[1]
    assert rel_max(apart, exact) <= 2.0**-8


def test_t08_disjoint_supports_and_a_range_of_a_thousand() -> None:
    z = torch.linspace(-500, 500, V).repeat(4, 1)
    for name in ("generalized_jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"):
        loss, d = both(
            z, z.flip(1), torch.zeros(4, dtype=torch.int64), divergence=name, routing="soft"
        )
        assert loss.isfinite() and d.isfinite().all(), name


@pytest.mark.parametrize("name", list(bg.divergences.registry))
def test_t09_columns_masked_in_both_models_change_nothing(name: str) -> None:
    z, v, y = torch.randn(8, V), torch.randn(8, V), torch.randint(V, (8,))
    mask = torch.full((8, 7), -math.inf)
    loss, d = both(z, v, y, divergence=name)
    masked, d_masked = both(torch.cat([z, mask], 1), torch.cat([v, mask], 1), y, divergence=name,
                            routing=fixed_entropy(V))  # fmt: skip
    torch.testing.assert_close(masked, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(d_masked[:, :V], d, rtol=1e-4, atol=1e-7)
    assert not d_masked[:, V:].any()


def fixed_entropy(vocab: int, gamma: float = 0.1) -> bg.routing.Policy:
    """The entropy policy for a vocabulary of which ``vocab`` columns are not masked."""
    top = vocab ** (1 - gamma) - 1

    def weights(s: bg.RowStats) -> tuple[Tensor, Tensor]:
        soft = (torch.expm1(s.power_sum(0.0, gamma)) / top).clamp(0, 1)
        return 1 - soft, soft

    return bg.routing.Policy("entropy", weights, (bg.Tilt(0.0, gamma),))


def test_t09_a_column_that_only_the_student_masks() -> None:
    z, v = torch.randn(2, V), torch.randn(2, V)
    z[:, 5] = -math.inf
    v[0, 5] = -math.inf
    loss, d = both(z, v, torch.zeros(2, dtype=torch.int64), routing="soft", reduction="none")
    assert loss[0].isfinite() and loss[1] == math.inf and d[0].isfinite().all()


def test_t09b_entropy_of_a_one_hot_row() -> None:
    v = torch.full((2, V), -math.inf)
    v[:, 3] = 0.0
    z = torch.randn(2, V, requires_grad=True)
    loss = bg.hybrid_distillation(z, bg.LogitsTeacher(v), "teacher_argmax")
    loss.backward()
    assert z.grad is not None and loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("name", list(bg.divergences.registry))
def test_t10_nothing_to_learn_is_zero(name: str) -> None:
    loss, d = both(torch.randn(3, V), torch.randn(3, V), torch.full((3,), -100), divergence=name)
    assert loss == 0 and not d.any()


@pytest.mark.parametrize("bad", [V, -1, 10**9])
def test_t11_a_label_out_of_range_never_looks_plausible(bad: int) -> None:
    z, v, y = torch.randn(2, V), torch.randn(2, V), torch.tensor([0, bad])
    with pytest.raises(ValueError, match=f"got {bad}"):
        both(z, v, y)
    # Where looking would wait for the device, the row must come out as NaN instead.
    torch._dynamo.reset()

    def rows(z: Tensor) -> Tensor:
        return bg.hybrid_distillation(z, bg.LogitsTeacher(v), y, reduction="none")

    loss = torch.compile(rows, backend="eager")(z)
    assert loss[0].isfinite() and loss[1].isnan()


def test_t12_micro_batches_equal_one_batch() -> None:
    t = pair(1.0)
    t["y"][[1, 2, 3, 9]] = -100
    whole = run(t)
    items = int((t["y"] != -100).sum())
    parts = [slice(0, 4), slice(4, 5), slice(5, 20), slice(20, N)]
    cut = [run(t | {n: t[n][p] for n in ("x", "h", "y")}, num_items=items) for p in parts]
    torch.testing.assert_close(sum(c[0] for c in cut), whole[0])
    torch.testing.assert_close(torch.cat([c[1] for c in cut]), whole[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(sum(c[2] for c in cut), whole[2], rtol=1e-5, atol=1e-7)


def test_t13_defaults_are_the_documented_formula() -> None:
    t = pair(1.0)
    z, v = t["x"] @ t["w"].t(), t["h"] @ t["w_t"].t()
    lp, lq = F.log_softmax(z, -1), F.log_softmax(v, -1)
    soft = ((lq * 0.1).exp().sum(-1) - 1) / (V**0.9 - 1)
    kl = (lq.exp() * (lq - lp)).sum(-1)
    ce = F.cross_entropy(z, t["y"], reduction="none")
    torch.testing.assert_close(run(t)[0], ((1 - soft) * ce + soft * kl).mean())


def test_t14_both_terms_reach_the_gradient() -> None:
    t = pair(1.0)
    hard, soft = (run(t, routing=name)[1] for name in ("hard", "soft"))
    mixed = run(t, routing=bg.routing.additive(0.3, 0.7))[1]
    torch.testing.assert_close(mixed, 0.3 * hard + 0.7 * soft, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_t15_squared_temperature_in_value_and_gradient(temperature: float) -> None:
    t = {n: x.double() if n != "y" else x for n, x in pair(1.0).items()}
    options = {"routing": "soft", "temperature": temperature}
    direction = torch.randn(N, D, dtype=torch.float64)
    ahead, behind = (run(t | {"x": t["x"] + s * 1e-5 * direction}, **options)[0] for s in (1, -1))
    slope = (run(t, **options)[1] * direction).sum()
    torch.testing.assert_close(slope, (ahead - behind) / 2e-5, rtol=1e-6, atol=0)
    plain = temperature**2 * F.kl_div(
        F.log_softmax(t["x"] @ t["w"].t() / temperature, -1),
        F.softmax(t["h"] @ t["w_t"].t() / temperature, -1),
        reduction="batchmean",
    )
    torch.testing.assert_close(run(t, **options)[0], plain)


def test_t16_scale_and_softcap_are_not_dropped() -> None:
    t = pair(1.0, scale=20.0)
    ours = run(t, logit_scale=0.0625, logit_softcap=3.0)
    x, w = (t[n].double().requires_grad_() for n in "xw")
    z = 3.0 * torch.tanh(0.0625 * (x @ w.t()) / 3.0)
    loss = oracle.hybrid_loss(z, t["h"].double() @ t["w_t"].double().t(), t["y"])
    for a, b in zip(ours, (loss, *torch.autograd.grad(loss, (x, w))), strict=True):
        assert rel_max(a, b) < 1e-5


def test_t17_a_teacher_of_another_width() -> None:
    t = pair(1.0) | {"h": torch.randn(N, 3 * D + 1), "w_t": torch.randn(V, 3 * D + 1)}
    for a, b in zip(run(t), dense(t), strict=True):
        assert rel_max(a, b) < 1e-5


@pytest.mark.parametrize("value", [0.0, -30.0, 1e4])
def test_t18_padding_of_the_teacher_changes_nothing(value: float) -> None:
    z, v, y = torch.randn(8, V), torch.randn(8, V), torch.randint(V, (8,))
    padded = torch.cat([v, torch.full((8, 28), value)], 1)
    for a, b in zip(both(z, padded, y), both(z, v, y), strict=True):
        assert torch.equal(a, b)


def test_t18_padding_of_the_student_changes_nothing_where_vocab_size_says_so() -> None:
    z, v, y = torch.randn(8, V), torch.randn(8, V), torch.randint(V, (8,))
    padded = torch.cat([z, torch.randn(8, 28) * 9], 1)
    loss, d = both(padded, v, y, vocab_size=V)
    reference, expected = both(z, v, y)
    assert torch.equal(loss, reference) and torch.equal(d[:, :V], expected)
    assert not d[:, V:].any()


def test_t20_expanded_upstream_gradients_and_t21_views() -> None:
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


def test_t22_logits_that_others_use_are_left_alone() -> None:
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


def test_t23_more_elements_than_int32_can_count() -> None:
    rows, vocab = 70_000, 31_000
    z = torch.randn(1, vocab).expand(rows, vocab)
    v = torch.randn(1, vocab).expand(rows, vocab)
    y = torch.full((rows,), -100)
    y[[0, 1, rows - 1]] = 7
    assert z.numel() > 2**31
    with torch.no_grad():
        loss = bg.hybrid_distillation(z, bg.LogitsTeacher(v), y, reduction="none")
    assert loss[0] == loss[1] == loss[-1] != 0 and not loss[2:-1].any()


def test_t26_autocast_casts_like_a_linear_layer() -> None:
    t = pair(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, dx, dw = run(t)
    exact = dense(t)
    assert loss.dtype == dx.dtype == dw.dtype == torch.float32
    assert rel_max(dx, exact[1]) < 2e-2 and abs(projection(dw, exact[2]) - 1) < 1e-2


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
def test_t24_nothing_waits_for_a_device(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A meta tensor has no values: whatever would copy one to the host raises.
    monkeypatch.setitem(planner.COST, "meta", planner.COST["cuda"])
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    t = {n: x.to("meta") for n, x in pair(1.0).items()}
    for divergence in bg.divergences.registry:
        ours = run(t, divergence=divergence, backend="eager", num_items=t["y"].sum(), **options)
        assert [x.device.type for x in ours] == ["meta"] * 3


@pytest.mark.gpu
def test_t27_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    t = {n: x.to("cuda:1") for n, x in pair(1.0).items()}
    for a, b in zip(run(t), run({n: x.cpu() for n, x in t.items()}), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-5)
