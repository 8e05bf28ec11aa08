"""What only the CUDA kernels have: vectors, blocks that share a row, barriers, errors of a device.

The rest of their conformance is in test_native.py, beside the CPU's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bgkernels.backends.native import NativeBackend
from bgkernels.backends.native import cuda as native_cuda
from bgkernels.rows.arithmetic import NONE, SKIP
from bgkernels.rows.extras import Mixture, Tempered, Tilt, TotalVariation
from bgkernels.rows.spec import RowSpec
from tests.backends.cases import CASES, INF, LABELS, NAN, PADDED, WIDTH, labels_of
from tests.conformance import KINDS, Case, check, check_codes, gradient, make, statistics
from tests.cuda_emulation import ROOT, Emulated, module

pytest.importorskip("bgkernels.backends.native._C")

STEP = 256  # columns that a warp takes at a time: csrc/cuda/rows.cuh


def placed(x: Tensor, dtype: torch.dtype, left: int, width: int) -> Tensor:
    """The same values in rows of a wider matrix of NaN, from column ``left`` on."""
    canvas = torch.full((len(x), width), NAN, dtype=dtype)
    canvas[:, left : left + x.shape[1]] = x
    return canvas[:, left : left + x.shape[1]]


def lay_out(case: Case, left: int, width: int) -> Case:
    """Both models alike: row ``r`` starts ``left + r·width`` elements after a 64-byte boundary."""
    t = case.teacher
    teacher = None if t is None else placed(t, t.dtype, left, width)
    return replace(case, student=placed(case.student, case.student.dtype, left, width),
                   teacher=teacher)  # fmt: skip


LAYOUTS = {"aligned": (16, WIDTH + 26), "alike": (3, WIDTH + 13)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_vectors(name: str, layout: str) -> None:
    """16-byte loads and stores, with single elements at both ends; two blocks a row, and tiles."""
    spec, dtypes = CASES[name]
    alike = layout == "alike"
    case = make(spec, labels_of(spec), dtypes, (328, PADDED + 2) if alike else ())
    check(Emulated(1 + alike), lay_out(case, *LAYOUTS[layout]), out=case.student.dtype)


CODED = ["plain", "padded, tempered", "capped", "mixed kinds, argmax", "sample"]


@pytest.mark.parametrize("layout", ["aligned", "apart"])
@pytest.mark.parametrize("name", CODED)
def test_codes_instead_of_logits(name: str, layout: str) -> None:
    """16-byte stores and loads, or single words; two tiles of which three blocks share a row."""
    spec, apart = CASES[name][0], layout == "apart"
    case = make(spec, labels_of(spec), "ff", (520,) if apart else ())
    assert case.teacher is not None
    case.student[0, 20:30] = case.teacher[0, 20:300] = -INF
    case.student[3, 7] = NAN
    if not apart:
        case = lay_out(case, 16, WIDTH + 26)
    check_codes(Emulated(3 if apart else 1), case, STEP, left=2 if apart else 0)


def test_codes_are_of_wide_logits() -> None:
    case = make(RowSpec(8, 8), [1], "bb")
    with pytest.raises(RuntimeError, match="refused its arguments"):
        check_codes(Emulated(), case, STEP)


EDGES = [1, 7, 8, 9, STEP - 1, STEP + 1, 2 * STEP + 3, 4 * STEP]


@pytest.mark.parametrize("width", EDGES)
@pytest.mark.parametrize("dtypes", ["ff", "bb", "fb"])
def test_widths_around_vectors_and_steps(width: int, dtypes: str) -> None:
    case = make(RowSpec(width, width), [0, width - 1, width // 2], dtypes)
    for left in (0, 5):
        check(Emulated(), lay_out(case, left, width + 8 + left), out=case.student.dtype)


@pytest.mark.parametrize("splits", [2, 3, 9])
@pytest.mark.parametrize("rule", ["index", "argmax", "sample"])
def test_blocks_that_share_a_row(splits: int, rule: str) -> None:
    """More than there are steps, too; states merge with what was there."""
    extras = (Mixture(0.5), Tilt(0, 0.1), Tilt(0, 0, True), TotalVariation(), Tempered())
    labels = [*LABELS[:4], 900] if rule == "index" else [NONE, NONE, SKIP, NONE, NONE]
    case = make(RowSpec(WIDTH, PADDED, 2.0, rule, extras=extras), labels, "ff", (100,))
    check(Emulated(splits), case)


def test_infinities_meet_in_a_merge() -> None:
    """Masked columns in some warps and blocks alone, and rows that begin or end masked."""
    extras = (Tilt(0, 0.1), Mixture(0.5), Tempered(2.0))
    case = make(RowSpec(WIDTH, WIDTH, extras=extras), [3, 5, 7, 9])
    assert case.teacher is not None
    case.student[0, 16:300] = case.teacher[0, 16:300] = -INF
    case.student[1, 512:] = case.teacher[1, 512:] = -INF
    case.student[2, :700] = case.teacher[2, :700] = -INF
    case.student[2, 7] = case.teacher[2, 7] = 1.0
    for splits in (1, 3):
        check(Emulated(splits), case)


def test_no_barrier_is_missing() -> None:
    """Threads in another order give the same bits."""
    extras = (Tilt(0, 0.1), Tilt(1, 0, True), Mixture(0.5))
    spec = RowSpec(WIDTH, PADDED, 1.5, "sample", 7, extras=extras)
    case = lay_out(make(spec, [NONE] * 5, "bb"), 8, WIDTH + 10)
    results = []
    for backwards in (False, True):
        module().run_backwards(backwards)
        result = statistics(Emulated(2), case)
        dense = gradient(Emulated(2), case, result, torch.float32)
        results.append((result.state.floats, result.values, dense))
    module().run_backwards(False)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_ties_between_lanes_warps_and_labels_that_lose() -> None:
    """All columns alike but some maxima; the first of equal ones is chosen."""
    case = make(RowSpec(WIDTH, WIDTH, label_rule="argmax"), [NONE] * 4, "bb")
    assert case.teacher is not None
    case.student[:], case.teacher[:] = 0.0, 0.0
    for row, columns in enumerate(([3, 4, 700], [260, 9, 1000], [1045, 800], [0])):
        case.teacher[row, columns] = case.student[row, columns] = 2.0
    case.teacher[3, 900] = 3.0  # column 0 loses its place, and is the first of the student's best
    for layout in LAYOUTS.values():
        for splits in (1, 2):
            state = statistics(Emulated(splits), lay_out(case, *layout)).state
            assert state["label"].tolist() == [3, 9, 800, 900]
            assert state["argmax_t"].tolist() == [3, 9, 800, 900]
            assert state["argmax_s"].tolist() == [3, 9, 800, 0]


@pytest.fixture
def broken_device() -> Iterator[None]:
    module().fail(7)
    yield
    module().fail(0)


@pytest.mark.usefixtures("broken_device")
def test_an_error_of_the_device_is_raised() -> None:
    spec = RowSpec(8, 8, extras=(Mixture(0.5),))
    case = make(spec, [1])
    with pytest.raises(
        RuntimeError, match=r"`absorb` for \(1, 8\) on cpu, 1 .*: an emulated error"
    ):
        statistics(Emulated(), case)
    result = statistics(NativeBackend(), case)
    state, labels, broken = result.state, case.labels, Emulated()
    for call in (
        lambda: broken.absorb_(state, case.tiles()[0], labels, spec, tuple(result.values[:2])),
        lambda: broken.finalize(state, labels, spec, result.values),
        lambda: broken.fold(result.values, result.values, labels, spec),
        lambda: broken.vjp(
            case.student, case.tiles()[0], torch.zeros(16, 1).double(), labels, spec
        ),
    ):
        with pytest.raises(RuntimeError, match="an emulated error"):
            call()


def test_reasons_why_a_device_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:0")
    monkeypatch.setattr(native_cuda, "_module", lambda: None)
    assert "without CUDA" in str(NativeBackend().supports(device, (torch.float32,)))
    monkeypatch.setattr(native_cuda, "_module", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA device" in str(native_cuda.unusable(device))
    native_cuda._unusable.cache_clear()
    capability: list[Any] = [(7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability[0])
    assert "7.5" in str(native_cuda.unusable(device))
    native_cuda._unusable.cache_clear()


@pytest.mark.parametrize("out", KINDS.values(), ids=str)
def test_gradients_are_stored_in_any_dtype(out: torch.dtype) -> None:
    case = make(RowSpec(WIDTH, WIDTH), LABELS, "hh")
    case = lay_out(case, 8, WIDTH + 10)
    result = statistics(NativeBackend(), case)
    ours = gradient(Emulated(), case, result, out)
    torch.testing.assert_close(ours, gradient(NativeBackend(), case, result, out))


def test_no_kernel_spills() -> None:
    """As ``benchmarks/ptxas.py`` found when it last ran."""
    tables = sorted((ROOT / "benchmarks" / "results" / "ptxas").glob("sm_*.json"))
    assert [t.stem for t in tables] == ["sm_100", "sm_80", "sm_90a"]
    for rows in (json.loads(t.read_text())["kernels"] for t in tables):
        assert {r["kernel"].partition("<")[0] for r in rows} == {
            "absorb_kernel", "merge_kernel", "pairs_kernel", "add_kernel", "finalize_kernel",
            "fold_kernel", "vjp_kernel", "scale_kernel",
        }  # fmt: skip
        assert not [r for r in rows if r["spilled"]]
    hopper = json.loads(tables[-1].read_text())["kernels"]
    assert max(r["registers"] for r in hopper) <= 128
