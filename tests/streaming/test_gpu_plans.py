"""What the planner expects of a GPU for the headline's shape, as the documentation shows it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import gpu_plans
from bgkernels.streaming.cost import COST, bare_products

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("gib", "owned", "most"), [(4, False, 1.10), (1, True, 1.20), (1, False, 1.42)]
)
def test_what_plans_differ_in_stays_near_the_bare_products(
    gib: float, owned: bool, most: float
) -> None:
    found = gpu_plans.planned(gpu_plans.HEADLINE, gib, owned=owned)
    assert found.beside_primitives <= most
    assert found.plan.bytes <= gib * 2**30


def test_goals_with_the_primitives() -> None:
    """One is reached. The others are out of reach, as the documentation computes."""
    assert gpu_plans.planned(gpu_plans.HEADLINE, 1).terms.total <= 1.42
    assert gpu_plans.planned(gpu_plans.HEADLINE, 2).terms.total <= 1.17
    found, work = gpu_plans.planned(gpu_plans.HEADLINE, 4), gpu_plans.workload(gpu_plans.HEADLINE)
    assert found.terms.rows > 0.1 and found.terms.total <= 1.13
    chunks = math.ceil(work.rows * 4 * work.columns / 2**30)  # whose codes 1 GiB holds
    owned, byte = gpu_plans.workload(gpu_plans.HEADLINE, owned=True), COST["cuda"].byte
    least = chunks * (8 * work.columns * work.hidden_s * byte + COST["cuda"].chunk)
    assert 1 + found.terms.rows + least / bare_products(owned) > 1.20


def test_four_gibibytes_hold_everything() -> None:
    p = gpu_plans.planned(gpu_plans.HEADLINE, 4).plan
    assert p.kept == len(p.tiles()) == p.coded + 1 and p.chunk_count == 1


def test_the_terms_are_those_of_a_count_by_hand() -> None:
    """Bytes of the 4 GiB plan, from its sizes alone."""
    found, work = gpu_plans.planned(gpu_plans.HEADLINE, 4), gpu_plans.workload(gpu_plans.HEADLINE)
    rows, vocab, hidden = 8192, 128_256, 4096
    assert bare_products(work) == 4 * rows * vocab * hidden
    p, byte = found.plan, COST["cuda"].byte / bare_products(work)
    kept = p.coded / len(p.tiles())
    # fp32 of both models read once, and a code written; then codes read, the last tile's logits as
    # they are; and the gradient written in bf16.
    pairs = rows * vocab * (8 + 4 * kept + 4 * kept + 8 * (1 - kept) + 2)
    assert found.terms.rows == pytest.approx(pairs * byte)
    assert found.terms.sums == pytest.approx(8 * rows * hidden * len(p.tiles()) * byte)
    codes = p.coded - p.lent
    in_work, sum_x = p.chunk * p.width * (8 + 2), 4 * rows * hidden
    told = codes * p.slot_bytes + in_work + sum_x
    assert told <= p.bytes <= 1.01 * told


def test_a_device_that_cannot_add_in_place_pays_for_it() -> None:
    from dataclasses import replace

    from bgkernels.streaming.cost import estimate

    work, p = gpu_plans.workload(gpu_plans.HEADLINE), gpu_plans.planned(gpu_plans.HEADLINE, 4).plan
    beside = replace(work, sum_traffic=16, scratch_bytes=4)
    assert estimate(beside, p).sums == 2 * estimate(work, p).sums


def test_the_documentation_shows_these_tables() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    for line in (*gpu_plans.headline_table(), *gpu_plans.pairs_table()):
        assert line in page, "python -m benchmarks.gpu_plans prints what docs/gpu.md must hold"
