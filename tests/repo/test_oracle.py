"""The oracle against facts that it does not share: torch's losses, limits, closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import oracle
from tests.yardstick import rel_max

INF = float("inf")
LABELS = torch.tensor([[1, 4, -100, 0], [2, -100, 6, 6]])

# Each divergence at its defaults and at every branch of its formula.
CASES = [(name, {}) for name in oracle.DIVERGENCES]
CASES += [("generalized_jsd", {"beta": x}) for x in (0.1, 0, 1)]
CASES += [("skew_forward_kl", {"lam": 0.0}), ("skew_reverse_kl", {"lam": 0.0})]
CASES += [("renyi", {"alpha": 2.0}), ("renyi", {"alpha": 1})]
CASES += [("adaptive_kl", {"mu": 2.0, "detach": True})]
LIMITS = [(1, 0), (0, 1), (0.5, 0), (0, -0.5), (0.5, -0.5), (0, 0)]
CASES += [("alpha_beta", {"alpha": a, "beta": b}) for a, b in [*LIMITS, (0.4, -0.2), (2, 1)]]
every_divergence = pytest.mark.parametrize(("name", "params"), CASES)


def logits(*shape: int, seed: int = 0, std: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(*shape, generator=generator, dtype=torch.float64)


def pair(rows: int = 5, vocab: int = 37, std: float = 2.0) -> tuple[Tensor, Tensor]:
    z, t = (logits(rows, vocab, seed=seed, std=std) for seed in (1, 2))
    return z.requires_grad_(), t


def divergence(name: str, z: Tensor, t: Tensor, **params: object) -> Tensor:
    return oracle.DIVERGENCES[name](z.log_softmax(-1), t.log_softmax(-1), **params)


def grad(loss: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), z, retain_graph=True)[0]


def closed_form(name: str, p: Tensor, q: Tensor, params: dict[str, float]) -> Tensor:
    """dD/dz of the table of the method's formulas: p teacher, q student."""

    def dot(x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)

    ratio, beta, lam = (q / p).log(), params.get("beta", 0.5), params.get("lam", 0.1)
    forward, backward = dot(p * -ratio), dot(q * ratio)
    d_forward, d_backward = q - p, q * (ratio - backward)
    if name in ("forward_kl", "reverse_kl", "jeffreys"):
        return (name != "reverse_kl") * d_forward + (name != "forward_kl") * d_backward
    if name == "alpha_beta":
        a, b = params.get("alpha", 0.2), params.get("beta", 0.7)
        h = q**b * (ratio if a == 0 else (q**a - p**a) / a)
        return h - q * dot(h)
    if name == "skew_forward_kl":
        m = lam * p + (1 - lam) * q
        return (1 - lam) * q * (dot(p * q / m) - p / m)
    if name == "skew_reverse_kl":
        m = (1 - lam) * p + lam * q
        r = (q / m).log() - lam * q / m
        return q * (r - dot(q * r))
    if name == "total_variation":
        sign = (q - p).sign()
        return q * (sign - dot(q * sign)) / 2
    if name == "generalized_jsd":
        inner = (q / (beta * p + (1 - beta) * q)).log()
        inside = (1 - beta) * q * (inner - dot(q * inner))
        return {0: d_forward, 1: d_backward}.get(beta, inside)
    if name == "renyi":
        tilt = p ** params.get("alpha", 0.5) * q ** (1 - params.get("alpha", 0.5))
        return q - tilt / dot(tilt)
    assert name == "adaptive_kl", f"no closed form for {name}"
    mu, entropy_p, entropy_q = params.get("mu", 0.5), -dot(p * p.log()), -dot(q * q.log())
    h = torch.sigmoid(mu * (entropy_q - entropy_p))
    through_h = -h * (1 - h) * mu * (forward - backward) * q * (q.log() + entropy_q)
    return h * d_forward + (1 - h) * d_backward + (0 if params.get("detach") else through_h)


@every_divergence
@pytest.mark.parametrize("vocab", [3, 257])
def test_gradients_equal_the_closed_forms(name: str, params: dict[str, float], vocab: int) -> None:
    z, t = pair(vocab=vocab, std=1.5)
    expected = closed_form(name, t.softmax(-1), z.detach().softmax(-1), params)
    assert rel_max(grad(divergence(name, z, t, **params), z), expected) < 1e-10


@every_divergence
def test_divergences_are_non_negative_and_zero_at_equality(
    name: str, params: dict[str, float]
) -> None:
    z, t = pair(rows=64, vocab=11)
    assert (divergence(name, z, t, **params) > 1e-6).all()
    same = divergence(name, z, z.detach(), **params)
    assert max(same.abs().max(), grad(same, z).abs().max()) < 1e-13


def test_kls_equal_torch() -> None:
    z, t = pair()
    lp_s, lp_t = z.log_softmax(-1), t.log_softmax(-1)
    kl_ts = F.kl_div(lp_s, lp_t, reduction="none", log_target=True).sum(-1)
    kl_st = F.kl_div(lp_t, lp_s, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(oracle.forward_kl(lp_s, lp_t), kl_ts)
    torch.testing.assert_close(oracle.reverse_kl(lp_s, lp_t), kl_st)
    torch.testing.assert_close(oracle.jeffreys(lp_s, lp_t), kl_ts + kl_st)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_hard_loss_equals_torch(smoothing: float) -> None:
    z = logits(2, 4, 9).requires_grad_()
    ours = oracle.hybrid_loss(z, z.detach(), LABELS, routing="hard", label_smoothing=smoothing)
    theirs = F.cross_entropy(z.reshape(-1, 9), LABELS.reshape(-1), label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grad(ours, z), grad(theirs, z))


@pytest.mark.parametrize(
    ("name", "params", "factor", "limit"),
    [
        ("generalized_jsd", {"beta": 1e-7}, 1e7, "forward_kl"),
        ("generalized_jsd", {"beta": 1 - 1e-7}, 1e7, "reverse_kl"),
        ("skew_forward_kl", {"lam": 1e-7}, 1, "forward_kl"),
        ("skew_reverse_kl", {"lam": 1e-7}, 1, "reverse_kl"),
        ("renyi", {"alpha": 1 + 1e-6}, 1, "forward_kl"),
        ("renyi", {"alpha": 1e-6}, 1e6, "reverse_kl"),
    ],
)
def test_limits_are_the_kls(name: str, params: dict[str, float], factor: float, limit: str) -> None:
    z, t = pair(std=1.0)
    got, expected = factor * divergence(name, z, t, **params), divergence(limit, z, t)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    assert rel_max(grad(got, z), grad(expected, z)) < 1e-4


@pytest.mark.parametrize("at", LIMITS)
def test_alpha_beta_is_continuous(at: tuple[float, float]) -> None:
    z, t = pair(std=1.0)
    expected = divergence("alpha_beta", z, t, alpha=at[0], beta=at[1])
    for da, db in [(1e-5, 3e-5), (-3e-5, 1e-5)]:
        got = divergence("alpha_beta", z, t, alpha=at[0] + da, beta=at[1] + db)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)
        assert rel_max(grad(got, z), grad(expected, z)) < 1e-3


def test_symmetries() -> None:
    z, t = pair()
    a, b = {"beta": 0.3}, {"beta": 0.7}
    c, d = {"alpha": 0.3, "beta": 0.6}, {"alpha": 0.6, "beta": 0.3}
    cases = [("generalized_jsd", a, b), ("alpha_beta", c, d), ("total_variation", {}, {})]
    for name, here, there in cases:
        torch.testing.assert_close(divergence(name, z, t, **here), divergence(name, t, z, **there))


@every_divergence
def test_columns_that_neither_model_has_change_nothing(name: str, params: dict[str, float]) -> None:
    z, t = pair(vocab=6)
    masked = torch.full((5, 2), -INF, dtype=torch.float64)
    wide = torch.cat([z.detach(), masked], -1).requires_grad_()
    short = divergence(name, z, t, **params)
    long = divergence(name, wide, torch.cat([t, masked], -1), **params)
    torch.testing.assert_close(long, short, rtol=1e-13, atol=1e-15)
    assert rel_max(grad(long, wide), F.pad(grad(short, z), (0, 2))) < 1e-13


def test_a_column_that_only_the_teacher_has_makes_the_kls_infinite() -> None:
    z, t = pair(rows=1, vocab=4)
    z = z.detach().index_fill(1, torch.tensor([2]), -INF).requires_grad_()
    assert divergence("forward_kl", z, t) == INF
    finite = ["generalized_jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation", "renyi"]
    for name in [*finite, "alpha_beta", "reverse_kl"]:
        value = divergence(name, z, t)
        assert value.isfinite() and grad(value, z).isfinite().all(), name
    t = t.index_fill(1, torch.tensor([2]), -INF)
    assert grad(divergence("forward_kl", z, t), z).isfinite().all()


def test_disjoint_supports_and_wide_ranges() -> None:
    z, t = (torch.tensor([[0.0, x, -1e4]], dtype=torch.float64) for x in (-1e3, 1e3))
    z.requires_grad_()
    assert divergence("total_variation", z, t) == 1
    torch.testing.assert_close(divergence("generalized_jsd", z, t).item(), math.log(2))
    for name in oracle.DIVERGENCES:
        value = divergence(name, z, t)
        assert value.isfinite() and grad(value, z).isfinite().all(), name


@pytest.mark.parametrize("routing", ["hard", "soft", "entropy"])
def test_a_bad_logit_is_never_hidden(routing: str) -> None:
    for bad, student in [(math.nan, True), (math.nan, False), (INF, True), (INF, False)]:
        z, t = logits(2, 4, 9), logits(2, 4, 9, seed=3)
        (z if student else t)[0, 1, 5] = bad
        loss = oracle.hybrid_loss(z, t, LABELS, routing=routing, reduction="none")
        assert loss.isnan().nonzero().tolist() == [[0, 1]]


def test_bad_logits_at_ignored_tokens_do_not_matter() -> None:
    z, t = logits(2, 4, 9), logits(2, 4, 9, seed=3)
    clean = oracle.hybrid_loss(z, t, LABELS)
    z[0, 2], t[1, 1] = math.nan, INF
    loss = oracle.hybrid_loss(z.requires_grad_(), t, LABELS)
    dz = grad(loss, z)
    assert loss == clean
    assert dz.isfinite().all() and not dz[0, 2].any() and dz[0, 1].any()


@pytest.mark.parametrize("routing", [name for name in oracle.POLICIES if name != "curriculum"])
def test_all_ignored_and_empty_give_zero(routing: str) -> None:
    for shape in ((2, 3), (0,), (0, 3), (2, 0)):
        z = logits(*shape, 7).requires_grad_()
        target = torch.full(shape, -100)
        for reduction in ("mean", "sum", "none"):
            loss = oracle.hybrid_loss(z, z.detach(), target, routing=routing, reduction=reduction)
            assert loss.shape == (shape if reduction == "none" else ()) and not loss.any()
            assert not grad(loss, z).any()


def test_padded_vocabularies() -> None:
    z, t = logits(2, 4, 9), logits(2, 4, 9, seed=3)
    more = {"routing": "entropy", "temperature": 2.0, "divergence": "jeffreys"}
    plain = oracle.hybrid_loss(z, t, LABELS, **more)
    z_wide = torch.cat([z, logits(2, 4, 3)], -1).requires_grad_()
    t_wide = torch.cat([t, logits(2, 4, 5)], -1)
    assert oracle.hybrid_loss(z, t_wide, LABELS, **more) == plain
    cut = oracle.hybrid_loss(z_wide, t_wide, LABELS, vocab_size=9, **more)
    assert cut == plain and not grad(cut, z_wide)[..., 9:].any()
    # Without vocab_size the cross-entropy alone sees the student's own padding.
    hard, soft = (oracle.hybrid_loss(z_wide, t, LABELS, routing=name) for name in ("hard", "soft"))
    torch.testing.assert_close(hard, F.cross_entropy(z_wide.reshape(-1, 12), LABELS.reshape(-1)))
    assert soft == oracle.hybrid_loss(z, t, LABELS, routing="soft")


def test_reductions_weights_and_normaliser() -> None:
    z, t, weight = logits(2, 4, 9), logits(2, 4, 9, seed=3), torch.rand(2, 4).double()
    parts = {"routing": "static", "routing_params": {"w": 0.3}, "temperature": 2.0}
    loss = oracle.hybrid_loss(z, t, LABELS, reduction="none", z_loss=1e-2, **parts)
    stats = oracle.row_stats(z, t, LABELS, temperature=2.0)
    terms = 0.7 * stats["nll"] + 0.3 * 4 * stats["kl_ts"] + 1e-2 * stats["lse_hard"] ** 2
    torch.testing.assert_close(loss, terms * (LABELS != -100))
    total = oracle.hybrid_loss(z, t, LABELS, reduction="sum", z_loss=1e-2, **parts)
    torch.testing.assert_close(total, loss.sum())
    mean = oracle.hybrid_loss(z, t, LABELS, z_loss=1e-2, **parts)
    torch.testing.assert_close(mean, loss.sum() / 6)
    parts |= {"token_weight": weight, "z_loss": 1e-2, "num_items": 10}
    weighted = oracle.hybrid_loss(z, t, LABELS, **parts)
    torch.testing.assert_close(weighted, (loss * weight).sum() / 10)


def test_temperature_is_that_of_the_soft_term_which_its_square_scales() -> None:
    z, t = logits(1, 50), logits(1, 50, seed=3)
    soft = 4 * F.kl_div((z / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="sum")
    hard, c = F.cross_entropy(z, t.argmax(-1)), t.softmax(-1).max()
    for routing, expected in {"soft": soft, "confidence": c * hard + (1 - c) * soft}.items():
        ours = oracle.hybrid_loss(z, t, "teacher_argmax", routing=routing, temperature=2.0)
        torch.testing.assert_close(ours, expected)


def test_real_logits() -> None:
    h, w, b = logits(3, 5), logits(8, 5, seed=1), logits(8, seed=2)
    torch.testing.assert_close(oracle.real_logits(h, w, b), F.linear(h, w, b))
    y = 0.25 * F.linear(h, w, b)
    capped = oracle.real_logits(h, w, b, 0.25, 3.0)
    torch.testing.assert_close(capped, 3 * ((2 * y / 3).exp() - 1) / ((2 * y / 3).exp() + 1))
    assert (capped.abs() < 3).all()


def weights(routing: str, z: Tensor, t: Tensor, target: Tensor, **params: object) -> Tensor:
    row = oracle._rows(z, t, target, (-100, None, True))
    return torch.stack(oracle.POLICIES[routing](row, **params)[:2])


def test_policies_on_a_row_of_known_probabilities() -> None:
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25] * 4, [1.0, 0, 0, 0]], dtype=torch.float64)
    t, z, y = p.log(), logits(3, 4), torch.tensor([1, 2, 0])
    q = z.softmax(-1).gather(1, y[:, None])[:, 0]
    power = (p.sqrt().sum(-1) - 1) / (4**0.5 - 1)
    shannon = torch.tensor([1.75 / 2, 1, 0], dtype=torch.float64)
    gate = torch.sigmoid(20 * (shannon - 0.5))
    ratio = q.log() / torch.tensor([math.log(0.25), math.log(0.25), -1e-8]).double()
    omega = torch.exp(-ratio.clamp(-10, 10))
    one = torch.ones(3, dtype=torch.float64)
    top = torch.tensor([1.0, 1, 0]).double()  # ceil(0.4 * 3) = 2 of the three rows
    label, largest = torch.tensor([[0.25, 0.25, 1], [0.5, 0.25, 1]]).double()
    for routing, params, hard, soft in [
        ("static", {"w": 0.3}, 0.7 * one, 0.3 * one),
        ("additive", {"hard": 2.0, "soft": 3.0}, 2 * one, 3 * one),
        ("confidence", {}, label, 1 - label),
        ("confidence", {"kind": "max"}, largest, 1 - largest),
        ("entropy", {"gamma": 0.5}, 1 - power, power),
        ("entropy", {"kind": "shannon"}, 1 - shannon, shannon),
        ("threshold", {}, 1 - gate, gate),
        ("top_entropy", {"fraction": 0.4}, 1 - top, top),
        ("weighted_soft", {"w": 0.2}, one, 0.2 * (1 - omega)),
        ("weighted_soft", {"inverted": True}, one, omega),
        ("reverse", {"policy": "confidence"}, 1 - label, label),
        ("curriculum", {"c": 0.3}, 0.7 * one, 0.3 * one),
        ("curriculum", {"c": 0.5, "policy": "entropy", "gamma": 0.5}, 1 - power / 2, power / 2),
    ]:
        got = weights(routing, z, t, y, **params)
        torch.testing.assert_close(got, torch.stack([hard, soft]), msg=lambda m, r=routing: r + m)


def test_weights_carry_no_gradient() -> None:
    z, t = logits(2, 4, 9).requires_grad_(), logits(2, 4, 9, seed=3)
    for name in oracle.POLICIES:
        params = {"c": 0.5} if name == "curriculum" else {}
        assert not weights(name, z, t, LABELS, **params).requires_grad, name


def risk_by_hand(z: Tensor, labels: list[list[int]], w: float, alpha: float, g: float) -> Tensor:
    """The chi-square objective as an occupancy objective, phi(x) = x - x^2 / 4, without algebra."""

    def phi(x: Tensor) -> Tensor:
        return x - x * x / 4

    data, ends, count = z.new_zeros(()), [], 0
    for row, sequence in zip(z, labels, strict=True):
        steps = [(x, y) for x, y in zip(row, sequence, strict=True) if y >= 0]
        count += len(steps)
        for t, (x, y) in enumerate(steps):
            value = x.exp().sum().log()
            after = steps[t + 1][0].exp().sum().log() if t + 1 < len(steps) else 0.0
            data = data + g**t * (phi(alpha * (x[y] - g * after)) / alpha - (value - g * after))
        if steps:
            k = 1 - g
            ends.append(g ** (len(steps) - 1) * (phi(alpha * k * value) / (alpha * k) - value))
    return -(1 - w) * (data / count + sum(ends) / len(ends))


def test_risk_guided_is_the_occupancy_objective() -> None:
    z, t = logits(3, 4, 9).requires_grad_(), logits(3, 4, 9, seed=3)
    labels = [[1, 4, -100, 0], [2, -100, 6, 6], [-100] * 4]
    params = {"w": 0.3, "alpha": 0.2, "gamma": 0.9}
    more = {"routing_params": params, "divergence": "jeffreys"}
    ours = oracle.hybrid_loss(z, t, torch.tensor(labels), routing="risk_guided", **more)
    soft = oracle.hybrid_loss(z, t, torch.tensor(labels), routing="soft", divergence="jeffreys")
    by_hand = risk_by_hand(z, labels, *params.values()) + 0.3 * soft
    torch.testing.assert_close(ours, by_hand)
    torch.testing.assert_close(grad(ours, z), grad(by_hand, z))


def test_risk_guided_without_discount_and_inside_a_curriculum() -> None:
    z, target = logits(1, 9), torch.tensor([4])
    more = {"routing": "risk_guided", "routing_params": {"w": 0.0, "alpha": 0.2, "gamma": 1.0}}
    expected = F.cross_entropy(z, target) + 0.05 * z[0, 4] ** 2
    torch.testing.assert_close(oracle.hybrid_loss(z, z, target, **more), expected)
    mixed = {"routing": "risk_guided", "routing_params": {"w": 0.3}}
    inner = {"routing": "curriculum", "routing_params": {"c": 0.3, "policy": "risk_guided", "w": 1}}
    loss, by_curriculum = (oracle.hybrid_loss(z, z, target, **x) for x in (mixed, inner))
    torch.testing.assert_close(loss, by_curriculum)


def test_row_stats() -> None:
    z, t = logits(2, 4, 12).requires_grad_(), logits(2, 4, 9, seed=3)
    stats = oracle.row_stats(z, t, LABELS, temperature=2.0, tilt=(0.4, 0.7), mixture=0.3)
    s, p = (torch.distributions.Categorical(logits=x[..., :9] / 2) for x in (z, t))
    mixed = torch.distributions.Categorical(probs=0.3 * p.probs + 0.7 * s.probs)
    kl, valid = torch.distributions.kl_divergence, LABELS != -100
    y, side = LABELS.clamp(min=0), {"s": (s, z[..., :9]), "t": (p, t)}
    expected: dict[str, Tensor] = {}
    for x, (law, of) in side.items():
        expected |= {f"entropy_{x}": law.entropy(), f"lse_{x}": (of / 2).exp().sum(-1).log()}
        expected |= {f"logp_{x}": law.log_prob(y) * valid, f"argmax_{x}": law.mode}
        expected |= {f"max_prob_{x}": law.probs.amax(-1)}
    nll = F.cross_entropy(z.transpose(1, 2), LABELS, reduction="none")
    sides = {"kl_ts": (p, s), "kl_st": (s, p), "kl_t_mix": (p, mixed), "kl_s_mix": (s, mixed)}
    expected |= {name: kl(*of) for name, of in sides.items()}
    expected |= {"lse_hard": z.exp().sum(-1).log(), "logit_mean": z.mean(-1), "nll": nll}
    expected |= {"label": LABELS, "valid": valid, "vocab": torch.tensor(9)}
    expected |= {"tilt": (s.probs**0.4 * p.probs**0.7).sum(-1).log()}
    expected |= {"tv": (s.probs - p.probs).abs().sum(-1) / 2}
    assert stats.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(stats[name], value, msg=lambda m, n=name: f"{n}: {m}")
    apart = oracle.row_stats(z, t, LABELS, temperature=3.0, single=2.0, tilt=(0.4, 0.7))
    other = oracle.row_stats(z, t, LABELS, temperature=3.0)
    pairs = {"lse_t": stats, "entropy_s": stats, "tilt": stats, "kl_ts": other, "tv": other}
    assert all(torch.equal(apart[name], alike[name]) for name, alike in pairs.items())
    tied = oracle.row_stats(torch.zeros(1, 5), torch.tensor([[0.0, 3, 3, 1, 3]]), "teacher_argmax")
    assert tied["argmax_t"] == tied["label"] == 1 and tied["argmax_s"] == 0


def test_gumbel_labels() -> None:
    assert oracle.philox2x32(0, 0, 0) == (0xFF1DAE59, 0x6CD10DF2)
    assert oracle.philox2x32(*[0xFFFFFFFF] * 3) == (0x2C3F628B, 0xAB4FD7AD)
    assert oracle.philox2x32(0x243F6A88, 0x85A308D3, 0x13198A2E) == (0xDD7CE038, 0xF62A4C12)
    p = torch.tensor([0.6, 0.0, 0.3, 0.1], dtype=torch.float64)
    share = oracle.gumbel_label(p.log().expand(4000, 4), seed=1 << 40).bincount(minlength=4) / 4000
    assert share[1] == 0 and (share - p).abs().max() < 0.03
    t = logits(3, 4, 20)
    whole = oracle.gumbel_label(t, seed=7)
    assert whole.shape == (3, 4)
    parts = [oracle.gumbel_label(t[i], seed=7, first_row=4 * i) for i in range(3)]
    assert torch.equal(whole, torch.stack(parts))
    assert not torch.equal(whole, oracle.gumbel_label(t, seed=8))
