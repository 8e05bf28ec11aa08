"""The Triton backend against the eager one in float64: states, statistics and gradients."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bgkernels import sampling
from bgkernels.backends import triton as triton_backend
from bgkernels.backends import triton_launch
from bgkernels.backends.base import Backend, Tile
from bgkernels.backends.eager import EagerBackend
from bgkernels.backends.triton import TritonBackend
from bgkernels.backends.triton_launch import Launch
from bgkernels.spec import Cap, Mixture, RowSpec, Tilt, TotalVariation
from bgkernels.state import FLOATS, NONE, SKIP, RowState, empty
from bgkernels.stats import DIFFERENTIABLE, TENSOR_FIELDS, Final, add_pairs, assemble, finalize
from bgkernels.vjp import vjp_coefficients
from tests.interpreter import DEVICE, prepare
from tests.yardstick import assert_close

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore:All-NaN")
prepare()
NAN, INF = float("nan"), float("inf")
BLOCK = 64
SMALL = Launch(BLOCK, 4, fill=8)
WIDTH = 2 * BLOCK + 22  # two whole blocks and a bit


def backend(splits: int | None = 1) -> TritonBackend:
    return TritonBackend(SMALL, splits)


@dataclass
class Case:
    """Logits ``(rows, columns)`` and ``(rows, compared)`` amid NaN, labels, and how to cut them."""

    spec: RowSpec
    student: Tensor
    teacher: Tensor | None
    labels: Tensor
    cuts: tuple[int, ...] = ()
    first_row: int = 0

    def tiles(self) -> list[Tile]:
        edges = [0, *self.cuts, self.student.shape[1]]
        out = []
        for start, stop in pairwise(edges):
            end = min(stop, self.spec.compared)
            t = self.teacher[:, start:end] if self.teacher is not None and end > start else None
            out.append(Tile(self.student[:, start:stop], t, self.first_row, start))
        return out

    def to(self, dtype: torch.dtype) -> Case:
        t = None if self.teacher is None else self.teacher.to(dtype)
        return replace(self, student=self.student.to(dtype), teacher=t)


def amid_nan(x: Tensor, dtype: torch.dtype, left: int = 3) -> Tensor:
    """The same values in rows that are strided, misaligned and surrounded by NaN."""
    canvas = torch.full((len(x), x.shape[1] + 11), NAN, dtype=dtype, device=DEVICE)
    view = canvas[:, left : left + x.shape[1]]
    view.copy_(x)
    return view


def make(spec: RowSpec, labels: list[int], dtypes: str = "ff", cuts: tuple[int, ...] = (),
         seed: int = 0) -> Case:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    kinds = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}
    shape = (len(labels), spec.columns)
    s = amid_nan(torch.randn(shape, generator=g) * 3, kinds[dtypes[0]])
    t = torch.randn(len(labels), spec.compared, generator=g) * 3 + s[:, : spec.compared].cpu() / 2
    t = amid_nan(t, kinds[dtypes[1]], left=5) if spec.compared else None
    return Case(spec, s, t, torch.tensor(labels, device=DEVICE), cuts)


def statistics(b: Backend, case: Case) -> tuple[RowState, Final]:
    spec, rows = case.spec, len(case.labels)
    wide = torch.float64 if case.student.dtype == torch.float64 else torch.float32
    device = case.labels.device
    state = empty(rows, len(spec.tilts), dtype=wide, device=device)
    for tile in case.tiles():
        b.absorb_(state, tile, case.labels, spec)
    final = finalize(state, case.labels, spec)
    if spec.second_read:
        count = 3 * len(spec.mixtures) + 2 * spec.total_variation
        sums = torch.zeros(count, rows, dtype=wide, device=device)
        for tile in case.tiles():
            b.absorb_pairs_(sums, tile, final.stats.lse_s, final.stats.lse_t, spec)
        final = add_pairs(final, sums, spec)
    return state, final


def gradient(b: Backend, case: Case, final: Final, dtype: torch.dtype, *,
             in_place: bool = False) -> Tensor:  # fmt: skip
    g = torch.Generator().manual_seed(9)
    like = final.stats.nll

    def random() -> Tensor:
        return torch.randn(len(like), generator=g, dtype=torch.float64).to(like)

    own = {name: random() for name in DIFFERENTIABLE}
    if case.teacher is None:
        own = {name: own[name] for name in ("nll", "lse_hard", "logit_mean")}
    extra = {e: tuple(random() for _ in v) for e, v in final.stats.extras.items()}
    coefficients = vjp_coefficients(final, own, extra, case.spec)
    out = amid_nan(torch.full(case.student.shape, NAN), dtype)
    if in_place:
        out = case.student = amid_nan(case.student, dtype)
    for tile in case.tiles():
        start = tile.first_column
        b.vjp(out[:, start : start + tile.student.shape[1]], tile, coefficients, case.spec)
    return out


def check(case: Case, b: Backend | None = None, *, out: torch.dtype = torch.float32,
          in_place: bool = False, zero_scale: float = 1.0) -> Final:  # fmt: skip
    """Everything that the backend computes, against eager in float64, measured by eager in fp32."""
    b, eager, eps = b or backend(), EagerBackend(), torch.finfo(torch.float32).eps
    (state, final), (s32, f32), (s64, f64) = (
        statistics(x, c)
        for x, c in ((b, case), (eager, case.to(torch.float32)), (eager, case.to(torch.float64)))
    )
    assert state["label"].tolist() == s64["label"].tolist()
    for i, name in specified(case.spec):
        print(name)
        assert_close(state.floats[i], s64.floats[i], s32.floats[i], eps, zero_scale=zero_scale)
    names = [*TENSOR_FIELDS, *(str(e) for e, v in f64.stats.extras.items() for _ in v)]
    tensors = (x.stats.tensors() for x in (final, f32, f64))
    for name, ours, yard, ref in zip(names, *tensors, strict=True):
        print(name)
        if not ours.is_floating_point():
            assert ours.tolist() == ref.tolist()
        elif name != "logit_mean" or case.spec.logit_sum:
            assert_close(ours, ref, yard, eps, zero_scale=zero_scale)
    # The float64 statistics for all, so that the kernel alone is judged.
    narrow = assemble(case.spec, [x.float() if x.is_floating_point() else x for x in f64.flat()])
    ref = gradient(eager, case.to(torch.float64), f64, torch.float64)
    yard = gradient(eager, case.to(torch.float32), narrow, torch.float32)
    ours = gradient(b, case, narrow, out, in_place=in_place)
    assert_close(ours, ref, yard.to(out), torch.finfo(out).eps)
    return final


def specified(spec: RowSpec) -> list[tuple[int, str]]:
    """The float columns of a state that mean something."""
    out = [(i, n) for i, n in enumerate(FLOATS) if n != "z_sum" or spec.logit_sum]
    for k, tilt in enumerate(spec.tilts):
        columns = [(len(FLOATS) + 4 * k + i, f"{n} of {tilt}") for i, n in enumerate("mdkq")]
        out += columns if tilt.moments else columns[:2]
    return out


LABELS = [3, BLOCK, SKIP, WIDTH - 1]
TILTS = (
    Tilt(0, 0.1), Tilt(0.5, 0), Tilt(0.3, 0.6), Tilt(-0.4, 0.7), Tilt(0, 0, True),
    Tilt(0.8, 0, True), Tilt(0.3, 0.3, True),
)  # fmt: skip
CAPS = {"student": Cap(1.5, 8.0), "teacher": Cap(0.5, 12.0)}
PADDED = WIDTH - 30
CASES: dict[str, tuple[RowSpec, str]] = {
    "plain": (RowSpec(WIDTH, WIDTH), "ff"),
    "padded, T": (RowSpec(WIDTH, PADDED, 2.0, logit_sum=True), "bf"),
    "cross-entropy": (RowSpec(WIDTH, 0, logit_sum=True), "h"),
    "argmax": (RowSpec(WIDTH, WIDTH, label_rule="argmax", logit_sum=True), "bb"),
    "argmax, padded": (RowSpec(WIDTH, PADDED, 1.5, "argmax", extras=TILTS[2:5]), "fb"),
    "sample": (RowSpec(WIDTH, PADDED, 0.7, "sample", seed=2**63 - 5, extras=TILTS[:1]), "hh"),
    "tilts": (RowSpec(WIDTH, WIDTH, 1.3, extras=TILTS), "ff"),
    "pairs": (RowSpec(WIDTH, WIDTH, extras=(Mixture(0.5), Mixture(0.1), TotalVariation())), "fb"),
    "capped": (RowSpec(WIDTH, PADDED, 2.0, extras=(Mixture(0.7), Tilt(0, 0.1)), **CAPS), "ff"),
    "scaled": (RowSpec(WIDTH, WIDTH, student=Cap(0.25), teacher=Cap(-2.0)), "hf"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", [False, True])
def test_everything_against_float64(name: str, cut: bool) -> None:
    """Whole, and cut into tiles whose rows are shared by several programs."""
    spec, dtypes = CASES[name]
    labels = LABELS if spec.label_rule == "index" else [NONE, NONE, SKIP, NONE]
    case = make(spec, labels, dtypes, (70, PADDED + 2) if cut else ())
    out = case.student.dtype if cut else torch.float32
    check(case, backend(3 if cut else 1), out=out, in_place=cut)


def test_masked_columns() -> None:
    """-inf in both models, in the teacher alone, in the student alone, and all but the label."""
    extras = (*TILTS, Mixture(0.4), TotalVariation())
    case = make(RowSpec(WIDTH, WIDTH, extras=extras), [3, 5, 7, 9])
    assert case.teacher is not None
    case.student[:, 20:90] = case.teacher[:, 20:90] = -INF
    case.teacher[1, 100] = case.student[2, 101] = -INF
    case.student[3, :9] = case.student[3, 10:] = case.teacher[3, :9] = case.teacher[3, 10:] = -INF
    final = check(case, backend(2))
    assert final.stats.kl_st[1] == final.stats.kl_ts[2] == INF
    assert final.stats.kl_ts[3] == 0


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_extreme_logits(offset: float) -> None:
    """A common offset, one-hot rows of 1e4, equal rows, equal models, and well-known labels."""
    case = make(RowSpec(WIDTH, WIDTH, extras=(Tilt(0, 0.1), Mixture(0.5))), [3, 5, 7, 9, 11])
    assert case.teacher is not None
    case.student[0], case.teacher[0] = 0.0, 1.0
    case.student[1, 70] = case.teacher[1, 90] = 1e4
    case.student[2] = case.teacher[2]
    case.student[3, 9] = 30.0
    case.student += offset
    case.teacher += offset
    check(case)


def test_bad_logits_and_labels() -> None:
    """NaN or +inf, and labels that no column has, make their own row NaN and no other."""
    case = make(RowSpec(WIDTH, WIDTH, extras=(Tilt(0, 0.1), Mixture(0.5))), [3, WIDTH, 5, 6, 7])
    assert case.teacher is not None
    case.student[0, 100], case.student[2, 100], case.teacher[3, 10] = NAN, INF, NAN
    b = backend(2)
    _, final = statistics(b, case)
    bad = [True, True, True, True, False]
    assert (final.stats.kl_ts + final.stats.nll).isnan().tolist() == bad
    assert gradient(b, case, final, torch.float32).isnan().any(1).tolist() == bad


def test_rows_that_take_no_part() -> None:
    """A skipped row is not looked at, and its gradient is zero; no rows are no work."""
    case = make(RowSpec(WIDTH, WIDTH, 2.0, "argmax"), [SKIP, NONE])
    case.student[0] = NAN
    b = backend(2)
    state, final = statistics(b, case)
    fresh = empty(2, 0, dtype=torch.float32, device=DEVICE)
    assert torch.equal(state.floats[:, 0], fresh.floats[:, 0])
    assert torch.equal(state.ints[:, 0], fresh.ints[:, 0])
    assert final.stats.valid.tolist() == [False, True]
    assert gradient(b, case, final, torch.float32)[0].tolist() == [0.0] * WIDTH
    nothing = replace(case, student=case.student[:0], labels=case.labels[:0], teacher=None)
    statistics(b, nothing)


@pytest.mark.parametrize("seed", [7, 2**31, -(2**62) - 12345])
def test_samples_are_those_of_every_backend(seed: int) -> None:
    """Same tokens as plain torch, whatever the cuts, from counters above 32 bits too."""
    rows, first = 3, 2**32 - 5
    spec = RowSpec(WIDTH, WIDTH, 2.0, "sample", seed)
    case = make(spec, [NONE] * rows)
    noise = sampling.gumbel(first, rows, 0, WIDTH, seed, DEVICE)
    assert case.teacher is not None
    expected = (case.teacher + noise).argmax(1).tolist()
    for cuts, splits in (((), 1), ((70,), 1), ((), 3)):
        state, _ = statistics(backend(splits), replace(case, cuts=cuts, first_row=first))
        assert state["label"].tolist() == expected


def test_ties_go_to_the_lowest_column() -> None:
    """In a block, between blocks, programs and tiles, and in any order of tiles."""
    case = make(RowSpec(WIDTH, WIDTH, label_rule="argmax"), [NONE] * 3)
    assert case.teacher is not None
    for row, columns in enumerate(([5, 60], [6, 140], [66, 100])):
        case.teacher[row, columns] = case.student[row, columns] = 50.0
    for cuts, splits in (((), 1), ((), 3), ((70, 120), 1)):
        case.cuts = cuts
        _, final = statistics(backend(splits), case)
        for name in ("label", "argmax_t", "argmax_s"):
            assert getattr(final.stats, name).tolist() == [5, 6, 66]
    state = empty(3, 0, dtype=torch.float32, device=DEVICE)
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
    check(make(RowSpec(40, 40, extras=(Mixture(0.5),)), [3, 5]), TritonBackend(), in_place=True)


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
