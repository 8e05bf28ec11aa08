"""A state that has seen every column gives the statistics of the dense rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor

from bgkernels.rows.arithmetic import SKIP
from bgkernels.rows.extras import Tempered
from bgkernels.rows.spec import DIFFERENTIABLE, FIELDS, RowSpec
from bgkernels.rows.stats import TENSOR_FIELDS
from tests import dense
from tests.gradients import LABELS
from tests.problems import DTYPES, cells, normal
from tests.situations import (
    COLUMNS,
    EXTRAS,
    ROWS,
    Situation,
    ranges,
    situations,
    statistics,
)


@pytest.mark.parametrize(("backend", "dtype"), cells("fp64", "fp32"))
@given(situations())
def test_fields_are_those_of_dense_rows(backend: str, dtype: str, situation: Situation) -> None:
    z, v, labels, spec = situation
    spec = replace(spec, extras=())
    z, v = z.to(DTYPES[dtype]), v[:, : spec.compared].to(DTYPES[dtype])
    _, out = statistics((z, v, labels, spec), ranges([9, 21]), backend)
    chosen = out["label"]
    real = (chosen == SKIP) | ((chosen >= 0) & (chosen < COLUMNS))
    expected = dense.fields(z.double(), v.double(), chosen.where(real, 0), spec.temperature)
    valid = chosen != SKIP
    tolerance = 1e-11 if dtype == "fp64" else 1e-5
    for name, x in expected.items():
        x = x.where(real, math.nan)
        torch.testing.assert_close(
            out[name][valid], x[valid], rtol=tolerance, atol=tolerance, equal_nan=True,
            msg=lambda message, name=name: f"{name}: {message}",
        )  # fmt: skip
    assert not out.values[:, ~valid].any()
    for side, x in (("s", z), ("t", v)):
        tempered = x[:, : spec.compared] / spec.temperature  # rounding may make two columns equal
        best = tempered.gather(1, out[f"argmax_{side}"][:, None].clamp_min(0))[:, 0]
        assert torch.equal(best[valid], tempered.amax(1)[valid])


@pytest.mark.parametrize(("backend", "dtype"), cells("fp64", "fp32"))
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_probability_of_a_well_known_label_keeps_its_digits(
    temperature: float, backend: str, dtype: str
) -> None:
    """``rest`` and ``nll`` are about ``e^-40``, which ``1 - p`` rounds away."""
    z, v = (normal(ROWS, COLUMNS, seed=seed) for seed in (1, 2))
    labels = torch.tensor([3, 4, 5, 39, 0, 1])
    for row, logit in enumerate([10.0, 20.0, 40.0, 41.0]):
        z[row, labels[row]] = v[row, labels[row]] = temperature * logit
    spec = RowSpec(COLUMNS, COLUMNS, temperature=temperature)
    situation = (z.to(DTYPES[dtype]), v.to(DTYPES[dtype]), labels, spec)
    _, out = statistics(situation, ranges([9, 21]), backend)

    def others(x: Tensor) -> Tensor:
        p = x.log_softmax(1).exp()
        return p.scatter(1, labels[:, None], 0.0).sum(1)

    expected = {"rest_s": others(z / temperature), "rest_t": others(v / temperature)}
    expected |= {"rest_c": others(z), "logp_t": torch.log1p(-expected["rest_t"])}
    expected |= {"nll": -torch.log1p(-expected["rest_c"])}
    for name, x in expected.items():
        torch.testing.assert_close(out[name], x, rtol=1e-12 if dtype == "fp64" else 1e-5, atol=0.0)


def test_without_a_teacher_only_the_cross_entropy_is_known(backend: str) -> None:
    z = normal(ROWS, COLUMNS, seed=1).float()
    spec = RowSpec(COLUMNS, 0, logit_sum=True)
    _, out = statistics((z, z, torch.arange(ROWS), spec), ranges([11]), backend)
    known = {"nll": -z.double().log_softmax(1).diagonal(), "lse_hard": z.double().logsumexp(1)}
    known |= {"logit_mean": z.double().mean(1), "rest_c": 1 - known["nll"].neg().exp()}
    for name in FIELDS:
        expected = known.get(name, torch.zeros(ROWS, dtype=torch.float64))
        torch.testing.assert_close(out[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_row_stats_are_the_matrix_rows_and_carry_gradients_where_they_say(backend: str) -> None:
    z, v = (normal(ROWS, COLUMNS, seed=seed).float() for seed in (1, 2))
    spec = RowSpec(COLUMNS, COLUMNS, extras=EXTRAS, logit_sum=True, positions=3)
    _, out = statistics((z, v, LABELS, spec), ranges([11]), backend)
    graph = (2 * out.values.clone().requires_grad_()).unbind(0)
    leaves = out.leaves()
    stats = out.row_stats(-7, leaves)
    assert (stats.vocab, stats.positions) == (COLUMNS, 3) and stats.label[2] == -7
    with_gradient = [n for n in TENSOR_FIELDS if getattr(stats, n).requires_grad]
    assert sorted(with_gradient) == sorted(DIFFERENTIABLE)
    assert [len(x) for x in stats.extras.values()] == [e.public for e in EXTRAS]
    for extra, values in stats.extras.items():
        with_gradient = [i for i, x in enumerate(values) if x.requires_grad]
        assert with_gradient == list(extra.differentiable)
        assert torch.equal(torch.stack(values), out.extra(extra)[: extra.public].detach())
    assert list(stats.tempered(0.4)) == list(Tempered.fields)
    assert stats.replaced(stats.tensors()) == stats
    for leaf, row, connected in zip(leaves, graph, out.connected(graph), strict=True):
        assert leaf.is_leaf and leaf.requires_grad == connected.requires_grad
        assert (connected is row) == leaf.requires_grad  # the others have no history
