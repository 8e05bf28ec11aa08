"""All passes in one launch: every closed form against the oracle, the CUDA kernels in emulation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.backends import BACKENDS
from bgkernels.backends.base import Tile
from bgkernels.backends.native import NativeBackend
from bgkernels.backends.native.call import Call
from bgkernels.routing import Policy
from bgkernels.rows import sampling
from bgkernels.rows.spec import (
    CLOSED_WEIGHTS,
    ClosedDivergence,
    Mixture,
    RowSpec,
    Tilt,
    TotalVariation,
)
from tests.cuda_emulation import Emulated, module
from tests.problems import Failures, Loss, Params, Problem, make
from tests.yardstick import assert_each_close

SEED = (5 << 40) + 3

DIVERGENCES: dict[str, Params] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jeffreys": {},
    "generalized_jsd": {"beta": 0.3},
    "skew_forward_kl": {"lam": 0.2},
    "skew_reverse_kl": {"lam": 0.2},
    "total_variation": {},
}
POLICIES: list[tuple[str, Params]] = [
    ("hard", {}),
    ("additive", {"hard": 0.3, "soft": 0.9}),
    ("confidence", {}),
    ("confidence", {"kind": "max"}),
    ("entropy", {}),
    ("entropy", {"kind": "shannon"}),
    ("threshold", {}),
    ("reverse", {"policy": "entropy"}),
]


@dataclass(frozen=True)
class Variant:
    """How rows are laid out and walked: the blocks that hold one (0: none, None: as it needs)."""

    vocab: tuple[int, int]
    dtype: torch.dtype
    ranks: int | None
    target: str | None = None
    options: Params = field(default_factory=dict)


VARIANTS = {
    "one block": Variant((600, 600), torch.float32, None, "teacher_argmax", {"z_loss": 1e-3}),
    "two blocks": Variant((608, 592), torch.bfloat16, 2, None, {"temperature": 2.0}),
    "four blocks": Variant((1056, 1056), torch.float16, 4, "teacher_sample"),  # one without columns
    "streamed": Variant((600, 600), torch.float32, 0, None, {"label_smoothing": 0.1}),
    "ragged": Variant((531, 517), torch.bfloat16, None, "teacher_sample", {"z_loss": 1e-3}),
}  # fmt: skip


class Composing(Emulated):
    """Counts the rows whose passes were one launch, and notes why others' were not."""

    def __init__(self, ranks: int | None = None) -> None:
        super().__init__(ranks=ranks)
        self.rows, self.reasons = 0, list[str]()

    def compose(self, *args: Any) -> Tensor | str:
        made = super().compose(*args)
        if isinstance(made, str):
            self.reasons.append(made)
        else:
            self.rows += len(made)
        return made


def conform(problem: Problem, loss: Loss, dtype: torch.dtype) -> None:
    """Loss and gradient against the oracle, which is told the labels that all backends draw."""
    ours = given = problem.to(dtype)
    if problem.target == "teacher_sample":
        given = replace(ours, target=drawn(ours))
    ref, yardstick = given.to(torch.float64).dense(loss, 0.5), given.dense(loss, 0.5)
    got = ours.ours(loss, 0.5, backend="native", mode="fused", seed=SEED)
    assert_each_close(["loss", "logits"], got, ref, yardstick, torch.finfo(dtype).eps, loss)


def drawn(problem: Problem) -> Tensor:
    """Samples of the teacher's compared columns."""
    columns = min(x["logits"].shape[-1] for x in (problem.student, problem.teacher))
    logits = problem.teacher["logits"][..., :columns]
    rows = logits.flatten(0, -2).float()
    noise = sampling.gumbel(0, len(rows), 0, columns, SEED, rows.device)
    return (rows + noise).argmax(1).view(logits.shape[:-1])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", VARIANTS)
def test_closed_forms(name: str, divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with every policy."""
    variant, backend = VARIANTS[name], Composing(VARIANTS[name].ranks)
    monkeypatch.setitem(BACKENDS, "native", backend)
    problem = make("logits", leading=(2, 3), vocab=variant.vocab, target=variant.target)
    with Failures() as failures:
        for routing, params in POLICIES:
            loss = Loss(divergence, routing, DIVERGENCES[divergence], params, variant.options)
            with failures.cell(routing, params):
                conform(problem, loss, variant.dtype)
    assert backend.rows == 6 * len(POLICIES)


def test_every_closed_form_is_here() -> None:
    """A new one has to be added above."""
    registry = bg.divergences.registry
    assert {name for name in registry if registry.get(name).closed} == set(DIVERGENCES)
    policies = [bg.routing.get(name, **params).closed for name, params in POLICIES]
    assert {closed.kind for closed in policies if closed} == set(CLOSED_WEIGHTS)


def swapped(policy: Policy) -> Policy:
    """Closed weights that say another thing than the weights."""
    assert policy.closed is not None
    return replace(policy, closed=replace(policy.closed, reversed=not policy.closed.reversed))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_swapped_coefficients_are_noticed(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the terms of a divergence, or of the two labels where there is one term alone."""
    monkeypatch.setitem(BACKENDS, "native", Composing())
    problem, loss = (
        make("logits", leading=(4,)),
        Loss(divergence, "entropy", DIVERGENCES[divergence]),
    )
    library = loss.library()
    right = library["divergence"].closed
    wrong = replace(right, kl_ts=right.kl_st, kl_st=right.kl_ts, kl_tm=right.kl_sm,
                    kl_sm=right.kl_tm)  # fmt: skip
    library["divergence"] = replace(library["divergence"], closed=wrong)
    if wrong == right:
        library["routing"] = swapped(library["routing"])
    monkeypatch.setattr(Loss, "library", lambda self: library)
    with pytest.raises(AssertionError):
        conform(problem, loss, torch.float32)


@pytest.mark.parametrize("divergence", ["forward_kl", "generalized_jsd", "total_variation"])
@pytest.mark.parametrize("target", [None, "teacher_argmax", "teacher_sample"])
def test_statistics_of_composed_rows(
    divergence: str, target: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state and the sums are left behind, as separate passes leave them."""
    results = []
    problem = make("logits", leading=(10,), vocab=(512, 512), target=target).to(torch.float32)
    for backend in (NativeBackend(), Composing(2), Composing(0)):
        monkeypatch.setitem(BACKENDS, "native", backend)
        leaves = problem.leaves()
        options = {"backend": "native", "mode": "fused", "seed": SEED, "return_stats": True}
        loss, stats = problem.call(leaves, divergence=divergence, **options)
        (gradient,) = torch.autograd.grad(loss, list(leaves.values()))
        results.append([loss, gradient, *stats.tensors()])
    for found in results[1:]:
        for ours, expected in zip(found, results[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def backwards() -> Iterator[None]:
    module().run_backwards(True)
    yield
    module().run_backwards(False)


def step(problem: Problem, ranks: int) -> list[Tensor]:
    """The loss and gradient of a pairwise objective with a sampled label."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "native", Composing(ranks))
        loss = Loss("generalized_jsd", "entropy")
        return problem.ours(loss, backend="native", mode="fused", seed=SEED)


@pytest.mark.parametrize("ranks", [0, 4])
def test_no_barrier_is_missing(ranks: int, request: pytest.FixtureRequest) -> None:
    """Threads and blocks in another order give the same bits."""
    problem = make("logits", leading=(6,), vocab=(1056, 1056), target="teacher_sample")
    before = step(problem.to(torch.bfloat16), ranks)
    request.getfixturevalue("backwards")
    for one, other in zip(before, step(problem.to(torch.bfloat16), ranks), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("ranks", [0, 2])
def test_rows_that_take_no_part_and_rows_that_are_not_finite(ranks: int) -> None:
    """A skipped row is not looked at; a NaN or +inf makes its own row NaN; a mask has no weight."""
    problem = make("logits", leading=(6,), vocab=(600, 600)).to(torch.float32)
    s, t = problem.student["logits"], problem.teacher["logits"]
    assert isinstance(problem.target, Tensor)
    assert problem.target[3] < 0
    s[3], t[0, 77], s[1, 500] = float("nan"), float("nan"), float("inf")
    s[4, 40:300] = t[4, 40:300] = float("-inf")
    loss, gradient = step(problem, ranks)
    assert loss.isnan()
    assert gradient.isnan().any(1).tolist() == [True, True, False, False, False, False]
    assert not gradient[3].any()
    assert not gradient[4, 40:300].any()


def test_rows_that_cannot_be_resident() -> None:
    """The blocks that hold a row, by its bytes; 0 with a reason where it is streamed."""

    def blocks(width: int, dtype: torch.dtype, pad: int = 0) -> tuple[int, str | None]:
        x = torch.empty(1, width + pad, dtype=dtype)[:, pad:]
        call = Call(Tile(x, x, 0, 0), RowSpec(width, width))
        return Emulated().kernels(x.device).residence(call)

    widths = (1024, 32_000, 50_304, 151_936)
    assert [blocks(n, torch.bfloat16) for n in widths] == [
        (1, None),
        (2, None),
        (2, None),
        (8, None),
    ]
    assert blocks(151_936, torch.float32) == (8, None)
    assert blocks(262_144, torch.float32) == (0, "a row does not fit the shared memory of 8 blocks")
    for odd in (blocks(50_257, torch.bfloat16), blocks(1024, torch.bfloat16, pad=1)):
        assert odd == (0, "its rows do not begin and end on 16-byte boundaries")


def test_what_takes_separate_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason, and the result of every backend."""
    backend = Composing()
    monkeypatch.setitem(BACKENDS, "native", backend)
    problem = make("logits", leading=(4,), vocab=(64, 64)).to(torch.float32)
    x, t = problem.student["logits"], problem.teacher["logits"]
    both = bg.divergences.Divergence(
        "both", lambda s: s.mixture(0.5)[0] + s.total_variation(),
        (Mixture(0.5), TotalVariation()), ClosedDivergence(kl_tm=1, variation=1),
    )  # fmt: skip
    cells: list[tuple[Any, Tensor, list[str]]] = [
        ("alpha_beta", t, []),  # no closed form: the backend is not asked
        (both, t, ["the objective needs more than one pairwise statistic"]),
        ("forward_kl", t.bfloat16(), ["student and teacher have logits of two sizes"]),
    ]
    x.requires_grad_()
    for divergence, teacher, reasons in cells:
        made = []
        for name in ("native", "eager"):
            loss = bg.hybrid_distillation(
                x, bg.LogitsTeacher(teacher), problem.target, divergence=divergence, backend=name
            )
            made.append((loss.detach(), *torch.autograd.grad(loss, x)))
        torch.testing.assert_close(*made)
        assert backend.reasons == reasons
        backend.reasons.clear()
    assert backend.rows == 0


def test_reasons_of_the_module() -> None:
    x = torch.empty(1, 64)

    def reason(first_column: int = 0, **spec: Any) -> str:
        call = Call(Tile(x, x, 0, first_column), RowSpec(128, 128, **spec))
        return str(module().separate(call.spec, call.tile))

    assert reason() == reason(extras=(Tilt(0, 0.1), Mixture(0.5)), label_rule="sample") == "None"
    assert "begin with the vocabulary" in reason(64)
    assert "tilts other than" in reason(extras=(Tilt(0.5, 0.1),))
    assert "more than one pairwise" in reason(extras=(Mixture(0.1), TotalVariation()))
