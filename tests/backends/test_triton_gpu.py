"""The Triton backend on a real device: sizes, synchronisation, devices, graphs, compilations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bgkernels.backends import BACKENDS
from bgkernels.backends import triton as triton_backend
from bgkernels.backends.triton import TritonBackend
from bgkernels.rows.extras import Mixture, Tempered, Tilt
from tests import on_gpu

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows, vocab", on_gpu.SIZES)
def test_more_rows_and_elements_than_small_integers_count(rows: int, vocab: int) -> None:
    on_gpu.some_rows_are_as_alone(TritonBackend(), rows, vocab)


LOSSES: dict[str, dict[str, Any]] = {
    "fused": {},
    "recompute": {"mode": "recompute", "divergence": "generalized_jsd", "temperature": 2.0},
    "sampled": {"target": "teacher_sample", "seed": 3, "divergence": "alpha_beta"},
}


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "triton", TritonBackend())
    on_gpu.nothing_waits("triton", **LOSSES[name])


def test_a_device_that_is_not_current() -> None:
    on_gpu.another_device_serves(TritonBackend())


def test_graph_capture_and_replay() -> None:
    on_gpu.a_graph_replays(TritonBackend())


def test_a_step_with_heads_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "triton", TritonBackend())
    on_gpu.a_step_replays("triton")


def test_sizes_and_numbers_compile_nothing_new() -> None:
    def compiled() -> int:
        made = [
            k for k in vars(triton_backend.kernel_module()).values() if hasattr(k, "device_caches")
        ]
        return sum(len(cache[0]) for kernel in made for cache in kernel.device_caches.values())

    def run(rows: int, vocab: int, temperature: float, a: float) -> None:
        case = on_gpu.on_device(rows, vocab)
        extras = (Tilt(0, a), Tempered(a), Mixture(a))
        case.spec = replace(case.spec, temperature=temperature, extras=extras)
        on_gpu.primitives(TritonBackend(splits=1), case)  # else the device's size decides

    run(300, 4096, 2.0, 0.1)
    before = compiled()
    run(1200, 16_000, 3.0, 0.2)
    assert compiled() == before
