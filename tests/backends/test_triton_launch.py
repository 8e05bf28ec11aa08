"""What the host passes to Triton, without a device: a driver that compiles but does not launch.

In a process of its own, because in this one the kernels may be interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from bgkernels.backends import triton as host
from bgkernels.backends.base import Tile
from bgkernels.rows.extras import Extra, Mixture, Tempered
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.state import empty


class Launcher:
    """Takes the place of the function that starts a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, *arguments: Any) -> None:
        print(self.name, *arguments[:3])


class Driver:
    """A device of compute capability 9.0 of which nothing but its description exists."""

    launcher_cls = Launcher

    @property
    def utils(self) -> Driver:
        return self

    def load_binary(self, *arguments: Any) -> tuple[int, ...]:
        return 0, 0, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 17, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled() -> int:
    """Variants of kernels that exist by now."""
    made = [k for k in vars(host.kernel_module()).values() if hasattr(k, "device_caches")]
    return sum(len(cache[0]) for kernel in made for cache in kernel.device_caches.values())


def run(spec: RowSpec, rows: int, vocab: int, *, odd: int = 0, splits: int = 1) -> None:
    """All primitives on a tile of ``vocab`` columns; ``odd`` moves what belongs to the rows."""
    spec = replace(spec, columns=vocab, compared=vocab)
    s, t = (torch.zeros(rows, vocab, dtype=torch.bfloat16) for _ in range(2))
    tile, labels = Tile(s, t, odd, 0), torch.zeros(rows + 1, dtype=torch.int64)[odd % 2 :][:rows]
    state = empty(rows, spec, dtype=torch.float32, device=s.device)
    b, values = host.TritonBackend(splits=splits), torch.zeros(spec.field_count, rows + odd % 2)
    values = values.double()[:, odd % 2 :]
    b.absorb_(state, tile, labels, spec)
    b.absorb_(state, tile, labels, spec, (values[0], values[1]))
    b.finalize(state, labels, spec, values)
    b.vjp(s, tile, b.fold(values, values, labels, spec), labels, spec)


def extras(a: float) -> tuple[Extra, ...]:
    return Mixture(a), Tempered(a)


def main() -> None:
    from triton.runtime import driver

    driver.set_active(Driver())
    spec = RowSpec(0, 0, 2.0, "sample", seed=1, extras=extras(0.1))
    run(spec, 300, 4096)
    assert compiled() == 5, compiled()
    other = replace(spec, temperature=3, seed=2**40, extras=extras(0.7))  # an int temperature too
    run(other, 1201, 16384, odd=2**31 - 1)
    run(other, 16384, 128)
    run(other, 7, 2048)
    assert compiled() == 5, compiled()
    run(other, 300, 16384, splits=4)  # writes partial states and sums, and merges them
    run(other, 7, 8192, splits=2)
    assert compiled() == 9, compiled()


def test_sizes_and_numbers_compile_nothing_new() -> None:
    """Nor does the position of a row in its batch, nor the seed."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.backends.test_triton_launch"]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    launched = [line.split() for line in made.stdout.splitlines()]
    names = ["absorb_kernel", "reread_kernel", "finalize_kernel", "fold_kernel", "vjp_kernel"]
    assert [line[0] for line in launched[:5]] == names  # one launch a primitive
    assert launched[0] == ["absorb_kernel", "300", "1", "1"]
    assert ["merge_kernel", "10", "1", "1"] in launched


if __name__ == "__main__":
    main()
