"""One step of a huge vocabulary in a small budget: the plan of each walk, seconds and bytes.

``python -m benchmarks.smallest`` takes 262,144 columns and 32,768 tokens within 256 MiB, at the
widths of Gemma 3 270M and 1B. On a GPU that is the allocator's peak, elsewhere the process's.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bgkernels as bg
from benchmarks.limits import MIB
from bgkernels.streaming import driver
from bgkernels.streaming.planner import Plan


@dataclass(frozen=True)
class Step:
    """Sizes of a step, and where it runs."""

    rows: int
    vocab: int
    hidden: int
    teacher: int
    budget: int
    dtype: torch.dtype
    device: torch.device

    def inputs(self) -> list[Tensor]:
        """Hidden states and heads of student and teacher, then labels."""
        shapes = [(n, d) for d in (self.hidden, self.teacher) for n in (self.rows, self.vocab)]
        made = [torch.empty(s, dtype=self.dtype, device=self.device).normal_() for s in shapes]
        for head in made[1::2]:
            head.mul_(3 / head.shape[1] ** 0.5)
        return [*made, torch.randint(self.vocab, (self.rows,), device=self.device)]

    def run(self, inputs: list[Tensor]) -> None:
        """Forward and backward; the gradients stay."""
        x, w, x_t, w_t, label = inputs
        loss = bg.linear_hybrid_distillation(
            x.requires_grad_(), w.requires_grad_(), bg.LinearTeacher(x_t, w_t), label,
            memory_budget=self.budget,
        )  # fmt: skip
        assert isinstance(loss, Tensor)
        loss.backward()

    def high_water(self) -> int:
        """Most bytes in use so far."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def watch() -> list[Plan]:
    """A list to which every plan is added from now on."""
    plans: list[Plan] = []
    choose = driver.planned

    def watched(*args: Any, **options: Any) -> Plan:
        plans.append(choose(*args, **options))
        return plans[-1]

    driver.planned = watched
    return plans


def measure(step: Step) -> str:
    """Run a step, and tell what it took."""
    plans = watch()
    inputs = step.inputs()
    base, begin = step.high_water(), time.perf_counter()
    step.run(inputs)
    used, seconds = step.high_water() - base, time.perf_counter() - begin
    gradients = sum(x.numel() * x.element_size() for x in inputs[:2])
    lines = [
        f"{p.chunk_count} × {len(p.tiles())} tiles of {p.chunk:,} × {p.width:,} in "
        f"{p.groups} groups: {p.bytes / MIB:,.0f} MiB planned"
        for p in plans
    ]
    return "\n".join(
        [
            f"{step.rows:,} tokens, {step.hidden} ← {step.teacher}, V = {step.vocab:,}, "
            f"{step.dtype}, {step.device}, budget {step.budget / MIB:,.0f} MiB",
            *lines,
            f"{seconds:.1f} s; temporaries {(used - gradients) / MIB:,.0f} MiB beside gradients "
            f"of {gradients / MIB:,.0f} MiB",
        ]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smallest", description=__doc__)
    add = parser.add_argument
    add("--rows", type=int, default=32_768)
    add("--vocab", type=int, default=262_144)
    add("--hidden", type=int, default=640, help="width of the student")
    add("--teacher", type=int, default=1152, help="width of the teacher")
    add("--budget", type=int, default=256, metavar="MiB")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    o = parser.parse_args()
    sizes = (o.hidden, o.teacher, o.budget * MIB, getattr(torch, o.dtype), torch.device(o.device))
    warm = Step(64, 1024, *sizes)  # libraries are loaded and kernels compiled outside of the count
    warm.run(warm.inputs())
    print(measure(Step(o.rows, o.vocab, *sizes)))


if __name__ == "__main__":
    main()
