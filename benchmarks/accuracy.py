"""Losses and gradients beside float64: the check before timing, and studies of the errors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import FORMS, Case, Problem
from benchmarks.dense import capped
from benchmarks.entries import ENTRIES, HALF, MIX, Entry, training
from benchmarks.limits import BARE
from bgkernels.streaming import driver
from bgkernels.streaming.planner import Plan
from tests import oracle

Errors = dict[str, float]
"""Distances from float64, relative to its norm: of the loss and of each gradient, by name."""
Values = dict[str, Tensor]

PEER_ERROR = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.1}
"""Beyond this a peer does not compute its loss; below it, its accuracy is for the study to tell."""
FLOOR = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3}
"""What the check never complains of in ours: in 16 bits the rounding of the gradient itself."""

STUDY = Case("accuracy", 256, 128, 128, 8192)
CHUNKED = replace(STUDY, name="chunks", rows=1024, vocab=2048, dtype="bfloat16")
COUNTS = (1, 2, 4, 8, 16)
SCALES = (1.0, 4.0, 16.0, 64.0)
FIELD = ("fused-128", "fused-128-eager", "dense", "paper", "liger", "trl")


@dataclass(frozen=True)
class Check:
    """Errors of an entry at a small shape, and what they may be."""

    errors: Errors
    bound: Errors

    @property
    def passed(self) -> bool:
        """Whether none is larger; NaN is."""
        return all(self.errors[name] <= self.bound[name] for name in self.errors)


def distance(x: Tensor, ref: Tensor) -> float:
    """``‖x - ref‖ / ‖ref‖`` in float64."""
    return float((x.double() - ref).norm() / ref.norm())


def truth(options: dict[str, Any], problem: Problem) -> Values:
    """Loss and gradients in float64, by the library's dense oracle.

    Args:
        options: the loss, in the words of ``tests.oracle.hybrid_loss``; maybe a ``target``.
        problem: the tensors.
    """
    wide = {name: x.detach() for name, x in problem.tensors.items()}
    wide |= {name: x.double() for name, x in wide.items() if x.is_floating_point()}
    exact = Problem(problem.case, wide)
    cap, form = problem.case.softcap or None, problem.case.form
    if form == "logits":
        z, t = capped(exact, exact.logits), capped(exact, exact.t_logits)
    else:
        z = oracle.real_logits(exact.input, exact.weight, logit_softcap=cap)
        t = z.detach()
        if "t_input" in exact.tensors:
            t = oracle.real_logits(exact.t_input, exact.t_weight, logit_softcap=cap)
    words = {"target": exact.target} | options
    if form in ("top-k", "matched"):
        parts = _top_k(exact, z) if form == "top-k" else _matched(exact, z, t)
        loss = _half_and_half(exact, z, *parts)
    else:
        loss = oracle.hybrid_loss(z, t, **words)
    names = FORMS[form].gradients
    found = torch.autograd.grad(loss, exact.wanted) if names else ()
    return {"loss": loss.detach()} | dict(zip(names, found, strict=True))


def _top_k(p: Problem, z: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of both models over the kept columns and a bucket for the others."""
    rest = z.scatter(1, p.indices, float("-inf")).logsumexp(-1, keepdim=True)
    tail = (1 - p.logprobs.exp().sum(-1, keepdim=True)).log()
    return torch.cat([z.gather(1, p.indices), rest], -1), torch.cat([p.logprobs, tail], -1)


def _matched(p: Problem, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of both models over the columns that match and a rest for the others."""
    ours, theirs = p.pairs
    rests = (
        x.index_fill(1, ids, float("-inf")).logsumexp(-1, keepdim=True)
        for x, ids in ((z, ours), (t, theirs))
    )
    rest_s, rest_t = rests
    return torch.cat([z[:, ours], rest_s], -1), torch.cat([t[:, theirs], rest_t], -1)


def _half_and_half(p: Problem, z: Tensor, categories_s: Tensor, categories_t: Tensor) -> Tensor:
    """Half cross-entropy, half forward KL between categories."""
    parts = {
        "hard": (z, z.detach(), p.target),
        "soft": (categories_s, categories_t, torch.where(p.target == -100, -100, 0)),
    }
    weights = {"hard": 0.0, "soft": 0.0}
    losses = [
        oracle.hybrid_loss(*of, divergence="forward_kl", routing="additive",
                           routing_params=weights | {name: HALF})
        for name, of in parts.items()
    ]  # fmt: skip
    return losses[0] + losses[1]


def errors(entry: Entry, problem: Problem, exact: Values | None = None) -> Errors:
    """What one step gets wrong; ``exact`` is the :func:`truth` where it is known already."""
    outcome = entry.start(problem)()
    assert outcome.loss is not None
    exact = exact or truth(entry.oracle_options(problem.case), problem)
    made = (outcome.loss, *outcome.gradients)
    return {name: distance(x, exact[name]) for name, x in zip(exact, made, strict=True)}


def check(name: str, case: Case) -> Check:
    """Whether an entry computes its loss and gradients, in the case's dtype and with its features.

    Ours may be twice as wrong as the same loss in dense torch of that dtype, or ``FLOOR``.
    """
    entry = ENTRIES[name]
    if entry.kind in BARE:
        return Check({}, {})
    ignored = 0.0 if name in ("trl", "liger-kl") else 0.2
    small = replace(case, rows=48, hidden_s=32, hidden_t=48, vocab=515, gap=0.0, ignored=ignored)
    problem = Problem.of(replace(small, vocab_t=530 if case.vocab_t else 0))
    found = errors(entry, problem)
    bound = dict.fromkeys(found, PEER_ERROR[case.dtype])
    if entry.kind == "ours":
        yard = errors(ENTRIES["dense"], problem)
        bound = {k: max(2 * e, FLOOR[case.dtype]) for k, e in yard.items()}
    return Check(found, bound)


def study() -> list[dict[str, Any]]:
    """Gradient errors by dtype, temperature and distance between teacher and student."""
    variants = itertools.product(("float32", "bfloat16"), (1.0, 4.0), (0.0, 0.1, 0.01, 1e-3))
    return [
        row
        for dtype, heat, gap in variants
        for row in _row(dtype, replace(STUDY, dtype=dtype, temperature=heat, gap=gap), FIELD)
    ]


def scale_study() -> list[dict[str, Any]]:
    """Gradient errors in bf16 as the logits grow, student and teacher nearly equal."""
    field = [name for name in FIELD if name != "fused-128-eager"]
    cases = [replace(STUDY, dtype="bfloat16", gap=0.01, scale=scale) for scale in SCALES]
    return [row for case in cases for row in _row("bfloat16", case, field)]


def _row(dtype: str, case: Case, field: Any) -> list[dict[str, Any]]:
    problem, exact = Problem.of(case), {}
    for name in field:
        mix = ENTRIES[name].mix
        exact[mix] = exact.get(mix) or truth(ENTRIES[name].oracle_options(case), problem)
    label = {"dtype": dtype, "temperature": case.temperature, "gap": case.gap, "scale": case.scale}
    rounded = {n: distance(x.to(getattr(torch, dtype)), x) for n, x in exact["entropy"].items()}
    made = [("rounding alone", rounded)]
    made += [(name, _errors(_eager(ENTRIES[name]), problem, exact)) for name in field]
    return [label | {"entry": name} | found for name, found in made]


def chunk_study() -> list[dict[str, Any]]:
    """Gradient errors in bf16 as the tokens are cut into more chunks."""
    problem, found = Problem.of(CHUNKED), []
    names = ("fused-128", "liger")
    options = {ENTRIES[n].mix: ENTRIES[n].oracle_options(CHUNKED) for n in names}
    exact = {mix: truth(x, problem) for mix, x in options.items()}
    for count in COUNTS:
        with forced_chunks(count):
            for name in names:
                entry = _eager(ENTRIES[name], CHUNKED.rows // count)
                row = {"entry": name, "chunks": count}
                found.append(row | _errors(entry, problem, exact))
    return found


def _eager(entry: Entry, chunk: int = 1024) -> Entry:
    """Liger's loss without its compiler, which would take minutes for so many shapes."""
    if entry is not ENTRIES["liger"]:
        return entry
    loss = functools.partial(peers.liger, chunk=chunk, compile_chunks=False)
    return replace(entry, start=training(loss))


def _errors(entry: Entry, problem: Problem, exact: dict[str, Values]) -> dict[str, Any]:
    reason = entry.refuses(problem.case, patience=60.0, memory=float("inf"))
    try:
        mix = MIX.get(problem.case.form, entry.mix)
        return {"error": reason} if reason else errors(entry, problem, exact[mix])
    except Exception as error:  # its reason belongs in the table
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


@contextmanager
def forced_chunks(count: int) -> Iterator[None]:
    """Let the library cut its tokens into ``count`` chunks, whatever the planner would choose."""
    choose = driver.planned

    def planned(*args: Any, **options: Any) -> Plan:
        plan = choose(*args, **options)
        return replace(plan, chunk=-(-plan.rows // count))

    with mock.patch.object(driver, "planned", planned):
        yield
