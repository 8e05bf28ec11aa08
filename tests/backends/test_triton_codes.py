"""Whole steps whose tiles are kept in codes that Triton's kernels write and read."""

from __future__ import annotations

import pytest

from bgkernels.backends import BACKENDS
from bgkernels.backends.triton import TritonBackend
from bgkernels.rows.extras import Tilt
from bgkernels.streaming import kept
from tests import coded_steps
from tests.interpreter import DEVICE, prepare

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore:All-NaN")
prepare()


@pytest.mark.parametrize("name", coded_steps.CASES)
def test_a_step_from_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "triton", TritonBackend())
    coded_steps.check("triton", DEVICE, name, monkeypatch)


def test_statistics_of_improbable_columns_are_not_coded() -> None:
    """A code says of a column far below the maxima that it is ruled out."""
    assert all(map(kept._fades, (Tilt(0, 0.1), Tilt(0.5, 0.5, True))))
    assert not any(map(kept._fades, (Tilt(0, 0, True), Tilt(-0.4, 0.7), Tilt(0, 1e-3))))
