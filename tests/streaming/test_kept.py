"""Kept tiles at four bytes a pair: what the coding keeps, what it refuses, and what a step sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.backends.native import coding as native
from bgkernels.backends.native import products
from bgkernels.backends.native.call import MISSING
from bgkernels.rows.arithmetic import SKIP
from bgkernels.rows.spec import Cap
from bgkernels.streaming import coding, driver, planner
from bgkernels.streaming.planner import Plan, Workload
from tests.conftest import Tiling
from tests.problems import DTYPES, Loss, labels, make, ways

if MISSING is None:
    from bgkernels.backends.native import _C

INF, NAN = math.inf, math.nan
HALF_UNIT = 2.0**-11
PLAIN = (Cap(), Cap())
CAPS = [
    PLAIN,
    (Cap(0.25), Cap(3.0)),
    (Cap(-1.0), Cap(-0.5)),
    (Cap(1.0, 30.0), Cap(-2.0, 50.0)),
]
SHAPES = [(1300, 1290), (1024, 1024), (700, 0), (37, 30), (1, 1)]
"""Columns of the student and of the teacher: blocks with and without a tail, none, padding."""


@pytest.fixture(params=["torch", *(_C.cpu_targets() if MISSING is None else ())])
def coder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The reference in torch, or the compiled functions of an instruction set."""
    if request.param == "torch":
        monkeypatch.setattr(native, "serves", lambda x: False)
        yield "torch"
        return
    before = _C.cpu_target()
    _C.set_cpu_target(request.param)
    yield str(request.param)
    _C.set_cpu_target(before)


def tiles(width: int, compared: int, gap: float = 0.1) -> tuple[Tensor, Tensor | None]:
    x = 5 * torch.randn(40, width)
    return x, x[:, :compared] + gap * torch.randn(40, compared) if compared else None


def coded(
    x: Tensor, v: Tensor | None, caps: coding.Caps = PLAIN, skipped: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor | None] | None:
    """The tiles after coding and decoding, or None where they are refused."""
    compared = 0 if v is None else v.shape[1]
    code = torch.full((len(x), coding.words(x.shape[1], compared)), NAN)
    chosen = torch.zeros(len(x), dtype=torch.long)
    chosen[list(skipped)] = SKIP
    if not coding.encode(x, v, caps, code, chosen):
        return None
    out = torch.full_like(x, NAN), None if v is None else torch.full_like(v, NAN)
    for teacher, (to, cap) in enumerate(zip(out, caps, strict=True)):
        if to is not None:
            coding.decode(code, compared, cap, bool(teacher), to, chosen)
    return out


@pytest.mark.parametrize("gap", [20.0, 0.1, 1e-3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("caps", CAPS)
def test_probabilities_and_differences_keep_eleven_bits(
    shape: tuple[int, int], caps: coding.Caps, gap: float, coder: str
) -> None:
    """The docstring's bounds, about the maximum of each block."""
    x, v = tiles(*shape, gap)
    found = coded(x, v, caps)
    assert found is not None
    assert torch.equal(found[0][:, shape[1] :], x[:, shape[1] :])
    if v is None or found[1] is None:
        return
    for first in range(0, shape[1], coding.BLOCK):
        block = slice(first, min(first + coding.BLOCK, shape[1]))
        pairs = [
            [y[:, block].double() * cap.scale for y in pair]
            for pair, cap in zip(((x, found[0]), (v, found[1])), caps, strict=True)
        ]
        distances = []
        for exact, ours in pairs:
            top = exact.amax(1, keepdim=True)
            wrong = (ours - top).exp() - (exact - top).exp()
            assert wrong.abs().max() <= HALF_UNIT / math.e * 1.01 + 1e-5
            distances.append((exact - top, ours - top))
        (u, ours_u), (w, ours_w) = distances
        slack = 1e-6 * (u.abs() + w.abs() + 100)  # logits are in fp32
        assert (((ours_u - ours_w) - (u - w)).abs() <= HALF_UNIT * (u - w).abs() + slack).all()


@pytest.mark.skipif(MISSING is not None, reason=f"no compiled module: {MISSING}")
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_codes_are_those_of_the_reference(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, v = tiles(*shape)
    x[3, ::3], x[5] = -INF, -INF
    if v is not None:
        v[3, ::2], v[5] = -INF, -INF
    codes, labels = [], torch.zeros(len(x), dtype=torch.long)
    for serves in (native.serves, lambda x: False):
        monkeypatch.setattr(native, "serves", serves)
        codes.append(torch.full((len(x), coding.words(*shape)), NAN))
        assert coding.encode(x, v, PLAIN, codes[-1], labels)
    assert torch.equal(*(code.view(torch.int16) for code in codes))


def test_columns_that_are_ruled_out_stay_so(coder: str) -> None:
    """By one model, by both, in all of a block, and in all of a row."""
    x, v = tiles(1100, 1090)
    assert v is not None
    x[1, 5:9], v[1, 7:11] = -INF, -INF
    x[2, :512], v[2, :512] = -INF, -INF
    x[3], v[4] = -INF, -INF
    x[5], v[5] = -INF, -INF
    found = coded(x, v)
    assert found is not None and found[1] is not None
    for exact, ours in zip((x, v), found, strict=True):
        assert torch.equal(exact == -INF, ours == -INF) and not ours.isnan().any()
    alone = found[0][1, 9:11], x[1, 9:11]
    torch.testing.assert_close(*alone, rtol=1e-2, atol=0)


FAULTS: dict[str, tuple[int, float]] = {
    "NaN of the student": (0, NAN),
    "NaN of the teacher": (1, NAN),
    "infinity of the student": (0, INF),
    "infinity of the teacher": (1, INF),
    "a student's logit too far below": (0, -7e4),
    "a teacher's logit too far below": (1, -7e4),
    "a maximum too far above": (0, 7e4),
    "the largest number": (1, torch.finfo(torch.float32).max),
    "the least number": (0, torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("column", [0, 513, 1089])
def test_what_fp16_cannot_say_is_refused(fault: str, column: int, coder: str) -> None:
    model, value = FAULTS[fault]
    pair = tiles(1100, 1090)
    tile = pair[model]
    assert tile is not None
    tile[7, column] = value
    assert coded(*pair) is None
    assert coded(*pair, skipped=(7,)) is not None, "nobody reads a row that takes no part"


def test_extremes_that_fp16_can_say_are_kept(coder: str) -> None:
    x, v = tiles(600, 600)
    assert v is not None
    x[1, 3] = v[1, 3] = -6e4  # of no probability in either
    x[2], v[2] = x[2] + 1e6, v[2] - 1e6
    found = coded(x, v)
    assert found is not None and found[1] is not None
    for exact, ours in zip((x, v), found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=0.1)


def test_logits_far_beyond_a_cap_are_refused(coder: str) -> None:
    x, v = tiles(600, 600)
    assert v is not None
    x[1, 3] = 130.0
    assert coded(x, v, (Cap(1.0, 30.0), Cap())) is None
    assert coded(x, v, (Cap(0.5, 30.0), Cap())) is not None
    assert coded(x, v, (Cap(-1.0, 30.0), Cap())) is not None


Coding = Callable[..., list[Plan]]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Coding:
    """``kept(chunk, width, count, coded)`` plans so many kept tiles; what it returns, it fills."""

    def force(chunk: int, width: int, count: int = 99, coded: bool = True) -> list[Plan]:
        plans: list[Plan] = []

        def plan(work: Workload, budget: int | None) -> Plan:
            tiles = -(-work.columns // width)
            held = min(count, tiles)
            slots = held - (work.reads == 1)
            twice = work.statistics and (work.backward or work.reads > 1)
            codes = slots * coded if work.codable and twice else 0
            plans.append(Plan(work.rows, work.columns, chunk, width, held, 0, coded=codes))
            return plans[-1]

        monkeypatch.setattr(driver, "plan", plan)
        driver.PLANS.clear()
        return plans

    return force


Heads = tuple[Tensor, Tensor, Tensor]
"""Hidden states, the student's head, the teacher's."""


def heads(gap: float, std: float = 3.0, dtype: torch.dtype = torch.bfloat16) -> Heads:
    rows, hidden, vocab = 96, 64, 3000
    w = torch.randn(vocab, hidden)
    noise = torch.randn(vocab, hidden)
    w_t = noise if gap >= 1 else w + gap * noise
    scale = std / math.sqrt(hidden)
    x, w, w_t = (t.to(dtype) for t in (torch.randn(rows, hidden), scale * w, scale * w_t))
    return x, w, w_t


def exact_gradients(data: Heads, temperature: float) -> tuple[Tensor, ...]:
    """Of the sum over tokens of the forward KL divergence, times T², in float64."""
    x, w, w_t = (t.double() for t in data)
    leaves = x.requires_grad_(), w.requires_grad_()
    student = (x @ w.t() / temperature).log_softmax(1)
    teacher = (x.detach() @ w_t.t() / temperature).log_softmax(1)
    loss = (teacher.exp() * (teacher - student)).sum() * temperature**2
    return torch.autograd.grad(loss, leaves)


def gradients(data: Heads, temperature: float = 1.0, **options: Any) -> tuple[Tensor, ...]:
    x, w, w_t = data
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    target = torch.zeros(len(x), dtype=torch.long)
    options = {"routing": "soft", "reduction": "sum", "temperature": temperature} | options
    loss = bg.linear_hybrid_distillation(*leaves, bg.LinearTeacher(x, w_t), target, **options)
    return torch.autograd.grad(loss, leaves)


def distances(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    pairs = zip(ours, exact, strict=True)
    return [float((x.double() - ref).norm() / ref.norm()) for x, ref in pairs]


def assert_as_exact_as_kept_in_fp32(
    data: Heads, temperature: float, kept: Coding, tilings: list[tuple[int, int, int]]
) -> None:
    exact = exact_gradients(data, temperature)
    for tiling in tilings:
        kept(*tiling, coded=False)
        plain = distances(gradients(data, temperature), exact)
        plans = kept(*tiling)
        for error, yard in zip(distances(gradients(data, temperature), exact), plain, strict=True):
            assert error <= max(1.1 * yard, 2.5e-3), (tiling, error, yard)
        assert all(p.coded for p in plans)


TILINGS = [(96, 512, 99), (96, 640, 3), (40, 1000, 99)]


@pytest.mark.parametrize("multiplied", ways("bf16"), indirect=True)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("std", [3.0, 12.0])
@pytest.mark.parametrize("gap", [1.0, 0.1, 0.01, 1e-3])
def test_the_gradient_is_as_exact_as_with_fp32_tiles(
    gap: float, std: float, temperature: float, multiplied: str, kept: Coding
) -> None:
    """However near the student is to its teacher."""
    assert_as_exact_as_kept_in_fp32(heads(gap, std), temperature, kept, TILINGS)


def _no_centre(real: Any) -> Any:
    def decode(
        code: Tensor, compared: int, cap: Cap, teacher: bool, out: Tensor, y: Tensor
    ) -> None:
        real(code, compared, cap, teacher, out, y)
        for columns, centres, *_ in coding.blocks(code, compared):
            out[:, columns] -= centres[:, int(teacher), None] / cap.scale

    return decode


def _flipped_gap(real: Any) -> Any:
    def decode(
        code: Tensor, compared: int, cap: Cap, teacher: bool, out: Tensor, y: Tensor
    ) -> None:
        flipped = code.clone()
        for *_, gap in coding.blocks(flipped, compared):
            gap.neg_()
        real(flipped, compared, cap, teacher, out, y)

    return decode


def _rounded_apart(real: Any) -> Any:
    """Both logits in fp16 each, as wide as a pair of differences."""

    def decode(
        code: Tensor, compared: int, cap: Cap, teacher: bool, out: Tensor, y: Tensor
    ) -> None:
        real(code, compared, cap, teacher, out, y)
        out.copy_(out.half())

    return decode


@pytest.mark.parametrize("mutant", [_no_centre, _flipped_gap, _rounded_apart])
def test_wrong_codes_do_not_pass(
    mutant: Any, kept: Coding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coding, "decode", mutant(coding.decode))
    with pytest.raises(AssertionError):
        assert_as_exact_as_kept_in_fp32(heads(0.01), 1.0, kept, TILINGS[:1])


@pytest.mark.parametrize("mode", ["fused", "recompute"])
@pytest.mark.parametrize("divergence", list(bg.divergences.registry))
def test_every_divergence_of_coded_tiles(divergence: str, mode: str, kept: Coding) -> None:
    """With padding, masked columns, ignored tokens, caps and temperature, in several chunks."""
    problem = make(
        hidden=(16, 24), vocab=(1300, 1210), target=labels((3, 16), 1210),
        student_cap={"logit_scale": 0.5, "logit_softcap": 20.0}, teacher_cap={"logit_scale": -0.7},
    )  # fmt: skip
    loss, dtype = Loss(divergence, options={"temperature": 1.5}), torch.bfloat16
    problem = problem.to(dtype)
    exact = problem.to(torch.float64).dense(loss)
    for chunk, width, count in ((48, 512, 99), (17, 300, 3)):
        errors = []
        for coded in (False, True):
            plans = kept(chunk, width, count, coded)
            ours = problem.ours(loss, mode=mode)
            errors.append(distances(tuple(ours), tuple(exact)))
            assert any(p.coded for p in plans) == coded or mode == "recompute"
        for plain, error in zip(*errors, strict=True):
            assert error <= max(1.1 * plain, 2.5e-3), (chunk, width, error, plain)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_bad_rows_get_what_fp32_tiles_give_them(dtype: str, kept: Coding) -> None:
    """Their tiles are multiplied again; the others are not."""
    x, w, w_t = heads(0.1, dtype=DTYPES[dtype])
    for value in (NAN, INF):
        x[3, 0] = value
        results = []
        for coded in (False, True):
            kept(96, 512, coded=coded)
            results.append(gradients((x, w, w_t)))
        for plain, ours in zip(*results, strict=True):
            assert torch.equal(plain.isnan(), ours.isnan())
            assert torch.equal(plain.nan_to_num(), ours.nan_to_num()), "no tile was coded"


def test_masked_columns_get_no_gradient(kept: Coding) -> None:
    """Where a bias of -inf rules them out, by one model or both."""
    x, w, w_t = heads(0.1)
    b, b_t = (torch.zeros(len(w), dtype=torch.bfloat16) for _ in range(2))
    b[500:700], b_t[500:700] = -INF, -INF
    b_t[2900:2950] = -INF
    results = []
    for coded in (False, True):
        kept(96, 512, coded=coded)
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = bg.linear_hybrid_distillation(
            *leaves, bg.LinearTeacher(x, w_t, b_t), torch.zeros(96, dtype=torch.long),
            linear_bias=b, reduction="sum",
        )  # fmt: skip
        results.append(torch.autograd.grad(loss, leaves))
    for plain, ours in zip(*results, strict=True):
        assert ours.isfinite().all()
        assert (ours - plain).norm() <= 2.5e-3 * plain.norm()
    assert not results[1][1][500:700].any() and results[1][1][2900:2950].any()


@pytest.mark.parametrize("divergence", ["forward_kl", "generalized_jsd"])
@pytest.mark.parametrize("width", [100, 250, 512])
def test_codes_lent_by_the_gradient_of_the_weight_change_no_bit(
    divergence: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, lent = heads(0.1), []

    def plan(lends: bool) -> Callable[[Workload, int | None], Plan]:
        def planned(work: Workload, _: int | None) -> Plan:
            found = planner._fit(work, work.rows, width, 1 << 40, True)
            assert found is not None and found.coded
            lent.append(found.lent)
            return found if lends else Plan(**vars(found) | {"lent": 0})

        return planned

    results = []
    for lends in (True, False):
        monkeypatch.setattr(driver, "plan", plan(lends))
        driver.PLANS.clear()
        results.append(gradients(data, divergence=divergence))
    assert min(lent) >= 1, lent
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def works(*data: Tensor, **options: Any) -> list[Workload]:
    """What the planner is asked of a step."""
    asked: list[Workload] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "plan", lambda w, b: asked.append(w) or planner.plan(w, b))
        driver.PLANS.clear()
        gradients(data, **options)
    return asked


def test_only_pairs_of_16_bit_heads_are_coded(tiling: Tiling) -> None:
    x, w, w_t = heads(0.1)
    assert all(work.codable for work in works(x, w, w_t))
    assert not any(work.codable for work in works(*(t.float() for t in (x, w, w_t))))
    assert not any(
        work.codable for work in works(x, w, w_t, divergence="forward_kl", logit_scale=0.0)
    )


def test_a_budget_holds_twice_the_tiles() -> None:
    """Where fp32 tiles do not fit; where they do, nothing is lost by what is chosen."""
    work = Workload(
        rows=1024, columns=151_936, compared=151_936, hidden_s=896, hidden_t=1536, logit_bytes=8,
        tile_bytes=2, weight_bytes=0, row_bytes=2000, weight_sum_bytes=0, weight_grad_bytes=1792,
        grad_products=2, codable=True, packing=2 << 20,
    )  # fmt: skip
    for budget in (1 << 30, 1 << 29, 1 << 27):
        p = planner.plan(work, budget)
        plain = planner.plan(Workload(**vars(work) | {"codable": False}), budget)
        assert p.bytes <= budget and p.coded == p.kept - 1
        share, before = (q.kept / len(q.tiles()) for q in (p, plain))
        assert share >= min(1.0, 1.7 * before) or share == 1
    assert planner.plan(work, 1 << 29).kept == len(planner.plan(work, 1 << 29).tiles())


def test_a_pair_takes_a_word_and_a_row_two_more_in_512_columns() -> None:
    p = Plan(64, 4096, 64, 1024, 4, 0, pair_bytes=8, coded=3)
    assert p.slot_bytes == 64 * 4 * (1024 + 4)
    assert Plan(64, 4096, 64, 1024, 4, 0, pair_bytes=8).slot_bytes == 64 * 1024 * 8


@pytest.mark.parametrize("way", ways("bf16"))
def test_the_planner_counts_what_products_pack(way: str) -> None:
    """Blocked products need no scratch beside dW, but a buffer of packed operands."""
    with products.using(way):
        (work,) = works(*heads(0.1))
    blocked = way == "brgemm"
    assert work.packing == blocked * torch.get_num_threads() << 20
    assert work.weight_bytes == (0 if blocked else 4 if way == "cblas" else 8)
