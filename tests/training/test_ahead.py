"""The teacher that runs ahead: in order, bounded, and gone when the loop is left."""

from __future__ import annotations

import doctest
import threading
from typing import NamedTuple

import pytest
import torch

import bgkernels as bg
from bgkernels.training import ahead, prefetch_teacher

WAIT = 30.0  # seconds; only a failing test waits so long


def running():
    return [t for t in threading.enumerate() if t.name == "teacher"]


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert not running()


class Steps:
    """A teacher that counts, and tells when it has begun a given number of steps."""

    def __init__(self):
        self.begun, self.changed = 0, threading.Condition()

    def __call__(self, batch):
        with self.changed:
            self.begun += 1
            self.changed.notify_all()
        return batch * 10

    def reach(self, number):
        with self.changed:
            assert self.changed.wait_for(lambda: self.begun >= number, WAIT)


def test_order_and_no_gradients():
    weight = torch.ones(3, requires_grad=True)
    pairs = list(prefetch_teacher(torch.arange(20.0).view(20, 1), lambda x: x * weight, depth=3))
    assert [x.item() for x, _ in pairs] == list(range(20))
    assert all(torch.equal(y, x.expand(3)) and not y.requires_grad for x, y in pairs)
    assert list(prefetch_teacher([], lambda x: x)) == []


def test_one_step_ahead():
    """The teacher begins the next step while the student is at this one."""
    teacher = Steps()
    for batch, output in prefetch_teacher(range(5), teacher):
        assert output == batch * 10
        teacher.reach(min(batch + 2, 5))


@pytest.mark.parametrize("depth", [1, 3])
def test_back_pressure(depth):
    """Neither teacher nor batches are ever more than ``depth`` ahead of what was taken."""
    teacher, read, taken = Steps(), [], 0

    def batches():
        for i in range(12):
            assert len(read) - taken <= depth
            read.append(i)
            yield i

    for batch, _ in prefetch_teacher(batches(), teacher, depth=depth):
        teacher.reach(min(batch + 1 + depth, 12))
        assert teacher.begun <= batch + 1 + depth and len(read) <= batch + 1 + depth
        taken += 1


@pytest.mark.parametrize("where", ["batches", "forward"])
def test_exceptions_come_in_order(where):
    def batches():
        yield 1
        yield 0 if where == "forward" else 1
        if where == "batches":
            raise KeyError("the file is gone")
        yield 1

    seen, error = [], KeyError if where == "batches" else ZeroDivisionError
    with pytest.raises(error) as caught:
        for _, output in prefetch_teacher(batches(), lambda x: 1 // x, depth=3):
            seen.append(output)
    assert seen == [1] * (2 if where == "batches" else 1)
    assert caught.traceback[-1].path.name == "test_ahead.py"  # it shows where


def test_leaving_the_loop():
    teacher = Steps()
    for batch, _ in prefetch_teacher(range(10**9), teacher):
        if batch == 3:
            break
    assert not running() and teacher.begun <= 5
    steps = prefetch_teacher(range(10**9), teacher)
    next(steps)
    steps.close()
    assert not running()
    with pytest.raises(RuntimeError, match="the student"):
        for _ in prefetch_teacher(range(10**9), teacher):
            raise RuntimeError("the student")
    prefetch_teacher(range(10**9), teacher)  # never begun


def test_outputs_move():
    class Pair(NamedTuple):
        a: torch.Tensor
        b: int

    x = torch.ones(2, 3)
    linear = bg.LinearTeacher(x, torch.ones(5, 3))
    ((_, out),) = prefetch_teacher(
        [0], lambda _: {"l": [x, (x, 1)], "p": Pair(x, 2), "t": linear}, to="meta"
    )
    assert out["l"][0].is_meta and out["l"][1][0].is_meta and out["l"][1][1] == 1
    assert isinstance(out["p"], Pair) and out["p"].a.is_meta and out["p"].b == 2
    assert out["t"].hidden.is_meta and out["t"].bias is None


def test_the_loss_is_that_of_a_teacher_in_line():
    torch.manual_seed(0)
    body, head = torch.nn.Linear(6, 8), torch.randn(20, 8)
    x, w = torch.randn(4, 6), torch.randn(20, 6)
    loss = bg.LinearHybridDistillationLoss()
    forward = lambda batch: bg.LinearTeacher(body(batch), head)  # noqa: E731
    labels = torch.randint(20, (4,))
    for batch, teacher in prefetch_teacher([x, x + 1], forward):
        with torch.no_grad():
            expected = loss(batch, w, forward(batch), labels)
        assert torch.equal(loss(batch, w, teacher, labels), expected)


def test_example():
    assert doctest.testmod(ahead).failed == 0


def test_depth_is_checked():
    with pytest.raises(ValueError, match="`depth` must be at least 1; got 0"):
        prefetch_teacher([], len, depth=0)


@pytest.mark.gpu
def test_on_a_stream_of_its_own():
    """Outputs are complete and their memory is not reused while the student reads it."""
    weight = torch.randn(512, 512, device="cuda") / 23
    batches = [torch.randn(256, 512) for _ in range(30)]

    def forward(x):
        x = x.cuda(non_blocking=True)
        for _ in range(20):
            x = torch.tanh(x @ weight)
        return x

    expected = [forward(x).sum(1).cpu() for x in batches]
    got = []
    for _, hidden in prefetch_teacher(batches, forward, device="cuda"):
        total = torch.zeros_like(hidden)
        for _ in range(50):
            total = total + hidden @ weight * 0
        got.append((total + hidden).sum(1))
        del hidden
    for ours, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), reference, atol=1e-4, rtol=1e-4)
