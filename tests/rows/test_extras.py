"""Each extra statistic: its values, its derivatives, and its place among others."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from bgkernels.rows.arithmetic import SKIP
from bgkernels.rows.extras import KINDS, Extra, Mixture, Tempered, Tilt, TotalVariation
from bgkernels.rows.spec import COEFFICIENTS, FIELDS, FLOATS, RowSpec
from tests import dense
from tests.gradients import LABELS, SPECS, check, ours, places
from tests.problems import DTYPES, Failures, cells, normal
from tests.situations import (
    COLUMNS,
    EXTRAS,
    ROWS,
    SIGNED,
    Situation,
    columns,
    ranges,
    situations,
    statistics,
)

ON = pytest.mark.parametrize(("backend", "dtype"), cells("fp64", "fp32"))
MORE = (Tilt(0.5, 0.0), Tilt(-0.4, 0.7), Tilt(0.0, 0.3, moments=True), Mixture(0.8), Tempered(6.0))
"""Other parameters of the same kinds."""


def public(spec: RowSpec) -> dict[str, int]:
    """Rows of the statistics of extras that users see, by name."""
    return {
        f"{name} of {extra}": part.start + k
        for extra, part in zip(spec.extras, spec.fields, strict=True)
        for k, name in enumerate(extra.fields[: extra.public])
    }


@ON
@given(situations())
def test_values_are_those_of_dense_rows(backend: str, dtype: str, situation: Situation) -> None:
    z, v, labels, spec = situation
    z, v = z.to(DTYPES[dtype]), v.to(DTYPES[dtype])
    _, out = statistics((z, v, labels, spec), ranges([9, 21]), backend)
    chosen = out["label"]
    known = (chosen >= 0) & (chosen < COLUMNS)
    pair = z.double(), v[:, : spec.compared].double()
    of = dense.fields(*pair, chosen.where(known, 0), spec.temperature, spec.extras)
    tolerance = 1e-10 if dtype == "fp64" else 2e-5
    for name, i in public(spec).items():
        torch.testing.assert_close(
            out.values[i][known], of[name][known], rtol=tolerance, atol=tolerance, equal_nan=True,
            msg=lambda message, name=name: f"{name}: {message}",
        )  # fmt: skip


@ON
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("style", "extras"),
    [("normal", EXTRAS + SIGNED), ("normal", MORE), ("ties", EXTRAS), ("masked in both", EXTRAS)],
)
def test_derivatives_are_those_of_dense_rows(
    style: str, extras: tuple[Extra, ...], name: str, backend: str, dtype: str
) -> None:
    z, v = (x.to(DTYPES[dtype]) for x in columns(style, 3))
    spec = replace(SPECS[name], extras=extras)
    with Failures() as failures:
        names = [name for name in places(spec) if " of " in name]
        check((z, v, LABELS, spec), backend, names, failures)


@pytest.mark.parametrize("extra", [*EXTRAS, *SIGNED, *MORE], ids=str)
def test_a_statistic_is_what_its_class_says(extra: Extra) -> None:
    """Kind and parameters name it, as they do in a compiled graph; its counts are those it uses."""
    assert KINDS[extra.kind].of(*extra.parameters) == extra
    assert len(extra.parameters) == 3 and 1 <= extra.public <= len(extra.fields)
    spec = RowSpec(COLUMNS, COLUMNS, extras=(TotalVariation(), extra, Tilt(0.0, 0.5)))
    names = (extra.sums, extra.fields, extra.factors)
    lists = ((FLOATS, spec.sums), (FIELDS, spec.fields), (COEFFICIENTS, spec.factors))
    for own, (base, slices) in zip(names, lists, strict=True):
        assert slices[0].start == len(base) and slices[0].stop == slices[1].start
        assert slices[1].stop - slices[1].start == len(own) and slices[1].stop == slices[2].start
    z, v = columns("normal", 1)
    state, out = statistics((z, v, LABELS, spec), ranges([9]))
    assert state.floats.shape == (spec.sum_count, ROWS)
    assert out.values.shape == (spec.field_count, ROWS) and not out.values.isnan().any()


def test_kinds_are_numbered() -> None:
    assert sorted(KINDS) == list(range(len(KINDS)))


@ON
def test_their_order_changes_nothing(backend: str, dtype: str) -> None:
    z, v = (x.to(DTYPES[dtype]) for x in columns("normal", 4))
    results = []
    for extras in (EXTRAS, EXTRAS[::-1]):
        spec = replace(SPECS["warm"], extras=extras)
        situation = (z, v, LABELS, spec)
        _, out = statistics(situation, ranges([9, 21]), backend)
        grads = torch.zeros_like(out.values)
        for k, extra in enumerate(EXTRAS):
            part = spec.fields[extras.index(extra)]
            grads[part.start : part.start + extra.public] = normal(extra.public, ROWS, seed=k)
        gradient = ours(situation, out.values, grads, backend)
        results.append([gradient, *(out.extra(extra) for extra in EXTRAS)])
    for forwards, backwards in zip(*results, strict=True):
        torch.testing.assert_close(forwards, backwards)


@ON
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_tempered_at_the_temperature_of_the_rows_is_the_usual(
    temperature: float, backend: str, dtype: str
) -> None:
    z, v = (x.to(DTYPES[dtype]) for x in columns("offset", 4))
    extra = Tempered(temperature)
    spec = RowSpec(COLUMNS, COLUMNS - 7, temperature, extras=(extra,))
    _, out = statistics((z, v, LABELS, spec), ranges([9, 21]), backend)
    for name, x in zip(Tempered.fields, out.extra(extra), strict=True):
        torch.testing.assert_close(x, out[name], msg=name)


@ON
@pytest.mark.parametrize("style", ["offset", "one-hot"])
@pytest.mark.parametrize(("temperature", "at"), [(2.5, 0.05), (0.05, 20.0), (1.0, 1e4)])
def test_tempered_far_from_the_temperature_of_the_rows(
    temperature: float, at: float, style: str, backend: str, dtype: str
) -> None:
    """No exponential overflows; the error is that of an ulp of the logits."""
    if style == "one-hot":
        z, v = (1e3 * torch.eye(COLUMNS)[rows].double() for rows in (range(6), range(5, 11)))
    else:
        z, v = columns(style, 4)
    extra = Tempered(at)
    spec = RowSpec(COLUMNS, COLUMNS, temperature, extras=(extra,))
    z, v = z.to(DTYPES[dtype]), v.to(DTYPES[dtype])
    _, out = statistics((z, v, LABELS, spec), ranges([9, 21]), backend)
    of = dense.fields(z.double(), v.double(), LABELS, temperature, (extra,))
    largest = max(x.abs().max().item() for x in (z, v))
    valid, tolerance = LABELS != SKIP, 64 * torch.finfo(z.dtype).eps * max(1, largest / at / 32)
    for name, x in zip(Tempered.fields, out.extra(extra), strict=True):
        expected = of[f"{name} of {extra}"][valid]
        torch.testing.assert_close(
            x[valid], expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_is_positive_and_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="`temperature` must be positive and finite; got"):
        Tempered(bad)


@ON
def test_a_tilt_of_temperature_1_at_another(backend: str, dtype: str) -> None:
    """What policies read: ``u`` and ``v`` shrink by ``T``, the exponents grow by it."""
    z, v = (x.to(DTYPES[dtype]) for x in columns("normal", 4))
    tilts = (Tilt(0.0, 0.1), Tilt(0.5, 0.2, moments=True))
    temperature, outs = 2.5, []
    for t, extras in ((1.0, tilts), (temperature, tuple(e.at(temperature) for e in tilts))):
        spec = RowSpec(COLUMNS, COLUMNS, t, extras=extras)
        _, out = statistics((z, v, LABELS, spec), ranges([9, 21]), backend)
        outs.append([out.extra(extra) for extra in extras])
    for cold, warm in zip(*outs, strict=True):
        powers = temperature ** torch.arange(len(warm), dtype=torch.float64)
        torch.testing.assert_close(warm * powers[:, None], cold, rtol=1e-5, atol=1e-6)


@ON
def test_statistics_of_equal_and_of_disjoint_rows(backend: str, dtype: str) -> None:
    z, _ = (x.to(DTYPES[dtype]) for x in columns("normal", 4))
    extras = (TotalVariation(), Mixture(0.3), Tilt(0.0, 0.0))
    spec = RowSpec(COLUMNS, COLUMNS, extras=extras)
    labels = torch.arange(ROWS)
    _, same = statistics((z, z, labels, spec), ranges([9, 21]), backend)
    for extra in extras[:2]:
        assert same.extra(extra)[: extra.public].abs().max() < 1e-6
    assert torch.allclose(same.extra(extras[2]).exp(), torch.tensor(float(COLUMNS)).double())
    left = torch.arange(COLUMNS) < COLUMNS // 2
    pair = (z.masked_fill(side, -math.inf) for side in (left, ~left))
    _, apart = statistics((*pair, labels, spec), ranges([9, 21]), backend)
    logs = torch.tensor([[-math.log(0.3)], [-math.log(0.7)]]).double().expand(2, ROWS)
    torch.testing.assert_close(apart.extra(extras[0])[0], torch.ones(ROWS).double())
    torch.testing.assert_close(apart.extra(extras[1])[:2], logs, rtol=1e-5, atol=0.0)
