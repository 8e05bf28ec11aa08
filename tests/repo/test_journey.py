"""The way of a fused step is short: a reader who follows it opens few files.

``python -m benchmarks.journey`` names what the step meets, and times it.
"""

from __future__ import annotations

import pytest
import torch

import bgkernels as bg
from benchmarks.journey import PRIMITIVES, SMALL, Journey, follow, operations, step_of
from bgkernels.backends.base import Tile
from bgkernels.backends.eager import EagerBackend
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.state import empty
from bgkernels.streaming.heads import Needs
from tests.problems import cells

CLASSES, FRAMES, OPERATIONS = 14, 7, 120
FILES = 26
"""No more than today; the aim is 14."""
NATIVE = [b for b, _ in cells("fp32") if b == "native"]


@pytest.fixture(scope="module")
def journey() -> Journey:
    """Of a linear teacher, in a single tile, through the backend that is taken here."""
    return follow(step_of(SMALL[0]))


def test_files_that_are_entered(journey: Journey) -> None:
    assert len(journey.files) <= FILES, sorted(journey.files)


def test_classes_that_are_constructed(journey: Journey) -> None:
    assert len(journey.classes) <= CLASSES, journey.classes


def test_frames_from_the_call_to_the_primitive(journey: Journey) -> None:
    assert set(journey.ways) == set(PRIMITIVES)
    assert journey.frames <= FRAMES, journey.ways


@pytest.mark.skipif(not NATIVE, reason="the eager backend is made of torch operations")
def test_operations_between_the_passes() -> None:
    names = operations(SMALL[0], "native")
    assert 10 < len(names) <= OPERATIONS, names
    assert len(operations(SMALL[0], "eager")) > len(names)


def test_what_a_step_meets_is_seen() -> None:
    """Objects made by constructors, by ``replace`` and as named tuples; the way to a primitive."""
    x, spec = torch.zeros(1, 2), RowSpec(columns=2, compared=0)
    backend = EagerBackend()

    def step() -> None:
        bg.LinearTeacher(x[None], x).flat(1, 2)
        Needs(input=True)
        state = empty(1, spec, dtype=x.dtype, device=x.device)
        backend.absorb_(state, Tile(x, None, 0, 0), torch.tensor([1]), spec)

    found = follow(step)
    assert found.ways == {"absorb_": ["backends/eager.py:absorb_"]}
    assert found.classes["LinearTeacher"] == 2 and found.classes["Needs"] == 1
    assert {"backends/eager.py", "rows/state.py", "streaming/teachers/dense.py"} <= found.files
