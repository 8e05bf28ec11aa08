"""The native CUDA kernels on a real device: conformance, sizes, streams, devices, graphs.

``tests/cuda_sanitizer.sh`` runs these cells under compute-sanitizer.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bgkernels.backends import BACKENDS, native_cuda
from bgkernels.backends.native import NativeBackend
from bgkernels.backends.native_cuda import Cuda
from bgkernels.spec import Mixture, RowSpec, Tilt
from bgkernels.state import NONE, SKIP
from tests import on_gpu
from tests.conformance import KINDS, check, make, statistics
from tests.on_gpu import DEVICE
from tests.problems import conform
from tests.problems import make as logits_problem
from tests.test_cuda_emulated import COMPOSED
from tests.test_native import CASES, LABELS, PADDED

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
@pytest.mark.parametrize("name", COMPOSED)
def test_both_passes_in_one_launch(
    name: str, ranks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows that one block holds, that four hold, and that none does, against the oracle."""
    if ranks and torch.cuda.get_device_capability(DEVICE) < (9, 0):
        pytest.skip("clusters take compute capability 9.0")
    monkeypatch.setitem(BACKENDS, "native", Native(ranks=ranks))
    problem = logits_problem("logits", leading=(2, 8), vocab=(32_000, 32_000))
    for side in (problem.student, problem.teacher):
        side["logits"] = side["logits"].to(DEVICE)
    assert isinstance(problem.target, Tensor)
    problem = replace(problem, target=problem.target.to(DEVICE))
    for dtype in (torch.float32, torch.bfloat16):
        conform(problem, COMPOSED[name], dtype, [{"backend": "native", "mode": "fused"}])


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
