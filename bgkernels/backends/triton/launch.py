"""This module says how Triton kernels are started: by defaults, or by timing where asked for.

With ``BGKERNELS_TRITON_TUNE=file.json`` in the environment, the first call of each kind of kernel
on each kind of device times the candidates, which waits for the device, and the file remembers the
fastest for later runs.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bgkernels.rows.spec import RowSpec

VARIABLE = "BGKERNELS_TRITON_TUNE"
RUNS = 5


@dataclass(frozen=True)
class Launch:
    """A launch says how a kernel is started.

    Args:
        block: columns a step.
        warps: warps a program.
        fill: warps a multiprocessor should have; where rows are too few, programs share a row.
        registers: limit a thread, on NVIDIA. Without one the assembler aims at round numbers of
            warps and spills a few bytes to get there.
    """

    block: int
    warps: int
    fill: int
    registers: int | None = None

    @property
    def lanes(self) -> int:
        """Return the number of threads, or fewer where a block is less than 8 columns of each."""
        return min(32 * self.warps, self.block // 8)

    def options(self, cuda: bool) -> dict[str, int]:
        """Return the options of the compiler."""
        limit = {"maxnreg": self.registers} if cuda and self.registers else {}
        return {"num_warps": self.warps, **limit}


def launch_of(kernel: str, spec: RowSpec, coded: bool = False) -> Launch:
    """Return the default, from compiled code (registers, instructions), not yet from timings.

    Few warps a program, so that many programs share a multiprocessor and the loads of one run under
    the arithmetic of another; 16-byte loads; no spills (``tests/backends/test_triton_compile.py``).
    """
    capped = bool(spec.student.cap or spec.teacher.cap)
    if kernel == "absorb":
        # A block costs an exchange of maxima and moving sums to them, so that blocks are long:
        # 32 columns a thread where that leaves 12 warps their registers, 16 where more is alive.
        sample = spec.label_rule == "sample"
        extras = [extra for extra in spec.extras if not extra.second_read]
        # The compiler drops sums that no field reads.
        sums = sum(min(len(extra.sums), len(extra.fields) + 1) for extra in extras)
        light = spec.shared_softmax and sums <= 2 and not sample and not coded
        alive = sums + 4 * sample + 4 * capped
        registers = 168 if alive <= 6 else 200 if alive <= 10 else 240
        return Launch(2048 if light else 1024, 2, 8, registers)  # sharing a row costs a launch
    if kernel == "reread":
        return Launch(1024, 2, 8, 168 if capped else None)
    # Nothing is reduced: short blocks, few registers, many warps; sharing a row is free.
    return Launch(1024, 4, 32)


def candidates(kernel: str) -> list[Launch]:
    """Return the launches that are timed beside the default."""
    if kernel == "vjp":
        return [Launch(n * w, w, 32) for n in (128, 256, 512) for w in (2, 4, 8)]
    limits = (128, 168, 255)
    return [Launch(n * w, w, 8, r) for n in (512, 1024) for w in (1, 2, 4, 8) for r in limits]


def tuning(device: torch.device) -> str | None:
    """Return the file of tuned launches, or None where tuning is not asked for or impossible."""
    path = os.environ.get(VARIABLE)
    capturing = path and device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return None if capturing else path


def tuned(
    path: str,
    kernel: str,
    kind: str,
    default: Launch,
    device: torch.device,
    run: Callable[[Launch], None],
) -> Launch:
    """Return the fastest launch, timed now or read from the file.

    Args:
        path: of the file.
        kernel: absorb, reread or vjp.
        kind: all else that the choice may depend on.
        default: what :func:`launch_of` says.
        device: of the tensors.
        run: starts the kernel on scratch memory.

    Raises:
        ValueError: the file holds something else.
    """
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else device.type
    key, launches = f"{name}: {kernel} {kind}", _load(path)
    if key not in launches:
        best = min((default, *candidates(kernel)), key=lambda x: _milliseconds(x, run, device))
        launches[key] = best
        _save(path, launches)
    return launches[key]


@functools.cache
def _load(path: str) -> dict[str, Launch]:
    try:
        return {k: Launch(**x) for k, x in json.loads(Path(path).read_text()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{VARIABLE} names {path}, which holds no tuned launches ({error}); "
            "delete the file, or name another"
        ) from error


def _save(path: str, launches: dict[str, Launch]) -> None:
    """Write the file as a whole: several processes may tune at once, and the last one wins."""
    temporary = Path(f"{path}.{os.getpid()}")
    temporary.write_text(json.dumps({k: asdict(x) for k, x in launches.items()}, indent=1))
    temporary.replace(path)


def _milliseconds(launch: Launch, run: Callable[[Launch], None], device: torch.device) -> float:
    """Return the time of the fastest of a few runs; infinite where it does not compile."""
    try:
        run(launch)
    except Exception:  # a candidate that a device refuses is no candidate
        return float("inf")
    if device.type != "cuda":
        return launch.block  # nothing to measure in the interpreter
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(launch)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(min(times))
