"""Gradients of single statistics, by the primitives and by autograd over dense rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bgkernels.backends import BACKENDS
from bgkernels.rows.arithmetic import SKIP
from bgkernels.rows.extras import Tempered
from bgkernels.rows.spec import DIFFERENTIABLE, FIELDS, Cap, RowSpec
from tests import dense
from tests.problems import Failures, normal
from tests.situations import COLUMNS, ROWS, Situation, ranges, statistics, tiles
from tests.yardstick import assert_close

STUDENT_OF_TEMPERED = ("lse_s", "entropy_s", "logp_s")
"""Fields of ``Tempered`` that carry a gradient."""
LABELS = torch.tensor([0, COLUMNS - 1, SKIP, 11, 22, 31])
SPECS = {
    "one softmax": RowSpec(COLUMNS, COLUMNS),
    "fewer columns of the teacher": RowSpec(COLUMNS, COLUMNS - 7),
    "warm": RowSpec(COLUMNS, COLUMNS, temperature=2.5),
    "warm, scaled and capped": RowSpec(
        COLUMNS, COLUMNS - 7, 2.5, student=Cap(-1.5, 8.0), teacher=Cap(0.5, 12.0)
    ),
}  # fmt: skip


def capped(x: Tensor, cap: Cap) -> Tensor:
    """Real logits of raw ones."""
    return cap.cap * torch.tanh(cap.scale * x / cap.cap) if cap.cap else cap.scale * x


def places(spec: RowSpec) -> dict[str, int]:
    """Rows of the statistics that carry a gradient, by the names of ``dense.fields``."""
    rows = {name: FIELDS.index(name) for name in DIFFERENTIABLE}
    for extra, part in zip(spec.extras, spec.fields, strict=True):
        for k, name in enumerate(extra.fields[: extra.public]):
            if not isinstance(extra, Tempered) or name in STUDENT_OF_TEMPERED:
                rows[f"{name} of {extra}"] = part.start + k
    return rows


def ours(
    situation: Situation, values: Tensor, grads: Tensor, backend: str, in_place: bool = False
) -> Tensor:
    """``(ROWS, COLUMNS)``: pass 2, the last tile first."""
    z, v, labels, spec = situation
    z = z.clone()
    out = z if in_place else torch.full_like(z, torch.nan)
    coefficients = BACKENDS[backend].fold(values, grads, labels, spec)
    for tile in reversed(tiles((z, v, labels, spec), ranges([9, 30]))):
        here = out[:, tile.first_column :][:, : tile.student.shape[1]]
        BACKENDS[backend].vjp(here, tile, coefficients, labels, spec)
    return out


def by_autograd(situation: Situation, upstream: dict[str, Tensor]) -> Tensor:
    """The same of the dense fields."""
    z, v, labels, spec = situation
    leaf = z.detach().clone().requires_grad_()
    real = capped(leaf, spec.student), capped(v[:, : spec.compared], spec.teacher)
    fields = dense.fields(*real, labels, spec.temperature, spec.extras)
    valid = labels != SKIP
    total = sum((fields[name] * g.to(z)).where(valid, 0.0).sum() for name, g in upstream.items())
    (gradient,) = torch.autograd.grad(total, leaf)
    return gradient


def check(situation: Situation, backend: str, names: Iterable[str], failures: Failures) -> None:
    """Compare the gradient of each field, and of a random combination of them."""
    z, v, labels, spec = situation
    exact = (z.double(), v.double(), labels, spec)
    _, out = statistics(situation, ranges([9, 30]), backend)
    # An ulp of a tempered logit grows with the ratio of the temperatures.
    ratios = [spec.temperature / e.temperature for e in spec.extras if isinstance(e, Tempered)]
    rows, eps = places(spec), torch.finfo(z.dtype).eps * max([1.0, *ratios])
    upstream = {name: normal(ROWS, seed=40 + i) for i, name in enumerate(names)}
    for name, g in upstream.items():
        if name.startswith("logp"):  # -inf, whatever the logits are
            g[labels >= spec.compared] = 0.0
    for chosen in [list(upstream), *([name] for name in upstream)]:
        grads = torch.zeros_like(out.values)
        for name in chosen:
            grads[rows[name]] = upstream[name]
        wanted = {name: upstream[name] for name in chosen}
        ref, yard = by_autograd(exact, wanted), by_autograd(situation, wanted)
        for in_place in (False, True):
            with failures.cell(chosen[0] if len(chosen) == 1 else "all", in_place):
                gradient = ours(situation, out.values, grads, backend, in_place)
                assert not gradient[2].any()
                assert_close(gradient, ref, yard, eps)
