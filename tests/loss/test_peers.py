"""What breaks elsewhere, by number: each test is a defect that users of similar losses reported.

T20 and later are in ``test_peers_torch.py``; T25 (compiled graphs) is in ``test_compile.py``; T24
and T27 need a GPU (``test_triton_gpu.py``); T28 (sharded and tied heads) is in ``test_dtensor.py``
and ``test_distributed.py``.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import bgkernels as bg
from tests import oracle
from tests.conftest import Tiling
from tests.peers import (
    EPS,
    NEAR,
    ULP,
    D,
    N,
    V,
    both,
    dense,
    of_narrow_tiles,
    of_rounded_logits,
    pair,
    run,
)
from tests.problems import WIDEN, ways
from tests.yardstick import rel_max


@pytest.mark.parametrize("noise", [1.0, 0.03, 0.005])
@pytest.mark.parametrize("scale", [1.0, 8.0, 64.0, 640.0])
def test_nearly_equal_models_and_large_logits(noise: float, scale: float) -> None:
    """What rounding the logits to fp32 does to the gradient is all that goes wrong.

    Where the models share no token the gradient vanishes, and the rounding of its terms remains:
    their sum over a row is below 3 / N.
    """
    t, options = pair(noise, scale), {"divergence": "generalized_jsd", "routing": "soft"}
    ours, ref, rounded = (f(t, **options) for f in (run, dense, of_rounded_logits))
    for a, b, c, factor in zip(ours[1:], ref[1:], rounded, (t["w"], t["x"]), strict=True):
        bound = 4 * (c - b).abs().max() + 4 * EPS * factor.abs().max() / N
        assert (a - b).abs().max() <= bound
    t = {n: x.double() if n != "y" else x for n, x in t.items()}
    exact = run(t, backend="eager", **options)
    assert (exact[1] - ref[1]).abs().max() < 1e-8 * ref[1].abs().max() + 1e-14 * scale


@pytest.mark.parametrize("p", [0.99, 0.999, 0.99999])
def test_gradient_of_a_well_known_label(p: float) -> None:
    logits = torch.zeros(1, V)
    logits[0, 3] = math.log(p / (1 - p) * (V - 1))
    _, d = both(logits, torch.randn(1, V), torch.tensor([3]), routing="hard")
    z = logits.double()
    exact = F.softmax(z, -1)[0, 3] - 1
    rest = -F.softmax(z, -1)[0].sum().sub(F.softmax(z, -1)[0, 3])
    assert abs(d[0, 3].item() / rest.item() - 1) < NEAR
    assert abs(exact.item() / rest.item() - 1) < 1e-9


@pytest.mark.parametrize("multiplied", ways("bf16"), indirect=True)
def test_dw_error_is_independent_of_chunks(multiplied: str, tiling: Tiling) -> None:
    """It is rounded once, and where products are narrow, so are the tiles that it is made of."""
    t = pair(1.0, dtype=torch.bfloat16)
    reference = dense(t)[2]
    bound = (ULP + N * EPS) * reference.abs().max()
    bound += of_narrow_tiles(t)[1] if multiplied != WIDEN else 0.0
    for chunk in (24, 12, 3, 1):
        tiling(chunk=chunk, width=256, kept=2)
        assert (run(t)[2] - reference).abs().max() <= bound


@pytest.mark.parametrize("mode", ["auto", "recompute"])
def test_none_takes_each_tokens_upstream_gradient(mode: str) -> None:
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
    assert rel_max(x.grad, exact.grad) < NEAR


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jeffreys", "generalized_jsd"])
def test_a_divergence_is_never_negative(name: str) -> None:
    z = torch.randn(64, V) * 5
    loss, d = both(z, z + 1e-4 * torch.randn(64, V), torch.zeros(64, dtype=torch.int64),
                   divergence=name, routing="soft", reduction="none")  # fmt: skip
    assert (loss >= 0).all() and d.abs().sum() > 0


@pytest.mark.parametrize("name", list(bg.divergences.registry))
def test_low_temperature_keeps_gradients_finite(name: str) -> None:
    z, v = torch.randn(8, V) * 3, torch.randn(8, V) * 3
    loss, d = both(z, v, torch.zeros(8, dtype=torch.int64), divergence=name, temperature=0.05)
    assert loss.isfinite() and d.isfinite().all()


def test_gradients_over_bf16_logits_are_rounded_once() -> None:
    z, v = torch.randn(16, V).bfloat16(), torch.randn(16, V).bfloat16()
    y = torch.randint(V, (16,))
    _, apart = both(z, v, y)
    again = z.clone().requires_grad_()
    leaf = again * 1  # overwriting a leaf's memory would lose the caller's values
    loss = bg.hybrid_distillation(leaf, bg.LogitsTeacher(v), y, overwrite_logits=True)
    (over,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(over, apart)
    exact = both(z.double(), v.double(), y)[1]
    assert rel_max(apart, exact) <= 2 * ULP


def test_disjoint_supports_and_a_range_of_a_thousand() -> None:
    z = torch.linspace(-500, 500, V).repeat(4, 1)
    for name in ("generalized_jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"):
        loss, d = both(
            z, z.flip(1), torch.zeros(4, dtype=torch.int64), divergence=name, routing="soft"
        )
        assert loss.isfinite() and d.isfinite().all(), name


@pytest.mark.parametrize("name", list(bg.divergences.registry))
def test_columns_masked_in_both_models_change_nothing(name: str) -> None:
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


def test_a_column_that_only_the_student_masks() -> None:
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
def test_nothing_to_learn_is_zero(name: str) -> None:
    loss, d = both(torch.randn(3, V), torch.randn(3, V), torch.full((3,), -100), divergence=name)
    assert loss == 0 and not d.any()


@pytest.mark.parametrize("bad", [V, -1, 10**9])
def test_a_label_out_of_range_never_looks_plausible(bad: int) -> None:
    z, v, y = torch.randn(2, V), torch.randn(2, V), torch.tensor([0, bad])
    with pytest.raises(ValueError, match=f"got {bad}"):
        both(z, v, y)


def test_a_label_that_could_not_be_refused_is_nan() -> None:
    """Where looking would wait for the device, as in a compiled graph."""
    z, v, y = torch.randn(3, V), torch.randn(3, V), torch.tensor([0, V, -1])
    torch._dynamo.reset()

    def rows(z: Tensor) -> Tensor:
        return bg.hybrid_distillation(z, bg.LogitsTeacher(v), y, reduction="none")

    loss = torch.compile(rows, backend="eager")(z)
    assert loss.isnan().tolist() == [False, True, True]


def test_micro_batches_equal_one_batch() -> None:
    t = pair(1.0)
    t["y"][[1, 2, 3, 9]] = -100
    whole = run(t)
    items = int((t["y"] != -100).sum())
    parts = [slice(0, 4), slice(4, 5), slice(5, 20), slice(20, N)]
    cut = [run(t | {n: t[n][p] for n in ("x", "h", "y")}, num_items=items) for p in parts]
    torch.testing.assert_close(sum(c[0] for c in cut), whole[0])
    torch.testing.assert_close(torch.cat([c[1] for c in cut]), whole[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(sum(c[2] for c in cut), whole[2], rtol=1e-5, atol=1e-7)


def test_defaults_are_the_documented_formula() -> None:
    t = pair(1.0)
    z, v = t["x"] @ t["w"].t(), t["h"] @ t["w_t"].t()
    lp, lq = F.log_softmax(z, -1), F.log_softmax(v, -1)
    soft = ((lq * 0.1).exp().sum(-1) - 1) / (V**0.9 - 1)
    kl = (lq.exp() * (lq - lp)).sum(-1)
    ce = F.cross_entropy(z, t["y"], reduction="none")
    torch.testing.assert_close(run(t)[0], ((1 - soft) * ce + soft * kl).mean())


def test_both_terms_reach_the_gradient() -> None:
    t = pair(1.0)
    hard, soft = (run(t, routing=name)[1] for name in ("hard", "soft"))
    mixed = run(t, routing=bg.routing.additive(0.3, 0.7))[1]
    torch.testing.assert_close(mixed, 0.3 * hard + 0.7 * soft, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_squared_temperature_in_value_and_gradient(temperature: float) -> None:
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


def test_scale_and_softcap_are_not_dropped() -> None:
    t = pair(1.0, scale=20.0)
    ours = run(t, logit_scale=0.0625, logit_softcap=3.0)
    x, w = (t[n].double().requires_grad_() for n in "xw")
    z = 3.0 * torch.tanh(0.0625 * (x @ w.t()) / 3.0)
    loss = oracle.hybrid_loss(z, t["h"].double() @ t["w_t"].double().t(), t["y"])
    for a, b in zip(ours, (loss, *torch.autograd.grad(loss, (x, w))), strict=True):
        assert rel_max(a, b) < NEAR


def test_a_teacher_of_another_width() -> None:
    t = pair(1.0) | {"h": torch.randn(N, 3 * D + 1), "w_t": torch.randn(V, 3 * D + 1)}
    for a, b in zip(run(t), dense(t), strict=True):
        assert rel_max(a, b) < NEAR


@pytest.mark.parametrize("value", [0.0, -30.0, 1e4])
def test_padding_of_the_teacher_changes_nothing(value: float) -> None:
    z, v, y = torch.randn(8, V), torch.randn(8, V), torch.randint(V, (8,))
    padded = torch.cat([v, torch.full((8, 28), value)], 1)
    for a, b in zip(both(z, padded, y), both(z, v, y), strict=True):
        assert torch.equal(a, b)


def test_padding_of_the_student_changes_nothing_where_vocab_size_says_so() -> None:
    z, v, y = torch.randn(8, V), torch.randn(8, V), torch.randint(V, (8,))
    padded = torch.cat([z, torch.randn(8, 28) * 9], 1)
    loss, d = both(padded, v, y, vocab_size=V)
    reference, expected = both(z, v, y)
    assert torch.equal(loss, reference) and torch.equal(d[:, :V], expected)
    assert not d[:, V:].any()
