"""What every compiled backend is held to: the eager one in float64, each primitive by itself.

States, statistics, coefficients and gradients are compared, not losses, so that a drift names the
primitive that drifted. The yardstick of passes 1 and 2 is the eager backend in fp32 on the same
logits; between them everything is fp64, and so is the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from bgkernels.backends.base import Backend, Code, Tile
from bgkernels.backends.eager import EagerBackend
from bgkernels.rows.spec import FIELDS, FLOATS, RowSpec
from bgkernels.rows.state import RowState, empty
from tests.yardstick import assert_close

CPU = torch.device("cpu")
KINDS = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}
EAGER = EagerBackend()
DIFFERENTIABLE = ("lse_s", "entropy_s", "kl_ts", "kl_st", "logp_s", "nll", "lse_hard", "logit_mean")
WITHOUT_TEACHER = ("nll", "lse_hard", "logit_mean")


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


@dataclass
class Result:
    """Pass 1 of some rows: the state, and ``(fields, rows)`` fp64 by name."""

    spec: RowSpec
    state: RowState
    values: Tensor

    def __getitem__(self, name: str) -> Tensor:
        if name in ("label", "argmax_s", "argmax_t"):
            return self.state[name]
        return self.values[FIELDS.index(name)]

    def extra(self, i: int) -> Tensor:
        """``(fields, rows)`` of the ``i``-th extra statistic."""
        return self.values[self.spec.fields[i]]


def amid_nan(x: Tensor, dtype: torch.dtype, left: int = 3) -> Tensor:
    """The same values in rows that are strided, misaligned and surrounded by NaN."""
    canvas = torch.full((len(x), x.shape[1] + 11), float("nan"), dtype=dtype, device=x.device)
    view = canvas[:, left : left + x.shape[1]]
    view.copy_(x)
    return view


def make(
    spec: RowSpec,
    labels: list[int],
    dtypes: str = "ff",
    cuts: tuple[int, ...] = (),
    device: torch.device = CPU,
) -> Case:
    """Normal logits of standard deviation 3; the teacher's lean towards the student's."""
    g = torch.Generator().manual_seed(spec.columns)
    s = (3 * torch.randn(len(labels), spec.columns, generator=g)).to(device)
    t = 3 * torch.randn(len(labels), spec.compared, generator=g)
    t = t.to(device) + s[:, : spec.compared] / 2 + 2  # so that no moment of u - v is about zero
    teacher = amid_nan(t, KINDS[dtypes[1]], left=5) if spec.compared else None
    student = amid_nan(s, KINDS[dtypes[0]])
    return Case(spec, student, teacher, torch.tensor(labels, device=device), cuts)


def finalized(b: Backend, state: RowState, labels: Tensor) -> Tensor:
    """Statistics in a matrix of wider rows, amid NaN."""
    shape = (state.spec.field_count, state.floats.shape[1])
    out = amid_nan(torch.zeros(shape, device=labels.device), torch.float64)
    b.finalize(state, labels, state.spec, out)
    return out


def statistics(b: Backend, case: Case) -> Result:
    """Pass 1, its second read where the specification asks for one, and the statistics."""
    spec, labels = case.spec, case.labels
    dtype = torch.promote_types(case.student.dtype, torch.float32)
    state = empty(len(labels), spec, dtype=dtype, device=case.student.device)
    for tile in case.tiles():
        b.absorb_(state, tile, labels, spec)
    values = finalized(b, state, labels)
    if spec.second_read:
        for tile in case.tiles():
            b.absorb_(state, tile, labels, spec, (values[0], values[1]))
        values = finalized(b, state, labels)
    return Result(spec, state, values)


def random_grads(case: Case, values: Tensor, names: tuple[str, ...]) -> Tensor:
    """Derivatives by the named statistics and by what users see of all extras; NaN elsewhere."""
    g, spec = torch.Generator().manual_seed(9), case.spec
    random = torch.randn(values.shape, generator=g, dtype=torch.float64).to(values.device)
    grads = torch.full_like(values, float("nan"))
    for i, name in enumerate(FIELDS):
        if name in DIFFERENTIABLE:
            known = name in names and (case.teacher is not None or name in WITHOUT_TEACHER)
            grads[i] = random[i] if known else 0.0
    for extra, part in zip(spec.extras, spec.fields, strict=True):
        stop = part.start + extra.public
        grads[part.start : stop] = random[part.start : stop]
    return grads


def settled(labels: Tensor, result: Result) -> Tensor:
    """The labels that pass 2 is told: the chosen ones, or SKIP."""
    return torch.where(labels == -2, labels, result["label"])


def differentiated(
    b: Backend, case: Case, coefficients: Tensor, labels: Tensor, dtype: torch.dtype, in_place: bool
) -> Tensor:
    """Pass 2, into rows amid NaN."""
    out = amid_nan(torch.full_like(case.student, float("nan")), dtype)
    if in_place:
        out = case.student = amid_nan(case.student, dtype)
    for tile in case.tiles():
        start = tile.first_column
        to = out[:, start : start + tile.student.shape[1]]
        b.vjp(to, tile, coefficients, labels, case.spec)
    return out


def gradient(
    b: Backend,
    case: Case,
    result: Result,
    dtype: torch.dtype,
    *,
    in_place: bool = False,
    names: tuple[str, ...] = DIFFERENTIABLE,
) -> Tensor:
    """Pass 2 for random derivatives by the named statistics and all extras."""
    labels, grads = settled(case.labels, result), random_grads(case, result.values, names)
    coefficients = b.fold(result.values, grads, labels, case.spec)
    return differentiated(b, case, coefficients, labels, dtype, in_place)


def sums_of(spec: RowSpec) -> list[tuple[int, str]]:
    """The rows of a state that mean something."""
    out = [(i, n) for i, n in enumerate(FLOATS) if n != "z_sum" or spec.logit_sum]
    for extra, part in zip(spec.extras, spec.sums, strict=True):
        rows = [(part.start + k, f"{n} of {extra}") for k, n in enumerate(extra.sums)]
        moments = extra.kind != 0 or extra.parameters[2]
        out += rows if moments else rows[:2]
    return out


def fields_of(spec: RowSpec) -> list[str]:
    """Names of the statistics, in order."""
    return [*FIELDS, *(f"{name} of {extra}" for extra in spec.extras for name in extra.fields)]


def assert_precise(ours: Tensor, ref: Tensor, name: str) -> None:
    """Equal in fp64 but for roundings, beside the largest number of the matrix row."""
    size = ref[ref.isfinite()].abs().max() if ref.isfinite().any() else 0.0
    print(name)  # shown where the next line fails
    torch.testing.assert_close(ours, ref, rtol=1e-11, atol=1e-12 * float(size), equal_nan=True)


def check(
    b: Backend,
    case: Case,
    *,
    out: torch.dtype = torch.float32,
    in_place: bool = False,
    zero_scale: float = 1.0,
    names: tuple[str, ...] = DIFFERENTIABLE,
) -> Result:
    """Every primitive of the backend; its statistics are returned."""
    spec, eps = case.spec, torch.finfo(torch.float32).eps
    narrow, wide = case.to(torch.float32), case.to(torch.float64)
    ours, yard, ref = statistics(b, case), statistics(EAGER, narrow), statistics(EAGER, wide)
    for name in ("label", "argmax_s", "argmax_t"):
        assert ours[name].tolist() == ref[name].tolist()
    for i, name in sums_of(spec):
        print(name)
        tensors = (x.state.floats[i] for x in (ours, ref, yard))
        assert_close(*tensors, eps, zero_scale=zero_scale)
    check_between(b, case, ours, names)
    # The float64 statistics for all, so that the kernel alone is judged.
    labels, grads = settled(case.labels, ref), random_grads(case, ref.values, names)
    coefficients = EAGER.fold(ref.values, grads, labels, spec)
    args = (coefficients, labels)
    expected = differentiated(EAGER, wide, *args, torch.float64, False)
    rough = differentiated(EAGER, narrow, *args, torch.float32, False)
    got = differentiated(b, case, *args, out, in_place)
    print("gradient")
    assert_close(got, expected, rough.to(out), torch.finfo(out).eps)
    return ours


def check_between(b: Backend, case: Case, ours: Result, names: tuple[str, ...]) -> None:
    """What happens between the passes, from the backend's own state and statistics."""
    spec, labels = case.spec, settled(case.labels, ours)
    expected = finalized(EAGER, ours.state, case.labels)
    for name, x, y in zip(fields_of(spec), ours.values, expected, strict=True):
        assert_precise(x, y, name)
    grads = random_grads(case, ours.values, names)
    folded = (x.fold(ours.values, grads, labels, spec) for x in (b, EAGER))
    for i, (x, y) in enumerate(zip(*folded, strict=True)):
        assert_precise(x, y, f"coefficient {i}")


def check_scale(b: Backend, device: torch.device = CPU) -> None:
    """The factor keeps its digits, and 1 changes nothing, not even a bad number's bits."""
    for dtype, wide, shape in (
        (torch.bfloat16, torch.float32, (37, 50)),
        (torch.float16, torch.float64, (3001,)),
        (torch.float32, torch.float32, (1, 4097)),
        (torch.float32, torch.float64, (0, 5)),
    ):
        x = torch.randn(shape, device=device).to(dtype)
        scaled = x.clone()
        factor = torch.tensor(1 / 3, dtype=wide, device=device)
        b.scale_(scaled, factor)
        exact, eps = x.double() * factor.double(), torch.finfo(dtype).eps
        torch.testing.assert_close(scaled.double(), exact, rtol=0.51 * eps, atol=1e-6 * eps)
        mean = (scaled.double() * exact).sum() / exact.square().sum()
        # A factor in the dtype of x would be off in one direction: a third in bf16 by eps / 4.
        assert not x.numel() or abs(mean - 1) < eps / 16, float(mean)
        ones = x.clone()
        b.scale_(ones, torch.ones((), dtype=wide, device=device))
        assert torch.equal(ones, x)


def with_codes(case: Case, block: int, left: int) -> list[Tile]:
    """The tiles of a case with memory for their codes, from column ``left`` of other numbers on."""
    tiles = []
    for tile in case.tiles():
        rows, width = tile.student.shape
        stride = (width + 7) // 4 * 4
        words = torch.full((rows, stride), -7, dtype=torch.int32, device=case.student.device)
        centres = torch.full((rows, 2 * -(-width // block)), float("nan"), device=words.device)
        tiles.append(replace(tile, code=Code(words[:, left : left + width], centres, block)))
    return tiles


def check_codes(b: Backend, case: Case, block: int, left: int = 2) -> None:
    """What codes give is what logits give, to the accuracy of fp16 differences.

    Pass 1 writes them beside the statistics, which they must not change; then the logits are lost.
    """
    spec, labels = case.spec, case.labels
    plain, tiles = statistics(b, case), with_codes(case, block, left)
    state = empty(len(labels), spec, dtype=torch.float32, device=labels.device)
    for tile in tiles:
        b.absorb_(state, tile, labels, spec)
    lost = [replace(t, student=torch.full_like(t.student, float("nan")),
                    teacher=None if t.teacher is None else torch.full_like(t.teacher, float("nan")))
            for t in tiles]  # fmt: skip
    values = finalized(b, state, labels)
    if spec.second_read:
        for tile in lost:
            b.absorb_(state, tile, labels, spec, (values[0], values[1]))
        values = finalized(b, state, labels)
    if not spec.logit_sum:
        values[FIELDS.index("logit_mean")] = plain["logit_mean"]  # anything
    torch.testing.assert_close(values, plain.values, rtol=2e-3, atol=2e-3, equal_nan=True)
    first = slice(0, len(FIELDS))
    close = {
        "rtol": 1e-5,
        "atol": 1e-5,
        "equal_nan": True,
    }  # columns may be summed in another order
    torch.testing.assert_close(values[first], plain.values[first], **close)
    chosen = settled(labels, plain)
    grads = random_grads(case, plain.values, DIFFERENTIABLE)
    coefficients = b.fold(plain.values, grads, chosen, spec)
    ours, exact = (torch.full_like(case.student, 7.0, dtype=torch.float32) for _ in range(2))
    for tile, logits in zip(lost, case.tiles(), strict=True):
        columns = slice(tile.first_column, tile.first_column + tile.student.shape[1])
        b.vjp(ours[:, columns], tile, coefficients, chosen, spec)
        b.vjp(exact[:, columns], logits, coefficients, chosen, spec)
    assert torch.equal(ours.isnan(), exact.isnan())
    ours, exact = ours.nan_to_num(), exact.nan_to_num()
    size = exact.abs().amax(1, keepdim=True)
    # 2^-11/e of the largest probability, times what its derivatives multiply it by.
    assert ((ours - exact).abs() <= 4e-3 * size).all(), ((ours - exact).abs() / size).max()
    assert (ours - exact).norm() <= 1e-3 * exact.norm()
