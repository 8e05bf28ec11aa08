"""How far one step travels: files, classes and frames of ours, torch operations, and time.

``python -m benchmarks.journey`` follows a fused step of a single tile from the public function to
the backend, names what it met, and times small steps beside dense torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bgkernels as bg
from benchmarks.cases import Case, Problem
from benchmarks.dense import dense
from benchmarks.entries import Step, training
from benchmarks.measure import PRIMITIVES
from bgkernels.backends import BACKENDS

PACKAGE = f"{Path(bg.__file__).parent}/"
CONSTRUCTORS = {"__init__": "self", "__new__": "cls", "<lambda>": "_cls"}
"""Functions that make objects, with their first argument; the last is that of named tuples."""
SMALL = (Case("8 × 32 by 512", 8, 32, 32, 512), Case("64 × 64 by 4,096", 64, 64, 64, 4096))


@dataclass
class Journey:
    """What a step met.

    Args:
        files: of the package in which a function was entered, by their paths there.
        classes: of the package, with the number of objects of each that were constructed.
        ways: to each primitive, the functions of ours from the public one on, the primitive's last.
    """

    files: set[str] = field(default_factory=set)
    classes: Counter[str] = field(default_factory=Counter)
    ways: dict[str, list[str]] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """Of ours on the longest of these ways."""
        return max(map(len, self.ways.values()))


def step_of(case: Case, backend: str = "auto") -> Step:
    """A fused step of the default loss, which fits in a single tile."""

    def loss(problem: Problem) -> Tensor:
        teacher = bg.LinearTeacher(problem.t_input, problem.t_weight)
        value = bg.linear_hybrid_distillation(
            problem.input, problem.weight, teacher, problem.target, backend=backend
        )
        assert isinstance(value, Tensor)
        return value

    return training(loss)(Problem.of(case))


def follow(step: Callable[[], object], before: Callable[[], object] | None = None) -> Journey:
    """Describe a step that has been run before, or that runs after another one."""
    (before or step)()
    journey = Journey()

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event != "call":
            return
        code = frame.f_code
        owner = frame.f_locals.get(CONSTRUCTORS.get(code.co_name, ""))
        if owner is not None:
            cls = owner if isinstance(owner, type) else type(owner)
            if cls.__module__.startswith("bgkernels"):
                journey.classes[cls.__qualname__] += 1
        if code.co_filename.startswith(PACKAGE):
            file = code.co_filename.removeprefix(PACKAGE)
            journey.files.add(file)
            if code.co_name in PRIMITIVES and file.startswith("backends/"):
                journey.ways.setdefault(code.co_name, _way(frame))

    sys.setprofile(watch)
    try:
        step()
    finally:
        sys.setprofile(None)
    return journey


def _way(frame: FrameType | None) -> list[str]:
    """The functions of ours that are running, the outermost first."""
    functions = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            functions.append(f"{code.co_filename.removeprefix(PACKAGE)}:{code.co_name}")
        frame = frame.f_back
    return functions[::-1]


class Operations(TorchDispatchMode):
    """Counts torch operations from the end of a chunk's pass 1 to the beginning of its pass 2."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.between = False

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.between:
            self.names.append(f.name())
        return f(*args, **(kwargs or {}))


@contextmanager
def counted(backend: str) -> Iterator[Operations]:
    """The operations of the steps inside, of one chunk of one tile each."""
    counter = Operations()

    def bounded(method: Callable[..., Any], *, ends: bool) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counter.between = False
            result = method(*args)
            counter.between = ends
            return result

        return call

    b = BACKENDS[backend]
    with (
        mock.patch.object(b, "absorb_", bounded(b.absorb_, ends=True)),
        mock.patch.object(b, "vjp", bounded(b.vjp, ends=False)),
        counter,
    ):
        yield counter


def operations(case: Case, backend: str) -> list[str]:
    """Names of the torch operations between the passes of a chunk, with the default loss."""
    step = step_of(case, backend)
    step()
    with counted(backend) as counter:
        step()
    return counter.names


def seconds(case: Case, backend: str = "auto", runs: int = 200) -> tuple[float, float]:
    """The least times of a step of ours and of dense torch, which take turns."""
    steps = step_of(case, backend), training(dense)(Problem.of(case))
    least = [float("inf")] * 2
    for _ in range(runs):
        for i, step in enumerate(steps):
            begin = time.perf_counter()
            step()
            least[i] = min(least[i], time.perf_counter() - begin)
    return least[0], least[1]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.journey", description=__doc__)
    parser.add_argument("--backend", default="native")
    parser.add_argument("--runs", type=int, default=200, help="of each step that is timed")
    o = parser.parse_args()
    first = follow(step_of(SMALL[0], o.backend), step_of(SMALL[1], o.backend))
    print(
        f"first call of its shapes: {len(first.files)} files, {len(first.classes)} classes, "
        f"{first.classes.total()} objects, {first.frames} frames; after that:"
    )
    journey = follow(step_of(SMALL[0], o.backend))
    print(f"{len(journey.files)} files: {', '.join(sorted(journey.files))}")
    made = ", ".join(f"{name} {count}" for name, count in journey.classes.most_common())
    print(f"{len(journey.classes)} classes, {journey.classes.total()} objects: {made}")
    print(f"{journey.frames} frames")
    for way in journey.ways.values():
        print("  " + " → ".join(way))
    names = Counter(operations(SMALL[0], o.backend))
    print(f"{names.total()} operations between the passes: {dict(names.most_common())}")
    for case in SMALL:
        least, dense_least = seconds(case, o.backend, o.runs)
        print(
            f"{case.title}: {1e3 * least:.2f} ms, dense torch {1e3 * dense_least:.2f} ms, "
            f"ratio {least / dense_least:.2f}"
        )


if __name__ == "__main__":
    main()
