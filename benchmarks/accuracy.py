"""Losses and gradients beside float64: the check before timing, and a study of the errors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import Case, Problem
from benchmarks.entries import ENTRIES, Entry, liger, training
from bgkernels import driver, oracle
from bgkernels.planner import Plan, Workload

Gradient = tuple[Tensor, Tensor, Tensor]
"""Loss, dX, dW."""

PEER_ERROR = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.1}
"""Beyond this a peer does not compute its loss; below it, its accuracy is for the study to tell."""
FLOOR = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3}
"""What the check never complains of in ours: in 16 bits the rounding of the gradient itself."""

STUDY = Case("accuracy", 256, 128, 128, 8192)
CHUNKED = replace(STUDY, name="chunks", rows=1024, vocab=2048, dtype="bfloat16")
COUNTS = (1, 2, 4, 8, 16)
FIELD = ("fused-128", "fused-128-eager", "dense", "paper", "liger")


@dataclass(frozen=True)
class Errors:
    """Distances from float64, relative to its norm."""

    loss: float
    input: float
    weight: float

    def within(self, bound: Errors) -> bool:
        """Whether none is larger; NaN is."""
        return self.loss <= bound.loss and self.input <= bound.input and self.weight <= bound.weight


@dataclass(frozen=True)
class Check:
    """Errors of an entry at a small shape, and what they may be."""

    passed: bool
    errors: Errors | None = None
    bound: Errors | None = None


def distance(x: Tensor, ref: Tensor) -> float:
    """``‖x - ref‖ / ‖ref‖`` in float64."""
    return float((x.double() - ref).norm() / ref.norm())


def truth(entry: Entry, problem: Problem) -> Gradient:
    """Loss, dX and dW of the entry's loss in float64, by the library's dense oracle."""
    x, w, t_x, t_w = (
        getattr(problem, name).detach().double()
        for name in ("input", "weight", "t_input", "t_weight")
    )
    x.requires_grad_()
    w.requires_grad_()
    cap = problem.case.softcap or None
    z, t = (oracle.real_logits(h, v, logit_softcap=cap) for h, v in ((x, w), (t_x, t_w)))
    if entry.kept:
        t = t[:, : problem.case.vocab]
        t = t.masked_fill(t < t.topk(entry.kept).values[:, -1:], float("-inf"))
    loss = oracle.hybrid_loss(z, t, problem.target, **entry.oracle_options(problem.case))
    dx, dw = torch.autograd.grad(loss, (x, w))
    return loss.detach(), dx, dw


def errors(entry: Entry, problem: Problem, exact: Gradient | None = None) -> Errors:
    """What one step gets wrong; ``exact`` is the :func:`truth` where it is known already."""
    outcome = entry.start(problem)()
    assert outcome.loss is not None
    made = (outcome.loss, *outcome.gradients)
    return Errors(*map(distance, made, exact or truth(entry, problem)))


def check(name: str, case: Case) -> Check:
    """Whether an entry computes its loss and gradients, in the case's dtype and with its features.

    Ours may be twice as wrong as the same loss in dense torch of that dtype, or ``FLOOR``.
    """
    entry = ENTRIES[name]
    if entry.kind == "limit":
        return Check(passed=True)
    small = replace(case, rows=48, hidden_s=32, hidden_t=48, vocab=515, gap=0.0, ignored=0.2)
    problem = Problem.of(replace(small, vocab_t=530 if case.vocab_t else 0))
    found = errors(entry, problem)
    bound = Errors(*[PEER_ERROR[case.dtype]] * 3)
    if entry.kind == "ours":
        yard = asdict(errors(ENTRIES["dense"], problem))
        bound = Errors(**{k: max(2 * e, FLOOR[case.dtype]) for k, e in yard.items()})
    return Check(found.within(bound), found, bound)


def study() -> list[dict[str, Any]]:
    """Gradient errors by dtype, temperature and distance between teacher and student."""
    variants = itertools.product(("float32", "bfloat16"), (1.0, 4.0), (0.0, 0.3, 0.01))
    found = []
    for dtype, temperature, gap in variants:
        problem = Problem.of(replace(STUDY, dtype=dtype, temperature=temperature, gap=gap))
        exact = _truths(problem)
        label = {"dtype": dtype, "temperature": temperature, "gap": gap}
        rounded = [distance(x.to(problem.weight.dtype), x) for x in exact["entropy"]]
        found.append(label | {"entry": "rounding alone"} | asdict(Errors(*rounded)))
        found += [label | {"entry": n} | _errors(_eager(ENTRIES[n]), problem, exact) for n in FIELD]
    return found


def chunk_study() -> list[dict[str, Any]]:
    """Gradient errors in bf16 as the tokens are cut into more chunks."""
    problem, found = Problem.of(CHUNKED), []
    exact = _truths(problem)
    for count in COUNTS:
        with forced_chunks(count):
            for name in ("fused-128", "liger"):
                entry = _eager(ENTRIES[name], CHUNKED.rows // count)
                row = {"entry": name, "chunks": count}
                found.append(row | _errors(entry, problem, exact))
    return found


def _truths(problem: Problem) -> dict[str, Gradient]:
    """The exact gradients by ``Entry.mix``."""
    return {ENTRIES[name].mix: truth(ENTRIES[name], problem) for name in ("dense", "liger")}


def _eager(entry: Entry, chunk: int = 1024) -> Entry:
    """Liger's loss without its compiler, which would take minutes for so many shapes."""
    if entry is not ENTRIES["liger"]:
        return entry
    loss = functools.partial(liger, chunk=chunk, compile_chunks=False)
    return replace(entry, start=training(loss))


def _errors(entry: Entry, problem: Problem, exact: dict[str, Gradient]) -> dict[str, Any]:
    reason = entry.refuses(problem.case, patience=60.0, memory=float("inf"))
    try:
        return {"error": reason} if reason else asdict(errors(entry, problem, exact[entry.mix]))
    except Exception as error:  # its reason belongs in the table
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


@contextmanager
def forced_chunks(count: int) -> Iterator[None]:
    """Let the library cut its tokens into ``count`` chunks, whatever the planner would choose."""
    choose = driver.plan

    def plan(work: Workload, budget: int) -> Plan:
        return replace(choose(work, budget), chunk=-(-work.rows // count))

    with mock.patch.object(driver, "plan", plan):
        yield
