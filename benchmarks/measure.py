"""How a step is measured: in a process of its own, interleaved with the others."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import bgkernels as bg
from benchmarks.accuracy import check
from benchmarks.cases import Case, Problem
from benchmarks.entries import ENTRIES, Step
from bgkernels.backends import BACKENDS
from bgkernels.loss.pose import AGREEMENTS
from bgkernels.streaming import driver
from bgkernels.streaming.planner import Plan

PEERS = Path(__file__).parent.parent / ".peers"
"""Packages of single entries, see :mod:`benchmarks.peers`."""
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
POWER = Path("/sys/class/powercap")
PAUSE = 0.05
"""Seconds before a run, in which the threads of the last one stop waiting for more work."""

Sample = dict[str, Any]


def resident(field_name: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the most since the last reset) of this process."""
    with suppress(OSError, StopIteration):
        lines = STATUS.read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith(field_name)).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def settle() -> int:
    """Give freed memory back, the library's too: see :func:`forget`."""
    bg.empty_cache()
    return forget()


def forget() -> int:
    """Give what others freed back, forget the high-water mark, and return what is resident."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        CLEAR_REFS.write_text("5")
    return resident("VmRSS")


def energy() -> float | None:
    """Joules that the processors have used, where the system tells, or None."""
    with suppress(OSError, ValueError):
        files = sorted(POWER.glob("intel-rapl:[0-9]/energy_uj"))
        return sum(int(f.read_text()) for f in files) / 1e6 if files else None
    return None


@dataclass
class Seen:
    """What happened inside the library during a step.

    Args:
        passes: seconds in each primitive of the backend.
        plans: the planner's choices.
        backend: name of the backend that ran.
    """

    passes: dict[str, float] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)
    backend: str = ""


PRIMITIVES = ("absorb_", "finalize", "fold", "vjp")


class Timed:
    """A backend that notes how long its primitives take, in a step's :class:`Seen`."""

    def __init__(self, inner: Any, seen: Seen) -> None:
        self.inner, self.seen = inner, seen

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if name not in PRIMITIVES:
            return value

        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            result = value(*args)
            spent = self.seen.passes.get(name, 0.0) + time.perf_counter() - begin
            self.seen.passes[name], self.seen.backend = spent, self.inner.name
            return result

        return timed


@contextmanager
def observing() -> Iterator[Seen]:
    """Watch the planner and the backends from outside."""
    seen, choose = Seen(), driver.planned

    def planned(*args: Any, **options: Any) -> Plan:
        seen.plans.append(choose(*args, **options))
        return seen.plans[-1]

    timed = {name: Timed(backend, seen) for name, backend in BACKENDS.items()}
    AGREEMENTS.clear()  # they remember the backends
    with mock.patch.dict(BACKENDS, timed), mock.patch.object(driver, "planned", planned):
        yield seen
    AGREEMENTS.clear()


def measure(step: Step, rest: int | None = None) -> Sample:
    """One step: seconds, bytes above `rest`, or what is resident now, and what was seen inside."""
    rest = settle() if rest is None else rest
    with observing() as seen:
        before, begin = energy(), time.perf_counter()
        outcome = step()
        seconds, after = time.perf_counter() - begin, energy()
    peak = resident("VmHWM") - rest
    gradients = sum(g.nbytes for g in outcome.gradients)
    return {
        "seconds": seconds,
        "joules": None if before is None or after is None else after - before,
        "forward": outcome.forward,
        "peak": peak,
        "gradients": gradients,
        "loss": None if outcome.loss is None else outcome.loss.item(),
        "notes": outcome.notes,
        "passes": seen.passes,
        "plans": [_described(p) for p in seen.plans],
        "backend": seen.backend,
    }


def _described(p: Plan) -> dict[str, int]:
    tiles = len(p.tiles())
    sizes = {"chunks": p.chunk_count, "width": p.width, "tiles": tiles, "kept": p.kept}
    return sizes | {"inline": p.inline}


class Worker:
    """A fresh process that runs one entry on one case.

    Its first answer is the check against float64 at a small shape, which also warms it up; each
    further one is a step's sample.
    """

    def __init__(self, name: str, case: Case, folder: str, threads: int) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(other, name, case, folder, threads), daemon=True
        )
        self.process.start()
        other.close()

    def ask(self, timeout: float) -> Sample:
        """The next answer, or ``{"error": why not}``, after which the process is gone."""
        with suppress(OSError):
            self.pipe.send("next")
        try:
            answer: Sample
            if self.pipe.poll(timeout):
                answer = self.pipe.recv()
            else:
                answer = {"error": f"no answer within {timeout:.0f} s"}
        except EOFError:
            self.process.join()
            answer = {"error": f"its process ended: {_fate(self.process.exitcode or 0)}"}
        if "error" in answer:
            self.stop()
        return answer

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()


def _fate(code: int) -> str:
    """What an exit code means."""
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return name + (", probably out of memory" if name == "SIGKILL" else "")


def _serve(pipe: Any, name: str, case: Case, folder: str, threads: int) -> None:
    """Body of a worker: an answer for each question, first the check, then samples."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if (PEERS / name).is_dir():
        sys.path.insert(0, str(PEERS / name))
    torch.set_num_threads(threads)
    try:
        pipe.recv()
        found = check(name, case)
        pipe.send(asdict(found) | {"passed": found.passed})
        if ENTRIES[name].compiles:
            torch._dynamo.reset()  # or the second shape would be compiled for all shapes
        pipe.recv()
        begin = time.perf_counter()
        step = _ready(name, case, folder)
        preparation = time.perf_counter() - begin
        rest = settle()
        while True:
            forget()  # what a step keeps for the next one belongs to its peak
            pipe.send(measure(step, rest) | {"preparation": preparation})
            pipe.recv()
    except EOFError:
        pass
    except Exception as error:  # its reason belongs in the table
        pipe.send({"error": f"{type(error).__name__}: {str(error).strip()[:300]}"})


def _ready(name: str, case: Case, folder: str) -> Step:
    problem, entry = Problem.load(case, folder), ENTRIES[name]
    for tensor in case.tensors:  # mapped memory counts as resident once it was touched
        getattr(problem, tensor).detach().view(-1).view(torch.uint8)[::1024].sum()
    step = entry.start(problem)
    if entry.compiles:
        step()
    return step


def interleave(
    workers: list[Worker], rounds: int, seconds: float, timeout: float,
    tell: Callable[[str, Sample], None],
) -> dict[str, list[Sample]]:  # fmt: skip
    """Samples of each worker, a round at a time, every other round in reverse order.

    Args:
        workers: who runs.
        rounds, seconds: see :class:`benchmarks.cases.Field`.
        timeout: seconds after which an entry is given up.
        tell: called with each name and sample.
    """
    samples: dict[str, list[Sample]] = {w.name: [] for w in workers}
    active = list(workers)
    for _ in range(rounds):
        for worker in list(active):
            time.sleep(PAUSE)
            taken = samples[worker.name]
            taken.append(worker.ask(timeout))
            tell(worker.name, taken[-1])
            spent = sum(s.get("seconds", 0.0) for s in taken)
            if "error" in taken[-1] or (len(taken) > 1 and spent > seconds):
                active.remove(worker)
        active.reverse()
    return samples


def spread(values: list[float]) -> dict[str, Any]:
    """Median, extremes and number of values."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "runs": len(values),
    }
