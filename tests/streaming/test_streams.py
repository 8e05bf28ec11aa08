"""Tiles multiplied ahead on a second stream, which stands in as early or as late as it may run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.streaming import driver, planner
from tests.conftest import Tiling
from tests.problems import Loss, Problem, make


class Early:
    """Work is done at once."""

    started = 0

    def __init__(self, device: torch.device) -> None:
        self.waiting: list[Callable[[], object]] = []

    def start(self, work: Callable[[], object]) -> None:
        type(self).started += 1
        work()

    def join(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


class Late(Early):
    """Work is done when it is waited for."""

    def start(self, work: Callable[[], object]) -> None:
        super().start(lambda: self.waiting.append(work))


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Early]], None]:
    """``second(kind)`` switches the second stream on."""

    def switch(kind: type[Early]) -> None:
        monkeypatch.setattr(kind, "started", 0)
        monkeypatch.setattr(driver, "SecondStream", kind)
        cost = replace(planner.cost_of("cpu"), beside=True)
        monkeypatch.setitem(planner.COST, "cpu", cost)

    return switch


def mixed_teacher(problem: Problem, **options: Any) -> list[Tensor]:
    """Two teachers, one of logits."""
    x = problem.leaves()
    logits = problem.logits(problem.student)[1]
    teachers = [problem.library_teacher(), bg.LogitsTeacher(logits.detach())]
    loss = bg.linear_hybrid_distillation(
        x["input"], x["linear_weight"], bg.MixtureTeacher(teachers, (0.3, 0.7)), problem.target,
        linear_bias=x["linear_bias"], **options,
    )  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss, list(x.values()))]


def one_teacher(problem: Problem, **options: Any) -> list[Tensor]:
    return problem.ours(Loss("generalized_jsd"), **options)


@pytest.mark.parametrize("step", [one_teacher, mixed_teacher])
@pytest.mark.parametrize("kept", [1, 3, 7])
@pytest.mark.parametrize("kind", [Early, Late])
def test_the_same_bits(
    kind: type[Early], kept: int, step: Callable[..., list[Tensor]], tiling: Tiling,
    second: Callable[[type[Early]], None],
) -> None:  # fmt: skip
    """Of every tile that has a place of its own, in each chunk; fp32, so that none is widened."""
    problem = make(leading=(10,)).to(torch.float32)
    tiling(4, 48, kept)  # 3 chunks of 7 tiles
    options = {"backend": "eager"}
    expected = [step(problem, mode=mode, **options) for mode in ("fused", "recompute")]
    second(kind)
    found = [step(problem, mode=mode, **options) for mode in ("fused", "recompute")]
    for ours, plain in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(ours, plain, strict=True))
    heads = 2  # a student's and a linear teacher's
    assert kind.started == 2 * 3 * (kept - 1) * heads


def test_only_the_teacher_has_a_head(tiling: Tiling, second: Callable[[type[Early]], None]) -> None:
    problem = make(leading=(10,)).to(torch.float32)
    logits, target = torch.randn(10, 300), problem.target
    tiling(10, 64, 5)

    def loss() -> Any:
        return bg.hybrid_distillation(logits, problem.library_teacher(), target, backend="eager")

    expected = loss()
    second(Late)
    assert torch.equal(loss(), expected)
    assert Late.started == 4


def test_an_error_leaves_nothing_behind(
    tiling: Tiling, second: Callable[[type[Early]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun is waited for before its memory is given back."""
    second(Late)
    tiling(10, 64, 5)
    made: list[Late] = []
    monkeypatch.setattr(
        driver, "SecondStream", lambda device: made.append(Late(device)) or made[-1]
    )

    def broken(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(bg.backends.eager.EagerBackend, "absorb_", broken)
    with pytest.raises(MemoryError):
        make(leading=(10,)).to(torch.float32).ours(Loss(), backend="eager")
    assert Late.started
    assert not made[0].waiting


def test_off_unless_measured() -> None:
    assert not any(cost.beside for cost in planner.COST.values())
