"""The arithmetic of a step on a GPU, before one has run it: the planner's terms over bare products.

``python -m benchmarks.gpu_plans`` prints the tables of docs/gpu.md. Nothing is computed on tensors,
and no GPU is needed: shapes go to the planner of ``bgkernels/streaming``, with its numbers of CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bgkernels as bg
from benchmarks.cases import Case
from benchmarks.suites import PAIRS
from bgkernels.backends.triton import TritonBackend
from bgkernels.rows.extras import Tilt
from bgkernels.rows.spec import RowSpec, cap_of
from bgkernels.streaming import driver, gemm
from bgkernels.streaming.cost import Estimate, bare_products, estimate
from bgkernels.streaming.heads import Needs
from bgkernels.streaming.planner import Plan, Workload, plan
from bgkernels.streaming.problem import Problem
from bgkernels.streaming.shard import Shard

HEADLINE = Case("headline", 8192, 4096, 4096, 128_256, dtype="bfloat16")
BUDGETS = (1, 2, 4, 8)
"""In GiB."""


@dataclass(frozen=True)
class Planned:
    """A plan and its terms, in units of the bare products."""

    plan: Plan
    terms: Estimate

    @property
    def beside_primitives(self) -> float:
        """All that plans differ in: without the traffic of the primitives, which all have."""
        return self.terms.total - self.terms.rows


@contextmanager
def cuda_shapes() -> Iterator[None]:
    """Tensors of a CUDA device that have shapes alone, of one whose products add in place."""
    with FakeTensorMode(), mock.patch.object(gemm, "adds_wide", lambda *_: True):
        yield


def workload(case: Case, *, owned: bool = False) -> Workload:
    """What a fused step of forward KL, routed by entropy, asks of the planner.

    Args:
        case: the shapes.
        owned: whether the caller owns an fp32 gradient of the head.
    """
    vocab, cap = case.vocab, case.softcap or None
    with cuda_shapes():

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        teacher = bg.LinearTeacher(
            empty(case.rows, case.hidden_t), empty(case.vocab_t or vocab, case.hidden_t),
            logit_softcap=cap,
        )  # fmt: skip
        problem = Problem(
            spec=RowSpec(vocab, vocab, extras=(Tilt(0, 0.1),), student=cap_of(1.0, cap)),
            backend=TritonBackend(),
            student=(empty(case.rows, case.hidden_s), empty(vocab, case.hidden_s), None),
            teacher=teacher,
            labels=empty(case.rows, dtype=torch.int64),
            leading=(case.rows,),
            shard=Shard((0, vocab)),
        )
        if owned:
            total = empty(vocab, case.hidden_s, dtype=torch.float32)
            problem = replace(problem, weight_grad=total)
        return driver.workload(problem, Needs(True, True), statistics=True, backward=True)


def planned(case: Case, gib: float, *, owned: bool = False) -> Planned:
    """The plan of a step within a budget."""
    work = workload(case, owned=owned)
    p, bare = plan(work, int(gib * 2**30)), bare_products(work)
    terms = estimate(work, p)
    return Planned(p, Estimate(*(x / bare for x in vars(terms).values())))


def headline_table() -> list[str]:
    """Each term of the headline's plans."""
    lines = [
        "| budget | sum of dW | chunks × tiles | kept | deferred | products | again | sums | "
        "launches | without primitives | primitives | total | measured |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for gib in BUDGETS:
        for owned in (False, True):
            found = planned(HEADLINE, gib, owned=owned)
            p, t = found.plan, found.terms
            tiles = len(p.tiles())
            numbers = (t.products, t.repeated, t.sums, t.launches, found.beside_primitives)
            cells = [f"{x:.3f}" for x in (*numbers, t.rows, t.total)]
            whose = "the caller's" if owned else "ours"
            sizes = f"{p.chunk_count} × {tiles} of {p.chunk:,} × {p.width:,}"
            first = [f"{gib} GiB", whose, sizes, f"{p.kept} of {tiles}", str(p.deferred)]
            lines.append(f"| {' | '.join((*first, *cells, ' '))} |")
    return lines


def pairs_table() -> list[str]:
    """Totals of the seven pairs at 8,192 tokens."""
    head = " | ".join(f"{gib} GiB" for gib in BUDGETS)
    rule = "|---" + "|---:" * (1 + len(BUDGETS)) + "|"
    lines = [f"| student ← teacher | {head} | measured |", rule]
    for case in (replace(pair, rows=8192) for pair in PAIRS):
        cells = []
        for gib in BUDGETS:
            found = planned(case, gib)
            cells.append(f"{found.beside_primitives:.2f} + {found.terms.rows:.2f}")
        lines.append(f"| {case.name} | {' | '.join(cells)} |  |")
    return lines


def main() -> None:
    """The command line."""
    print("\n".join((*headline_table(), "", *pairs_table())))


if __name__ == "__main__":
    main()
