"""How long a student waits for a served teacher, by how long the server takes for a text.

    python -m benchmarks.waiting

The server is a stand-in that sleeps, and so does the student, in steps of one length; so the
machine hardly matters. The teacher is asked two batches ahead, as the trainers do. Printed is a
line for each server: how much of the time the student waited, its first batch left out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.integrations.causal_lm import attach
from bgkernels.integrations.served import ServedTeacher
from bgkernels.integrations.transformers import asked_ahead
from tests.models import VOCAB, tiny
from tests.stand_in import StandIn, checkpoint

RATIOS = (0.25, 0.5, 1.0, 1.5, 1.9, 2.5, 3.0, 4.0)
"""Time of a text against that of a step."""
ROWS, LENGTH = 8, 16


class Timed(ServedTeacher):
    """Notes how long each call took, in ``waited``."""

    waited: list[float]

    def __call__(self, inputs: Any, rows: Tensor | None) -> bg.LinearTeacher:
        """As of any served teacher."""
        started = time.perf_counter()
        teacher = super().__call__(inputs, rows)
        self.waited.append(time.perf_counter() - started)
        return teacher


def waited(folder: Path, server: StandIn, step: float, steps: int) -> float:
    """Share of the time that a student waits, its first batch left out."""
    student, teacher = tiny(), Timed(server.url, folder)
    teacher.waited = []
    attachment = attach(student, teacher)
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(3, VOCAB, (steps, ROWS, LENGTH), generator=generator)
    for tokens in asked_ahead(({"input_ids": x, "labels": x} for x in batches), attachment):
        began = time.perf_counter()
        student(**tokens).loss.backward()
        worked = time.perf_counter() - began - teacher.waited[-1]
        time.sleep(max(0.0, step - worked))
    teacher.close()
    total = sum(teacher.waited[1:])
    return total / (total + step * (steps - 1))


def main() -> None:
    """Measure, and print a line for each server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=float, default=0.2, help="seconds of the student")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = checkpoint(Path(name))
        for ratio in RATIOS:
            with StandIn(model, name, delay=ratio * options.step) as server:
                share = waited(Path(name), server, options.step, options.steps)
            print(f"a text takes {ratio:4.2f} steps: {share:6.1%} of the time waited")


if __name__ == "__main__":
    main()
