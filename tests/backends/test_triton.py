"""The Triton backend against the eager one in float64, primitive by primitive."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bgkernels.backends import triton as triton_backend
from bgkernels.backends.triton import TritonBackend
from bgkernels.backends.triton import launch as triton_launch
from bgkernels.backends.triton.launch import Launch
from bgkernels.rows import sampling
from bgkernels.rows.arithmetic import NONE, SKIP
from bgkernels.rows.extras import Mixture, Tempered, Tilt, TotalVariation
from bgkernels.rows.spec import Cap, RowSpec
from bgkernels.rows.state import empty
from tests import conformance
from tests.conformance import check, gradient, statistics
from tests.interpreter import DEVICE, prepare

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore:All-NaN")
prepare()
NAN, INF = float("nan"), float("inf")
BLOCK = 64
SMALL = Launch(BLOCK, 4, fill=8)
WIDTH = 2 * BLOCK + 22  # two whole blocks and a bit


def backend(splits: int | None = 1) -> TritonBackend:
    return TritonBackend(SMALL, splits)


make = functools.partial(conformance.make, device=DEVICE)


LABELS = [3, BLOCK, SKIP, WIDTH - 1]
TILTS = (
    Tilt(0, 0.1), Tilt(0.5, 0), Tilt(0.3, 0.6), Tilt(-0.4, 0.7), Tilt(0, 0, True),
    Tilt(0.8, 0, True), Tilt(0.3, 0.3, True),
)  # fmt: skip
EVERY_KIND = (
    Mixture(0.5), Tilt(0, 0.1), Tempered(), TotalVariation(), Tilt(0.3, 0.3, True), Mixture(0.1),
    Tempered(0.7),
)  # fmt: skip
CAPS = {"student": Cap(1.5, 8.0), "teacher": Cap(0.5, 12.0)}
PADDED = WIDTH - 30
WHOLE, CUT = (), (70, PADDED + 2)
CASES: dict[str, tuple[RowSpec, str, tuple[int, ...]]] = {
    "plain": (RowSpec(WIDTH, WIDTH), "ff", WHOLE),
    "plain, cut": (RowSpec(WIDTH, WIDTH), "fb", CUT),
    "padded, T": (RowSpec(WIDTH, PADDED, 2.0, logit_sum=True), "bf", WHOLE),
    "cross-entropy": (RowSpec(WIDTH, 0, logit_sum=True), "h", CUT),
    "argmax": (RowSpec(WIDTH, WIDTH, label_rule="argmax", logit_sum=True), "bb", CUT),
    "argmax, padded": (RowSpec(WIDTH, PADDED, 1.5, "argmax", extras=EVERY_KIND[1:5]), "fb", CUT),
    "sample": (RowSpec(WIDTH, PADDED, 0.7, "sample", 2**63 - 5, extras=TILTS[:1]), "hh", WHOLE),
    "tilts": (RowSpec(WIDTH, WIDTH, 1.3, extras=TILTS), "ff", CUT),
    "every kind": (RowSpec(WIDTH, WIDTH, extras=EVERY_KIND), "fb", WHOLE),
    "capped": (RowSpec(WIDTH, PADDED, 2.0, extras=EVERY_KIND[:3], **CAPS), "ff", CUT),
    "scaled": (RowSpec(WIDTH, WIDTH, student=Cap(0.25), teacher=Cap(-2.0)), "hf", WHOLE),
}


@pytest.mark.parametrize("name", CASES)
def test_every_primitive_against_float64(name: str) -> None:
    """Whole, or cut into tiles whose rows are shared by several programs."""
    spec, dtypes, cuts = CASES[name]
    labels = LABELS if spec.label_rule == "index" else [NONE, NONE, SKIP, NONE]
    case = make(spec, labels, dtypes, cuts)
    out = case.student.dtype if cuts else torch.float32
    check(backend(3 if cuts else 1), case, out=out, in_place=bool(cuts))


def test_a_gradient_is_scaled_by_a_number_of_the_device() -> None:
    conformance.check_scale(backend(), DEVICE)


CODED: dict[str, tuple[RowSpec, str, tuple[int, ...]]] = {
    "plain, cut": (RowSpec(WIDTH, WIDTH), "ff", CUT),
    "padded, T": (RowSpec(WIDTH, PADDED, 2.0, logit_sum=True), "ff", WHOLE),
    "argmax": (RowSpec(WIDTH, WIDTH, label_rule="argmax"), "bb", CUT),
    "kinds": (RowSpec(WIDTH, WIDTH, 1.5, extras=EVERY_KIND[:3]), "ff", CUT),
    "signs": (RowSpec(WIDTH, WIDTH, extras=EVERY_KIND[3:4]), "ff", CUT),
    "capped": (RowSpec(WIDTH, PADDED, 2.0, extras=EVERY_KIND[:3], **CAPS), "ff", WHOLE),
}


@pytest.mark.parametrize("name", CODED)
def test_codes_instead_of_logits(name: str) -> None:
    spec, dtypes, cuts = CODED[name]
    labels = LABELS if spec.label_rule == "index" else [NONE, NONE, SKIP, NONE]
    case = make(spec, labels, dtypes, cuts)
    assert case.teacher is not None
    if name != "signs":  # which are anything where the models are nearly equal
        case.teacher[1] = case.student[1, : spec.compared] + 1e-3
    case.student[0, 20:30] = case.teacher[0, 20:40] = -INF
    case.student[3, 7] = NAN
    for block in (BLOCK, BLOCK // 2):
        conformance.check_codes(backend(3 if cuts else 1), case, block)


def test_a_kernel_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(RowSpec(WIDTH, WIDTH), LABELS)

    def broken(*_: object, **__: object) -> None:
        raise TypeError("of a compiler")

    monkeypatch.setattr(TritonBackend, "_launch", broken)
    with pytest.raises(RuntimeError, match=r"`absorb` for \(4, 150\) in torch.float32.*compiler"):
        statistics(backend(), case)


def test_masked_columns() -> None:
    """-inf in both models, in the teacher alone, in the student alone, and all but the label."""
    extras = (*TILTS[1:6], Tempered(2.0), Mixture(0.4), TotalVariation())
    case = make(RowSpec(WIDTH, WIDTH, extras=extras), [3, 5, 7, 9])
    assert case.teacher is not None
    case.student[:, 20:90] = case.teacher[:, 20:90] = -INF
    case.teacher[1, 100] = case.student[2, 101] = -INF
    case.student[3, :9] = case.student[3, 10:] = case.teacher[3, :9] = case.teacher[3, 10:] = -INF
    result = check(backend(2), case)
    assert result["kl_st"][1] == result["kl_ts"][2] == INF
    assert result["kl_ts"][3] == 0


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_extreme_logits(offset: float) -> None:
    """A common offset, one-hot rows of 1e4, equal rows, equal models, and well-known labels."""
    extras = (Tilt(0, 0.1), Tempered(3.0), Mixture(0.5))
    case = make(RowSpec(WIDTH, WIDTH, extras=extras), [3, 5, 7, 9, 11])
    assert case.teacher is not None
    case.student[0], case.teacher[0] = 0.0, 1.0
    case.student[1, 70] = case.teacher[1, 90] = 1e4
    case.student[2] = case.teacher[2]
    case.student[3, 9] = 30.0
    case.student += offset
    case.teacher += offset
    check(backend(), case)


def test_bad_logits_and_labels() -> None:
    """NaN or +inf, and labels that no column has, make their own row NaN and no other."""
    case = make(RowSpec(WIDTH, WIDTH, extras=(Tilt(0, 0.1), Mixture(0.5))), [3, WIDTH, 5, 6, 7])
    assert case.teacher is not None
    case.student[0, 100], case.student[2, 100], case.teacher[3, 10] = NAN, INF, NAN
    b = backend(2)
    result = statistics(b, case)
    bad = [True, True, True, True, False]
    assert (result["kl_ts"] + result["nll"]).isnan().tolist() == bad
    assert gradient(b, case, result, torch.float32).isnan().any(1).tolist() == bad


def test_rows_that_take_no_part() -> None:
    """A skipped row is not looked at, and its gradient is zero; no rows are no work."""
    case = make(RowSpec(WIDTH, WIDTH, 2.0, "argmax", extras=EVERY_KIND[:3]), [SKIP, NONE])
    case.student[0] = NAN
    b = backend(2)
    result = statistics(b, case)
    fresh = empty(2, case.spec, dtype=torch.float32, device=DEVICE)
    assert torch.equal(result.state.floats[:, 0], fresh.floats[:, 0])
    assert result.state.ints[:, 0].tolist() == [SKIP, NONE, NONE]  # as finalize marks it
    assert not result.values[:, 0].any()
    assert gradient(b, case, result, torch.float32)[0].tolist() == [0.0] * WIDTH
    nothing = replace(case, student=case.student[:0], labels=case.labels[:0], teacher=None)
    result = statistics(b, nothing)
    assert gradient(b, nothing, result, torch.float32).shape == (0, WIDTH)


def test_a_state_that_is_not_contiguous_is_refused() -> None:
    case = make(RowSpec(WIDTH, WIDTH), [3, 5])
    state = empty(4, case.spec, dtype=torch.float32, device=DEVICE)
    strided = replace(state, floats=state.floats[:, ::2])
    with pytest.raises(ValueError, match="`state` must be contiguous"):
        backend().absorb_(strided, case.tiles()[0], case.labels, case.spec)


@pytest.mark.parametrize("seed", [2**31, -(2**62) - 12345])
def test_samples_are_those_of_every_backend(seed: int) -> None:
    """Same tokens as plain torch, whatever the cuts, from counters above 32 bits too."""
    rows, first = 3, 2**32 - 5
    spec = RowSpec(WIDTH, WIDTH, 2.0, "sample", seed)
    case = make(spec, [NONE] * rows)
    noise = sampling.gumbel(first, rows, 0, WIDTH, seed, DEVICE)
    assert case.teacher is not None
    expected = (case.teacher + noise).argmax(1).tolist()
    for cuts, splits in (((), 3), ((70,), 1)):
        result = statistics(backend(splits), replace(case, cuts=cuts, first_row=first))
        assert result["label"].tolist() == expected


def test_ties_go_to_the_lowest_column() -> None:
    """In a block, between blocks, programs and tiles, and in any order of tiles."""
    case = make(RowSpec(WIDTH, WIDTH, label_rule="argmax"), [NONE] * 3)
    assert case.teacher is not None
    for row, columns in enumerate(([5, 60, 130], [6, 140, 145], [66, 100, 149])):
        case.teacher[row, columns] = case.student[row, columns] = 50.0
    for cuts, splits in (((), 1), ((), 3), ((70, 120), 1)):
        case.cuts = cuts
        result = statistics(backend(splits), case)
        assert result["label"].tolist() == [5, 6, 66]
        for name in ("argmax_t", "argmax_s"):  # of all columns, the label's too
            assert result[name].tolist() == [5, 6, 66]
    state = empty(3, case.spec, dtype=torch.float32, device=DEVICE)
    for tile in reversed(case.tiles()):
        backend().absorb_(state, tile, case.labels, case.spec)
    assert state["label"].tolist() == [5, 6, 66]


def test_tuning_remembers_the_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_milliseconds", lambda launch, run, device: launch.block)
    path, tried = str(tmp_path / "tuned.json"), []
    default, kind = Launch(2048, 2, fill=8), "fp32"
    best = triton_launch.tuned(path, "vjp", kind, default, DEVICE, tried.append)
    assert best.block == min(x.block for x in triton_launch.candidates("vjp"))
    triton_launch._load.cache_clear()
    monkeypatch.setattr(triton_launch, "candidates", lambda kernel: [])
    assert triton_launch.tuned(path, "vjp", kind, default, DEVICE, tried.append) == best
    assert triton_launch.tuned(path, "absorb", kind, default, DEVICE, tried.append) == default


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text('["a list"]')
    with pytest.raises(ValueError, match=r"tuned\.json, which holds no tuned launches"):
        triton_launch.tuned(str(path), "vjp", "fp32", Launch(64, 1, fill=8), DEVICE, print)


def test_tuning_leaves_results_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trials run on scratch memory, in pass 1 as in a pass 2 that overwrites its input."""
    monkeypatch.setenv(triton_launch.VARIABLE, str(tmp_path / "tuned.json"))
    monkeypatch.setattr(triton_launch, "candidates", lambda kernel: [replace(SMALL, warps=2)])
    monkeypatch.setattr(triton_launch, "_milliseconds", lambda x, run, _: run(x) or -x.warps)
    check(TritonBackend(), make(RowSpec(40, 40, extras=EVERY_KIND[:2]), [3, 5]), in_place=True)


def test_reasons() -> None:
    b, fp32 = TritonBackend(), (torch.float32,)
    assert b.supports(DEVICE, (torch.float32, torch.bfloat16, torch.float16)) is None
    assert "float64" in str(b.supports(DEVICE, (torch.float32, torch.float64)))
    assert "meta" in str(b.supports(torch.device("meta"), fp32))


def test_reasons_without_triton_or_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reason = TritonBackend().supports(torch.device("cpu"), (torch.float32,))
    assert "TRITON_INTERPRET=1" in str(reason)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    triton_backend._import_error.cache_clear()
    assert "not installed" in str(TritonBackend().supports(torch.device("cpu"), (torch.float32,)))
    triton_backend._import_error.cache_clear()


def test_importing_the_package_leaves_triton_alone() -> None:
    code = "import sys, bgkernels.backends.triton; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
