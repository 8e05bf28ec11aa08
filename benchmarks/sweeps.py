"""How cost grows with tokens, vocabulary and width: points, and slopes on double-log axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.suites import Field

MIDDLE = Case("sweep", 512, 512, 512, 16_384)
AXES: dict[str, tuple[Case, ...]] = {
    "tokens": tuple(replace(MIDDLE, rows=n) for n in (128, 512, 2048)),
    "vocabulary": tuple(replace(MIDDLE, vocab=n) for n in (4096, 16_384, 65_536)),
    "width": tuple(replace(MIDDLE, hidden_s=n, hidden_t=n) for n in (256, 512, 1024)),
}
ENTRIES = ("limit", "fused-128", "dense")


def size(case: Case, axis: str) -> int:
    """Where a case lies on an axis."""
    return {"tokens": case.rows, "vocabulary": case.vocab, "width": case.hidden_s}[axis]


def study(measure: Callable[[Field], dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds and temporaries of each entry at each point; ``measure`` is the runner's."""
    known: dict[Case, dict[str, Any]] = {}
    points = []
    for axis, cases in AXES.items():
        for case in cases:
            field = Field(case, ENTRIES, rounds=3, seconds=3.0)
            known[case] = known.get(case) or measure(field)
            for entry in known[case]["entries"]:
                label = {"axis": axis, "size": size(case, axis), "entry": entry["entry"]}
                points.append(label | _figures(entry))
    return points


def _figures(entry: dict[str, Any]) -> dict[str, Any]:
    if "error" in entry:
        return {"error": entry["error"]}
    seconds, memory = entry["seconds"]["median"], entry["peak"] - entry["gradients"]
    return {"seconds": seconds, "temporaries": memory}


def slopes(points: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Exponent of the step's time by ``(axis, entry)``: 1 where cost is proportional."""
    found = {}
    for key in dict.fromkeys((p["axis"], p["entry"]) for p in points):
        own = [p for p in points if (p["axis"], p["entry"]) == key and "error" not in p]
        if len(own) > 1:
            x, y = np.log([p["size"] for p in own]), np.log([p["seconds"] for p in own])
            found[key] = float(np.polyfit(x, y, 1)[0])
    return found
