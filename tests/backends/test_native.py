"""The compiled backend against the eager one in float64: every CPU target of this machine, and the
CUDA kernels in emulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bgkernels.backends.native import NativeBackend
from bgkernels.rows import sampling
from bgkernels.rows.arithmetic import NONE, SKIP
from bgkernels.rows.extras import Mixture, Tempered, Tilt
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.state import RowState, empty
from tests.backends.cases import (
    BLOCK,
    CASES,
    INF,
    LABELS,
    LANES,
    NAN,
    PADDED,
    PAIRS,
    TILTS,
    WIDTH,
    labels_of,
)
from tests.conformance import (
    CPU,
    DIFFERENTIABLE,
    KINDS,
    check,
    check_scale,
    finalized,
    gradient,
    make,
    random_grads,
    settled,
    statistics,
)

_C = pytest.importorskip("bgkernels.backends.native._C")


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_everything_against_float64(native: NativeBackend, name: str, cut: bool) -> None:
    """Whole, and cut into tiles with the gradient over the logits."""
    spec, dtypes = CASES[name]
    case = make(spec, labels_of(spec), dtypes, (70, PADDED + 2) if cut else ())
    check(native, case, out=case.student.dtype if cut else torch.float32, in_place=cut)


def test_a_gradient_is_scaled_by_a_number_of_the_device(native: NativeBackend) -> None:
    check_scale(native)


EDGES = [1, 3, LANES - 1, LANES, LANES + 1, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 3 * LANES]


@pytest.mark.parametrize("width", EDGES)
@pytest.mark.parametrize("dtypes", ["ff", "bh"])
def test_widths_around_vectors_and_blocks(native: NativeBackend, width: int, dtypes: str) -> None:
    case = make(RowSpec(width, width), [0, width - 1, width // 2], dtypes)
    check(native, case, out=case.student.dtype)
    check(native, make(RowSpec(width + 2, width, 2.0), [0, width + 1, width // 2], dtypes))


GRADS: dict[str, tuple[str, ...]] = {
    "hard": ("nll",),
    "forward": ("kl_ts", "nll"),
    "reverse": ("kl_st", "nll"),
    "entropy": ("entropy_s",),
    "smoothed": ("nll", "logit_mean", "lse_hard"),
    "nothing": (),
}


@pytest.mark.parametrize("names", GRADS.values(), ids=GRADS)
@pytest.mark.parametrize("spec", [CASES[n][0] for n in ("plain", "padded", "tempered")])
def test_objectives_that_need_only_some_terms(
    native: NativeBackend, spec: RowSpec, names: tuple[str, ...]
) -> None:
    """Pass 2 leaves out exponentials whose coefficient is zero."""
    check(native, make(spec, LABELS, "bf"), out=torch.bfloat16, names=names)


@pytest.mark.parametrize("out", KINDS.values(), ids=str)
@pytest.mark.parametrize("dtypes", ["ff", "bb", "hh", "fh"])
def test_output_of_another_dtype(native: NativeBackend, dtypes: str, out: torch.dtype) -> None:
    check(native, make(RowSpec(WIDTH, WIDTH), LABELS, dtypes), out=out)


def test_masked_columns(native: NativeBackend) -> None:
    """-inf in both models, in the teacher alone, in the student alone, and all but the label."""
    extras = (*TILTS[:4], *PAIRS, Tempered(0.5))
    for spec in (RowSpec(WIDTH, WIDTH, extras=extras), RowSpec(WIDTH, PADDED, 2.0)):
        case = make(spec, [3, 5, 7, 9])
        assert case.teacher is not None
        case.student[:, 20:690] = case.teacher[:, 20:690] = -INF
        case.teacher[1, 700] = case.student[2, 701] = -INF
        for x in (case.student[3], case.teacher[3]):
            x[:9] = x[10:] = -INF
        finite = tuple(n for n in DIFFERENTIABLE if n != "kl_st")
        result = check(native, case, names=finite)
        assert result["kl_st"][1] == result["kl_ts"][2] == INF
        assert result["kl_ts"][3] == 0
        dense = gradient(native, case, result, torch.float32, names=("kl_ts",))
        assert not dense[:2, 20:690].any()


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_extreme_logits(native: NativeBackend, offset: float, temperature: float) -> None:
    """A common offset, one-hot rows of 1e4, equal rows, equal models, and well-known labels."""
    spec = RowSpec(WIDTH, WIDTH, temperature, extras=(Tilt(0, 0.1), Mixture(0.5)))
    case = make(spec, [3, 5, 7, 9, 11])
    assert case.teacher is not None
    case.student[0], case.teacher[0] = 0.0, 1.0
    case.student[1, 700] = case.teacher[1, 900] = 1e4
    case.student[2] = case.teacher[2]
    case.student[3, 9] = 30.0
    case.student += offset
    case.teacher += offset
    # The reverse KL of one-hot rows is 5,000, and terms as large cancel in its gradient.
    check(native, case, names=("kl_ts", "nll", "lse_s", "logp_s"))


@pytest.mark.parametrize("columns", [(600,), (70, 800), (3,), (WIDTH - 1,)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bad_logits_and_labels(
    native: NativeBackend, columns: tuple[int, ...], temperature: float
) -> None:
    """NaN of any bits or +inf, and labels that no column has, make their row NaN and no other."""
    extras = (Tilt(0, 0.1), Mixture(0.5))
    case = make(RowSpec(WIDTH, WIDTH, temperature, extras=extras), [3, WIDTH, 5, 6, 7, 8])
    assert case.teacher is not None
    odd_nan = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    for column in columns:
        case.student[0, column], case.student[2, column] = odd_nan, INF
        case.teacher[3, column], case.teacher[4, column] = NAN, INF
    result = statistics(native, case)
    bad = [True] * 5 + [False]
    assert (result["kl_ts"] + result["nll"]).isnan().tolist() == bad
    assert gradient(native, case, result, torch.float32).isnan().any(1).tolist() == bad
    case.teacher, case.spec = None, RowSpec(WIDTH, 0)
    result = statistics(native, case)
    bad = [True, True, True, False, False, False]
    assert result["nll"].isnan().tolist() == bad
    assert gradient(native, case, result, torch.bfloat16).isnan().any(1).tolist() == bad


def test_infinite_moments_stay_infinite(native: NativeBackend) -> None:
    """Where one model masks a column, whatever maxima come later."""
    case = make(RowSpec(WIDTH, WIDTH, extras=(Tilt(0, 0, True),)), [3, 5])
    assert case.teacher is not None
    case.teacher[:, 1], case.student[0, -20:], case.teacher[1, -20:] = -INF, 20.0, 20.0
    state = statistics(native, case).state
    assert state.extra(0)[2:].tolist() == [[INF, INF], [INF, INF]]


def test_rows_that_take_no_part(native: NativeBackend) -> None:
    """A skipped row is not looked at, and its gradient is zero; no rows are no work."""
    case = make(
        RowSpec(WIDTH, WIDTH, 2.0, "argmax", extras=(Tempered(), Mixture(0.5))), [SKIP, NONE]
    )
    case.student[0] = NAN
    result = statistics(native, case)
    fresh = empty(2, case.spec, dtype=torch.float32, device=CPU)
    assert torch.equal(result.state.floats[:, 0], fresh.floats[:, 0])
    assert result.state.ints[:, 0].tolist() == [SKIP, NONE, NONE]
    assert not result.values[:, 0].any()
    assert result.values[:, 1].all()
    assert gradient(native, case, result, torch.float32)[0].tolist() == [0.0] * WIDTH
    statistics(
        native, replace(case, student=case.student[:0], labels=case.labels[:0], teacher=None)
    )


def test_nothing_outside_the_rows_is_written(native: NativeBackend) -> None:
    case = make(RowSpec(BLOCK + 5, BLOCK + 5), [3, 4, SKIP])
    canvas = torch.zeros(3, BLOCK + 16)
    out = canvas[:, 3 : BLOCK + 8]
    result = statistics(native, case)
    copy = gradient(native, case, result, torch.float32)
    case.student = out.copy_(case.student)
    in_place = gradient(native, replace(case), result, torch.float32, in_place=True)
    assert torch.equal(copy, in_place)
    assert not canvas[:, :3].any()
    assert not canvas[:, BLOCK + 8 :].any()


@pytest.mark.parametrize("seed", [7, 2**31, -(2**62) - 12345])
def test_samples_are_those_of_every_backend(native: NativeBackend, seed: int) -> None:
    """Same tokens as plain torch, whatever the cuts, from counters above 32 bits too."""
    rows, first = 40, 2**32 - 5
    spec = RowSpec(WIDTH, WIDTH, 2.0, "sample", seed)
    case = make(spec, [NONE] * rows)
    noise = sampling.gumbel(first, rows, 0, WIDTH, seed, CPU)
    assert case.teacher is not None
    case.teacher[::2] *= 5
    expected = (case.teacher + noise).argmax(1).tolist()
    for cuts in ((), (70,), (BLOCK, 700)):
        result = statistics(native, replace(case, cuts=cuts, first_row=first))
        assert result["label"].tolist() == expected


def test_ties_go_to_the_lowest_column(native: NativeBackend) -> None:
    """In a vector, between vectors, blocks and tiles, and in any order of tiles."""
    case = make(RowSpec(WIDTH, WIDTH, label_rule="argmax"), [NONE] * 3)
    assert case.teacher is not None
    for row, columns in enumerate(([5, 6], [6, 140], [66, 600])):
        case.teacher[row, columns] = case.student[row, columns] = 50.0
    for cuts in ((), (70, 120)):
        case.cuts = cuts
        assert statistics(native, case).state.ints.tolist() == [[5, 6, 66]] * 3
    state = empty(3, case.spec, dtype=torch.float32, device=CPU)
    for tile in reversed(case.tiles()):
        native.absorb_(state, tile, case.labels, case.spec)
    finalized(native, state, case.labels)  # counts the label's column, which was held out
    assert state.ints.tolist() == [[5, 6, 66]] * 3


def test_threads_change_nothing(native: NativeBackend) -> None:
    case = make(RowSpec(WIDTH, PADDED, 2.0, extras=PAIRS), list(range(37)))
    before, results = torch.get_num_threads(), []
    many = RowState(torch.rand(14, 900) + 1, torch.zeros(3, 900, dtype=torch.int64), RowSpec(9, 9))
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            result = statistics(native, case)
            dense = gradient(native, case, result, torch.float32)
            numbers = finalized(native, many, many.ints[0])
            results.append((result.state.floats, result.values, dense, numbers))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_strides_that_need_a_copy(native: NativeBackend) -> None:
    """Logits and a gradient whose inner stride is not 1."""
    case = make(RowSpec(WIDTH, WIDTH), LABELS)
    assert case.teacher is not None
    result = statistics(native, case)
    expected, rows = gradient(native, case, result, torch.float32), len(LABELS)
    case.student, case.teacher = (x.t().contiguous().t() for x in (case.student, case.teacher))
    torch.testing.assert_close(statistics(native, case).state.floats, result.state.floats)
    out, labels = torch.full((WIDTH, rows), NAN).t(), settled(case.labels, result)
    grads = random_grads(case, result.values, DIFFERENTIABLE)
    coefficients = native.fold(result.values, grads, labels, case.spec)
    native.vjp(out, case.tiles()[0], coefficients, labels, case.spec)
    assert torch.equal(out, expected)


def test_what_is_not_supported(native: NativeBackend) -> None:
    assert native.supports(CPU, tuple(KINDS.values())) is None
    assert "float64" in str(native.supports(CPU, (torch.float32, torch.float64)))
    assert "meta" in str(native.supports(torch.device("meta"), (torch.float32,)))
    case = make(RowSpec(8, 8), [1])
    wide = empty(1, case.spec, dtype=torch.float64, device=CPU)
    with pytest.raises(ValueError, match="float32"):
        native.absorb_(wide, case.tiles()[0], case.labels, case.spec)
    many = replace(case.spec, extras=tuple(Tilt(0, 0.1 * i) for i in range(_C.MAX_EXTRAS + 1)))
    with pytest.raises(NotImplementedError, match="at most 8 extra statistics"):
        statistics(native, replace(case, spec=many))
