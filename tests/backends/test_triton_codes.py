"""Whole steps whose tiles are kept in codes that Triton's kernels write and read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.backends import BACKENDS
from bgkernels.backends.triton import TritonBackend
from bgkernels.rows.extras import Tilt
from bgkernels.streaming import driver, kept
from bgkernels.streaming.planner import Plan, Workload
from tests.interpreter import DEVICE, prepare

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore:All-NaN")
prepare()
ROWS, HIDDEN, VOCAB, COMPARED = 12, 16, 330, 317


def plans(monkeypatch: pytest.MonkeyPatch, chunk: int, count: int, coded: bool) -> list[Plan]:
    """Tiles of 128 columns, of which ``count`` are kept; what is returned is filled."""
    asked: list[Plan] = []

    def plan(work: Workload, budget: int | None) -> Plan:
        assert work.codable
        tiles = -(-work.columns // 128)
        held = min(count, tiles)
        codes = (held - (work.reads == 1)) * coded
        asked.append(Plan(work.rows, work.columns, chunk, 128, held, 0, coded=codes))
        return asked[-1]

    monkeypatch.setattr(driver, "plan", plan)
    driver.PLANS.clear()
    return asked


def gradients(gap: float, **options: object) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x, w, noise = torch.randn(ROWS, HIDDEN), torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN)
    x, w, w_t = (t.to(DEVICE, torch.bfloat16) for t in (x, w, w + gap * noise))
    target = torch.arange(ROWS, device=DEVICE)
    target[4] = -100
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = bg.linear_hybrid_distillation(
        *leaves, bg.LinearTeacher(x, w_t[:COMPARED]), target, backend="triton", mode="fused",
        **options,
    )  # fmt: skip
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("gap", [1e-2])
@pytest.mark.parametrize(
    "options",
    [
        {"routing": "soft"},
        {"divergence": "generalized_jsd", "temperature": 2.0},
        {"logit_softcap": 20.0, "divergence": "reverse_kl", "label_smoothing": 0.1},
    ],
    ids=["forward", "jsd", "capped"],
)
def test_a_step_from_codes(
    options: dict[str, object], gap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one chunk with all tiles kept, and in several with some: nothing is restored."""
    monkeypatch.setitem(BACKENDS, "triton", TritonBackend())
    for chunk, count in ((ROWS, 9), (5, 2)):
        results = []
        for coded in (False, True):
            asked = plans(monkeypatch, chunk, count, coded)
            results.append(gradients(gap, **options))
            assert bool(asked[0].coded) == coded
        plain, ours = results  # the second read, of jsd, is of codes as well
        assert torch.equal(ours[0], plain[0])
        for g, exact in zip(ours[1:], plain[1:], strict=True):
            assert (g - exact).double().norm() <= 2.5e-3 * exact.double().norm()


def test_statistics_of_improbable_columns_are_not_coded() -> None:
    """A code says of a column far below the maxima that it is ruled out."""
    assert all(map(kept._fades, (Tilt(0, 0.1), Tilt(0.5, 0.5, True))))
    assert not any(map(kept._fades, (Tilt(0, 0, True), Tilt(-0.4, 0.7), Tilt(0, 1e-3))))
