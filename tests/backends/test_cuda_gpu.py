"""The native CUDA kernels on a real device: conformance, sizes, streams, devices, graphs.

``tests/cuda_sanitizer.sh`` runs these cells under compute-sanitizer.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.backends import BACKENDS, native_cuda
from bgkernels.backends.native import NativeBackend
from bgkernels.backends.native.cuda import Cuda
from bgkernels.rows.spec import Mixture, RowSpec, Tilt
from bgkernels.rows.state import NONE, SKIP
from bgkernels.streaming import planner
from tests import on_gpu
from tests.backends.test_cuda_composed import DIVERGENCES, POLICIES, conform
from tests.backends.test_native import CASES, LABELS, PADDED
from tests.conformance import KINDS, check, make, statistics
from tests.on_gpu import DEVICE
from tests.problems import Failures, Loss
from tests.problems import make as logits_problem

pytestmark = pytest.mark.gpu


class Native(NativeBackend):
    """With fixed numbers of blocks that share a row, or hold it."""

    def __init__(self, splits: int | None = None, ranks: int | None = None) -> None:
        self.splits, self.ranks = splits, ranks

    def kernels(self, device: torch.device) -> Cuda:
        return Cuda(device, splits=self.splits, ranks=self.ranks)


@pytest.fixture(autouse=True)
def _usable() -> None:
    reason = native_cuda.unusable(DEVICE)
    if reason:
        pytest.skip(f"native on {DEVICE}: {reason}")


def labels_of(spec: RowSpec) -> list[int]:
    return LABELS if spec.label_rule == "index" else [NONE, NONE, SKIP, *[NONE] * 10]


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
    spec = RowSpec(width, width - 3, 2.0, extras=(Tilt(0, 0.1), Mixture(0.5)))
    case = make(spec, [3, width - 1, SKIP, 1000], dtypes, device=DEVICE)
    check(Native(), case, out=KINDS[dtypes[0]])


@pytest.mark.parametrize("rows, vocab", on_gpu.SIZES)
def test_more_rows_and_elements_than_small_integers_count(rows: int, vocab: int) -> None:
    on_gpu.some_rows_are_as_alone(Native(), rows, vocab)


@pytest.mark.parametrize("ranks", [None, 0, 4])
@pytest.mark.parametrize("target", [None, "teacher_argmax", "teacher_sample"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_passes_in_one_launch(
    divergence: str, target: str | None, ranks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows that one block holds, that four hold, and that none does, against the oracle."""
    if ranks and torch.cuda.get_device_capability(DEVICE) < (9, 0):
        pytest.skip("clusters take compute capability 9.0")
    monkeypatch.setitem(BACKENDS, "native", Native(ranks=ranks))
    problem = logits_problem("logits", leading=(2, 8), vocab=(32_000, 32_000), target=target)
    for side in (problem.student, problem.teacher):
        side["logits"] = side["logits"].to(DEVICE)
    if isinstance(problem.target, Tensor):
        problem = replace(problem, target=problem.target.to(DEVICE))
    with Failures() as failures:
        for routing, params in POLICIES:
            loss = Loss(divergence, routing, DIVERGENCES[divergence], params)
            for dtype in (torch.float32, torch.bfloat16):
                with failures.cell(routing, params, dtype):
                    conform(problem, loss, dtype)


@pytest.mark.parametrize("width", [50_257, 151_936, 262_144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("divergence", ["forward_kl", "generalized_jsd"])
def test_real_vocabularies_in_one_launch(divergence: str, dtype: torch.dtype, width: int) -> None:
    """Held by eight blocks, or streamed because a row is ragged or does not fit."""
    problem = logits_problem("logits", leading=(4,), vocab=(width, width), target="teacher_argmax")
    for side in (problem.student, problem.teacher):
        side["logits"] = side["logits"].to(DEVICE)
    conform(problem, Loss(divergence, "entropy"), dtype)


def test_the_same_bits_every_time() -> None:
    case = on_gpu.on_device(300, 50_000)
    results = [statistics(Native(3), case)[0].floats for _ in range(3)]
    assert all(torch.equal(x, results[0]) for x in results)


def test_nothing_waits_for_the_device() -> None:
    on_gpu.nothing_waits("native")


def test_the_current_stream_is_used() -> None:
    """Work on another stream comes after what that stream waits for, and only there."""
    case = on_gpu.on_device(64, 20_000)
    final, expected = on_gpu.primitives(Native(), replace(case, student=case.student.clone()))
    side, later = torch.cuda.Stream(), torch.zeros_like(case.student)
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        later.copy_(case.student)
        found, gradient = on_gpu.primitives(Native(), replace(case, student=later))
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(found.stats.kl_ts, final.stats.kl_ts)
    assert torch.equal(gradient, expected)


def test_a_device_that_is_not_current() -> None:
    on_gpu.another_device_serves(Native())


def test_graph_capture_and_replay() -> None:
    on_gpu.a_graph_replays(Native())


def test_one_launch_waits_for_nothing_and_replays() -> None:
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
        found = step()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_tiles_ahead_on_a_second_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as on one, again and again, and from a captured graph."""
    problem = logits_problem(hidden=(256, 384), vocab=(20_000, 20_000), leading=(512,))
    for side in (problem.student, problem.teacher):
        side |= {name: x.to(DEVICE) for name, x in side.items()}
    assert isinstance(problem.target, Tensor)
    problem = replace(problem, target=problem.target.to(DEVICE)).to(torch.bfloat16)
    leaves = problem.leaves()

    def step() -> tuple[Tensor, ...]:
        loss = problem.call(leaves, backend="native", mode="fused")
        return (loss.detach(), *torch.autograd.grad(loss, list(leaves.values())))

    cost = replace(planner.COST["cuda"], width=4096)
    monkeypatch.setitem(planner.COST, "cuda", cost)
    planner._search.cache_clear()
    expected = step()
    monkeypatch.setitem(planner.COST, "cuda", replace(cost, beside=True))
    graph = torch.cuda.CUDAGraph()
    found = [step() for _ in range(20)]
    with torch.cuda.graph(graph):
        found.append(step())
    graph.replay()
    for made in found:
        assert all(torch.equal(x, y) for x, y in zip(made, expected, strict=True))
