"""The native CUDA kernels on a real device: conformance, sizes, streams, devices, graphs.

``tests/cuda_sanitizer.sh`` runs these cells under compute-sanitizer.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.backends.native import NativeBackend
from bgkernels.backends.native.cuda import Cuda, unusable
from bgkernels.rows.arithmetic import SKIP
from bgkernels.rows.extras import Mixture, Tempered, Tilt
from bgkernels.rows.spec import RowSpec
from tests import on_gpu
from tests.backends.cases import CASES, PADDED, labels_of
from tests.conformance import KINDS, check, make, statistics
from tests.on_gpu import DEVICE

pytestmark = pytest.mark.gpu


class Native(NativeBackend):
    """With a fixed number of blocks that share a row."""

    def __init__(self, splits: int | None = None) -> None:
        self.splits = splits

    def kernels(self, device: torch.device) -> Cuda:
        return Cuda(device, splits=self.splits)


@pytest.fixture(autouse=True)
def _usable() -> None:
    reason = unusable(DEVICE)
    if reason:
        pytest.skip(f"native on {DEVICE}: {reason}")


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_everything_against_float64(name: str, cut: bool, splits: int) -> None:
    spec, dtypes = CASES[name]
    case = make(spec, labels_of(spec), dtypes, (70, PADDED + 2) if cut else (), DEVICE)
    check(Native(splits), case, out=case.student.dtype if cut else torch.float32, in_place=cut)


@pytest.mark.parametrize("width", [50_257, 128_256, 151_936])
@pytest.mark.parametrize("dtypes", ["ff", "bb", "fb"])
def test_real_vocabularies(width: int, dtypes: str) -> None:
    spec = RowSpec(width, width - 3, 2.0, extras=(Tilt(0, 0.1), Mixture(0.5), Tempered()))
    case = make(spec, [3, width - 1, SKIP, 1000], dtypes, device=DEVICE)
    check(Native(), case, out=KINDS[dtypes[0]])


@pytest.mark.parametrize("rows, vocab", on_gpu.SIZES)
def test_more_rows_and_elements_than_small_integers_count(rows: int, vocab: int) -> None:
    on_gpu.some_rows_are_as_alone(Native(), rows, vocab)


def test_the_same_bits_every_time() -> None:
    case = on_gpu.on_device(300, 50_000)
    results = [statistics(Native(3), case).state.floats for _ in range(3)]
    assert all(torch.equal(x, results[0]) for x in results)


def test_nothing_waits_for_the_device() -> None:
    on_gpu.nothing_waits("native")


def test_the_current_stream_is_used() -> None:
    """Work on another stream comes after what that stream waits for, and only there."""
    case = on_gpu.on_device(64, 20_000)
    result, expected = on_gpu.primitives(Native(), replace(case, student=case.student.clone()))
    side, later = torch.cuda.Stream(), torch.zeros_like(case.student)
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        later.copy_(case.student)
        beside, gradient = on_gpu.primitives(Native(), replace(case, student=later))
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(beside["kl_ts"], result["kl_ts"])
    assert torch.equal(gradient, expected)


def test_a_device_that_is_not_current() -> None:
    on_gpu.another_device_serves(Native())


def test_graph_capture_and_replay() -> None:
    on_gpu.a_graph_replays(Native())


def test_a_step_from_logits_waits_for_nothing_and_replays() -> None:
    """A step from logits: no synchronisation, and the same bits from a captured graph."""
    z, t = (torch.randn(300, 5120, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    target, teacher = torch.randint(5120, (300,), device=DEVICE), bg.LogitsTeacher(t)
    z.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = bg.hybrid_distillation(
            z, teacher, target, divergence="generalized_jsd", backend="native"
        )
        return (loss.detach(), *torch.autograd.grad(loss, z))

    expected = step()
    on_gpu.without_waiting(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(replayed, expected, strict=True))


def test_a_step_with_heads_replays() -> None:
    on_gpu.a_step_replays("native")
