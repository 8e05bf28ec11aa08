"""The numbers of the page of tasks are those of the results that lie beside the benchmarks'."""

from __future__ import annotations

import json
from statistics import mean

import pytest

from bgkernels.training.methods import find
from tests.tree import ROOT

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*/*accuracy-*.json"))
PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")


def sections(results):
    """Setting → method → the rows at the chosen rate."""
    return {
        setting: {
            method: [
                row["measures"]
                for row in results["rows"]
                if (row["setting"], row["method"], row["rate"]) == (setting, method, rate)
            ]
            for method, rate in rates.items()
        }
        for setting, rates in results["rates"].items()
    }


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_shares_of_right_answers_are_the_means_of_the_rows(path) -> None:
    results = json.loads(path.read_text(encoding="utf-8"))
    _, _, table = PAGE.partition(f"**Students of one teacher on {results['config']['task']}")
    table = table.partition("right: share of")[0]
    for setting, methods in sections(results).items():
        part = table.partition(f"| {setting} ")[2]
        lines = {x.split("|")[1].strip(): x for x in reversed(part.splitlines()) if x[:1] == "|"}
        for method, rows in methods.items():
            assert len(rows) == results["config"]["seeds"]
            cells = [cell.split("±")[0].strip() for cell in lines[find(method).title].split("|")]
            for cell, name in zip(cells[2:5], ("right", "greedy", "passed"), strict=True):
                assert float(cell) == pytest.approx(100 * mean(x[name] for x in rows), abs=0.051)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_verdict_stands_in_the_table_of_claims(path) -> None:
    results = json.loads(path.read_text(encoding="utf-8"))
    for found in results["findings"]:
        lines = [x for x in PAGE.splitlines() if x.startswith(f"| {found['claim']['text']} ")]
        assert any(f"{found['difference']['mean']:+.3f}" in x for x in lines), found
        assert any(found["verdict"] in x for x in lines), found


def test_there_are_results() -> None:
    assert RESULTS
