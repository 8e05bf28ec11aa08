"""What every compiled backend is held to: the eager one in float64, primitive by primitive.

States, statistics and gradients are compared, not losses, so that a drift names the function that
drifted. The yardstick is the eager backend in fp32 on the same logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from bgkernels.backends.base import Backend, Tile
from bgkernels.backends.eager import EagerBackend
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.state import FLOATS, RowState, empty
from bgkernels.rows.stats import DIFFERENTIABLE, TENSOR_FIELDS, Final, add_pairs, assemble, finalize
from bgkernels.rows.vjp import vjp_coefficients
from tests.yardstick import assert_close

CPU = torch.device("cpu")
KINDS = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}


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


def statistics(b: Backend, case: Case) -> tuple[RowState, Final]:
    """Pass 1, its second read where the specification asks for one, and the finalised rows."""
    spec, rows = case.spec, len(case.labels)
    wide = torch.float64 if case.student.dtype == torch.float64 else torch.float32
    state = empty(rows, len(spec.tilts), dtype=wide, device=case.student.device)
    for tile in case.tiles():
        b.absorb_(state, tile, case.labels, spec)
    final = finalize(state, case.labels, spec)
    if spec.second_read:
        count = 3 * len(spec.mixtures) + 2 * spec.total_variation
        sums = torch.zeros(count, rows, dtype=wide, device=case.student.device)
        for tile in case.tiles():
            b.absorb_pairs_(sums, tile, final.stats.lse_s, final.stats.lse_t, spec)
        final = add_pairs(final, sums, spec)
    return state, final


def gradient(
    b: Backend,
    case: Case,
    final: Final,
    dtype: torch.dtype,
    *,
    in_place: bool = False,
    names: tuple[str, ...] = DIFFERENTIABLE,
) -> Tensor:
    """Pass 2 for random derivatives by the named statistics and all extras."""
    g = torch.Generator().manual_seed(9)
    like = final.stats.nll

    def random() -> Tensor:
        return torch.randn(len(like), generator=g, dtype=torch.float64).to(like)

    own = {name: x for name in DIFFERENTIABLE if (x := random()) is not None and name in names}
    if case.teacher is None:
        own = {name: x for name, x in own.items() if name in ("nll", "lse_hard", "logit_mean")}
    extra = {e: tuple(random() for _ in v) for e, v in final.stats.extras.items()}
    coefficients = vjp_coefficients(final, own, extra, case.spec)
    out = amid_nan(torch.full_like(case.student, float("nan")), dtype)
    if in_place:
        out = case.student = amid_nan(case.student, dtype)
    for tile in case.tiles():
        start = tile.first_column
        b.vjp(out[:, start : start + tile.student.shape[1]], tile, coefficients, case.spec)
    return out


def specified(spec: RowSpec) -> list[tuple[int, str]]:
    """The float columns of a state that mean something."""
    out = [(i, n) for i, n in enumerate(FLOATS) if n != "z_sum" or spec.logit_sum]
    for k, tilt in enumerate(spec.tilts):
        columns = [(len(FLOATS) + 4 * k + i, f"{n} of {tilt}") for i, n in enumerate("mdkq")]
        out += columns if tilt.moments else columns[:2]
    return out


def check(
    b: Backend,
    case: Case,
    *,
    out: torch.dtype = torch.float32,
    in_place: bool = False,
    zero_scale: float = 1.0,
    names: tuple[str, ...] = DIFFERENTIABLE,
) -> Final:
    """Everything that the backend computes; its statistics are returned."""
    eager, eps = EagerBackend(), torch.finfo(torch.float32).eps
    (state, final), (s32, f32), (s64, f64) = (
        statistics(x, c)
        for x, c in (
            (b, case),
            (eager, case.to(torch.float32)),
            (eager, case.to(torch.float64)),
        )
    )
    assert state["label"].tolist() == s64["label"].tolist()
    for i, name in specified(case.spec):
        print(name)  # shown where the next line fails
        assert_close(state.floats[i], s64.floats[i], s32.floats[i], eps, zero_scale=zero_scale)
    fields = [*TENSOR_FIELDS, *(str(e) for e, v in f64.stats.extras.items() for _ in v)]
    tensors = (x.stats.tensors() for x in (final, f32, f64))
    for name, ours, yard, ref in zip(fields, *tensors, strict=True):
        print(name)
        if not ours.is_floating_point():
            assert ours.tolist() == ref.tolist()
        elif name != "logit_mean" or case.spec.logit_sum:
            assert_close(ours, ref, yard, eps, zero_scale=zero_scale)
    # The float64 statistics for all, so that the kernel alone is judged.
    narrow = assemble(case.spec, [x.float() if x.is_floating_point() else x for x in f64.flat()])
    ref = gradient(eager, case.to(torch.float64), f64, torch.float64, names=names)
    yard = gradient(eager, case.to(torch.float32), narrow, torch.float32, names=names)
    ours = gradient(b, case, narrow, out, in_place=in_place, names=names)
    assert_close(ours, ref, yard.to(out), torch.finfo(out).eps)
    return final
