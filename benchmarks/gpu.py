"""Everything about one GPU in one command: the headline, right or wrong, then the rest.

``python -m benchmarks.gpu`` measures the headline in its first minutes, compares the losses with
float64, and goes on within ``--minutes``; other libraries come last. After each section it prints a
table and writes its JSON file, from which the same command goes on if it was stopped. What does not
fit the time or memory is listed with that reason, and a check that fails is a row like others.
``--dry-run`` walks the same code over tiny shapes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch
from torch import Tensor

import bgkernels as bg
from benchmarks import gpu_tiles, machine
from benchmarks.accuracy import distance, truth
from benchmarks.cases import LOGIT_STD, Case, Problem
from benchmarks.entries import ENTRIES, Entry, training
from benchmarks.gpu_measure import GIB, Bench, Row, Step, memcpy, products, table
from benchmarks.gpu_plans import HEADLINE
from benchmarks.gpu_record import Record, readme_table
from benchmarks.suites import PAIRS
from bgkernels.backends import BACKENDS
from bgkernels.backends.base import Backend, Tile
from bgkernels.backends.triton import TritonBackend
from bgkernels.rows.extras import Extra, Mixture, Tempered, Tilt
from bgkernels.rows.spec import FIELDS, RowSpec
from bgkernels.rows.state import empty
from bgkernels.streaming import driver
from bgkernels.streaming.planner import Plan, Workload


def loss_of(b: Bench, p: Problem, **options: Any) -> Tensor:
    """Ours."""
    cap = p.case.softcap or None
    teacher = bg.LinearTeacher(p.t_input, p.t_weight, logit_softcap=cap)
    options = {"temperature": p.case.temperature, "backend": b.backend} | options
    target = options.pop("target", p.target)
    made = bg.linear_hybrid_distillation(
        p.input, p.weight, teacher, target, logit_softcap=cap, **options
    )
    assert isinstance(made, Tensor)
    return made


CHECKS: dict[str, Row] = {
    "entropy-routed forward KL": {},
    "temperature 2": {"temperature": 2.0},
    "recompute": {"mode": "recompute", "divergence": "reverse_kl"},
    "deferred": {},
    "generalized JSD": {"divergence": "generalized_jsd"},
    "alpha-beta": {"divergence": "alpha_beta"},
    "several chunks": {},
    "total variation, teacher's argmax": {
        "divergence": "total_variation",
        "target": "teacher_argmax",
    },
}
CHUNKS = {"several chunks": 3, "deferred": 3}
"""Of the plan of a check, whatever the budget would hold."""
BOUND = {"float32": 2e-4, "bfloat16": 1e-2}
"""Distance from float64 relative to its norm: in bf16 the rounding of the gradients is 2e-3."""


def check(b: Bench) -> Iterator[Row]:
    """Losses and gradients against the dense oracle in float64."""
    for dtype, bound in BOUND.items():
        case = Case("check", 96, 64, 96, 3001, vocab_t=3020, dtype=dtype, ignored=0.1)
        p = b.problem(replace(b.case(case), dtype=dtype))
        checks = list(CHECKS.items())[:: 3 if b.dry else 1]
        for name, options in checks:
            with chunked(CHUNKS.get(name), defers=name == "deferred") as counts:
                found = errors_of(p, training(partial(loss_of, b, **options))(p), options)
            passed = "error" not in found and max(found.values()) <= bound
            passed &= set(counts) == {CHUNKS[name]} if name in CHUNKS else True
            yield {"check": name, "dtype": dtype} | found | {"passed": passed}


@contextmanager
def chunked(wanted: int | None, *, defers: bool = False) -> Iterator[list[int]]:
    """Plans have so many chunks of rows, if a number is given; yields how many they have.

    ``defers``: whether the gradients of half of the tiles wait for the last chunk.
    """
    counts: list[int] = []

    def planned(work: Workload, budget: int | None) -> Plan:
        found = driver_plan(work, budget)
        if wanted is not None:
            chunk = -(-work.rows // wanted)
            found = replace(
                found, chunk=chunk, kept=1, lent=0, coded=0, groups=1, deferred=0, deposited=0
            )
        if defers:
            width = -(-work.columns // 4)
            found = replace(found, width=width, kept=2, deferred=2, groups=3)
        counts.append(found.chunk_count)
        return found

    driver_plan, driver.plan = driver.plan, planned
    driver.PLANS.clear()
    try:
        yield counts
    finally:
        driver.plan = driver_plan
        driver.PLANS.clear()


def errors_of(p: Problem, step: Step, options: Row) -> Row:
    """Distances from float64 of the loss and its gradients; ``options`` are the oracle's."""
    words = ("divergence", "routing", "routing_params", "temperature", "target")
    own = {"temperature": p.case.temperature} | {k: v for k, v in options.items() if k in words}
    try:
        outcome, exact = step(), truth(own, p)
        made = (outcome.loss, *outcome.gradients)
        return {name: distance(x, exact[name]) for name, x in zip(exact, made, strict=True)}
    except Exception as error:  # its reason belongs in the table
        return {"error": f"{type(error).__name__}: {str(error)[:160]}"}


def primitives(b: Bench, rows: int = 8192, vocab: int = 128_256) -> Iterator[Row]:
    """The primitives over materialised logits; bytes are those of logits and their gradient."""
    rows, vocab = (4, 70) if b.dry else (rows, vocab)
    copy, backend = memcpy(b), BACKENDS[b.backend]
    variants: dict[str, tuple[float, tuple[Extra, ...]]] = {
        "forward KL": (1.0, ()),
        "entropy-routed": (1.0, (Tilt(0, 0.1),)),
        "entropy-routed, T = 2": (2.0, (Tilt(0, 0.2), Tempered(1.0))),
        "JSD": (1.0, (Tilt(0, 0.1), Mixture(0.5))),
    }
    labels = torch.randint(vocab, (rows,), device=b.device)
    for dtype in (torch.bfloat16, torch.float32):
        s, t = (torch.empty(rows, vocab, dtype=dtype, device=b.device).normal_() for _ in range(2))
        s *= LOGIT_STD
        for name, (temperature, extras) in variants.items():
            spec = RowSpec(vocab, vocab, temperature, extras=extras)
            reads = s.nbytes + t.nbytes
            moved = {"absorb": reads, "second read": reads, "vjp": reads + s.nbytes}
            steps = _primitives(backend, Tile(s, t, 0, 0), labels, spec)
            for which, row in b.race(steps, 1.0).items():
                label = {"what": name, "primitive": which, "dtype": str(dtype)[6:]}
                rate = moved[which] / row["ms"] / 1e6 if which in moved and "ms" in row else None
                share = None if rate is None else round(rate / copy, 3)
                yield label | row | {"GB/s": rate and round(rate), "of memcpy": share}


def _primitives(backend: Backend, tile: Tile, labels: Tensor, spec: RowSpec) -> dict[str, Step]:
    """Each primitive of a backend on a tile of whole rows, after those before it."""
    rows, device = len(labels), labels.device
    state = empty(rows, spec, dtype=torch.float32, device=device)
    values = torch.empty(spec.field_count, rows, dtype=torch.float64, device=device)
    backend.absorb_(state, tile, labels, spec)
    backend.finalize(state, labels, spec, values)
    grads, out = torch.ones_like(values), torch.empty_like(tile.student)
    steps: dict[str, Step] = {"absorb": partial(backend.absorb_, state, tile, labels, spec)}
    if spec.second_read:
        normalisers = values[FIELDS.index("lse_s")], values[FIELDS.index("lse_t")]
        again = partial(backend.absorb_, state, tile, labels, spec, normalisers)
        steps["second read"] = again
    coefficients = backend.fold(values, grads, labels, spec)
    return steps | {
        "finalize": partial(backend.finalize, state, labels, spec, values),
        "fold": partial(backend.fold, values, grads, labels, spec),
        "vjp": partial(backend.vjp, out, tile, coefficients, labels, spec),
    }


def from_logits(b: Bench, rows: int = 8192, vocab: int = 128_256) -> Iterator[Row]:
    """Loss and gradient of logits that exist; each must be read once, and the gradient written."""
    rows, vocab = (4, 70) if b.dry else (rows, vocab)
    copy = memcpy(b)
    z, t = (
        torch.empty(rows, vocab, dtype=torch.bfloat16, device=b.device).normal_(std=LOGIT_STD)
        for _ in range(2)
    )
    z.requires_grad_()
    target = torch.randint(vocab, (rows,), device=b.device)

    def step(divergence: str) -> Any:
        teacher = bg.LogitsTeacher(t)
        loss = bg.hybrid_distillation(z, teacher, target, divergence=divergence, backend=b.backend)
        return torch.autograd.grad(loss, z)

    names = ("forward_kl", "generalized_jsd")
    for name, row in b.race({n: partial(step, n) for n in names}).items():
        rate = (2 * z.nbytes + t.nbytes) / row["ms"] / 1e6 if "ms" in row else 0.0
        yield {"divergence": name} | row | {"of memcpy": round(rate / copy, 3)}


def headline(b: Bench) -> Iterator[Row]:
    """Ours at several budgets, beside the bare products."""
    p = b.problem(b.case(HEADLINE))
    steps = {"bare products": products(p)}
    for gib in (0.5, 1, 2, 4, 8):
        ours = partial(loss_of, b, memory_budget=int(gib * GIB))
        steps[f"fused, {gib} GiB"] = training(ours)(p)
    one = partial(loss_of, b, memory_budget=GIB)
    steps["fused, 1 GiB, the caller's dW"] = owning(b, p)
    steps["recompute, 1 GiB"] = training(partial(one, mode="recompute"))(p)
    steps["JSD, 1 GiB"] = training(partial(one, divergence="generalized_jsd"))(p)
    steps["hard labels only, 1 GiB"] = training(partial(one, routing="hard"))(p)
    steps["no gradient, 1 GiB"] = torch.no_grad()(partial(one, p))
    yield from ratios(p, b.race(steps, 20.0))


def owning(b: Bench, p: Problem) -> Step:
    """A step whose head's gradient is added to a sum of the caller's, within 1 GiB."""
    total = torch.zeros(p.weight.shape, dtype=torch.float32, device=b.device)

    def step() -> Any:
        loss = loss_of(b, p, memory_budget=GIB, weight_grad=total)
        return torch.autograd.grad(loss, p.input)

    return step


def tiles(b: Bench) -> Iterator[Row]:
    """Ours at several widths of a tile, and the planner's other numbers."""

    def ours(budget: int) -> Callable[[Problem], Step]:
        return training(partial(loss_of, b, memory_budget=budget))

    yield from gpu_tiles.tiles(b, HEADLINE, ours)


def ratios(p: Problem, rows: dict[str, Row]) -> Iterator[Row]:
    """Rows with their time over that of the bare products, and those products' rate."""
    bare = rows["bare products"].get("ms")
    for name, row in rows.items():
        if bare and "ms" in row:
            row["ratio"] = round(row["ms"] / bare, 3)
        if name == "bare products" and bare:
            row["TFLOP/s"] = round(p.case.flops / bare / 1e9, 1)
        yield {"case": p.case.name, "tokens": p.case.rows, "step": name} | row


def pairs(b: Bench) -> Iterator[Row]:
    """The seven pairs of models, at three batch sizes and the default budget."""
    for pair in PAIRS:
        for tokens in (1024, 8192, 32_768):
            if b.left < 20:
                yield {"case": pair.name, "tokens": tokens, "skipped": "out of time"}
                continue
            p = b.problem(b.case(replace(pair, rows=tokens, dtype="bfloat16")))
            steps = {
                "bare products": products(p),
                "fused": training(partial(loss_of, b))(p),
                "recompute": training(partial(loss_of, b, mode="recompute"))(p),
            }
            yield from ratios(p, b.race(steps, 3.0))
            if b.dry:
                break


def rivals(form: str) -> dict[str, Entry]:
    return {n: e for n, e in ENTRIES.items() if e.kind == "peer" and form in e.forms}


def free_bytes(b: Bench) -> float:
    return torch.cuda.mem_get_info(b.device)[0] if b.device.type == "cuda" else float("inf")


def peers(b: Bench) -> Iterator[Row]:
    """Other losses at the headline's shape; what each computes is in its name."""
    for form, routing in (("step", "entropy"), ("hard", "hard")):
        p = b.problem(b.case(replace(HEADLINE, form=form)))
        ours = Entry("ours, 1 GiB", training(partial(hard_or_routed, b, routing)))
        for entry in (ours, *rivals(form).values()):
            reason = entry.refuses(p.case, float("inf"), free_bytes(b))
            reason = "out of time" if b.left < 30 else reason
            row = {"skipped": reason} if reason else b.race({"": entry.start(p)}, 3.0)[""]
            yield {"form": form, "who": entry.about} | row


def hard_or_routed(b: Bench, routing: str, p: Problem) -> Tensor:
    if routing == "entropy":
        return loss_of(b, p, memory_budget=GIB)
    options = {"routing": routing, "memory_budget": GIB, "backend": b.backend}
    made = bg.linear_hybrid_distillation(p.input, p.weight, None, p.target, **options)
    assert isinstance(made, Tensor)
    return made


def accuracy(b: Bench) -> Iterator[Row]:
    """Distance of bf16 gradients from float64, each loss from its own, far and near."""
    for gap in (0.0, 0.03):
        case = Case("accuracy", 1024, 512, 512, 16_384, dtype="bfloat16", gap=gap)
        case = replace(b.case(case), hidden_t=b.case(case).hidden_s, dtype="bfloat16")
        p = b.problem(case)
        for name, options in (("ours", {}), ("ours, many chunks", {"memory_budget": 64 << 20})):
            ours = partial(loss_of, b, **({} if b.dry else options))
            found = errors_of(p, training(ours)(p), {"routing": "entropy"})
            yield {"who": name, "gap": gap} | found
        for name, entry in rivals("step").items():
            reason = entry.refuses(case, float("inf"), free_bytes(b))
            reason = "out of time" if b.left < 20 else reason
            found = {"skipped": reason}
            if reason is None:
                found = errors_of(p, entry.start(p), entry.oracle_options(case))
            yield {"who": name, "gap": gap} | found


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "headline": headline,
    "check": check,
    "from logits": from_logits,
    "primitives": primitives,
    "tiles": tiles,
    "pairs": pairs,
    "accuracy": accuracy,
    "peers": peers,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(arguments)
    backend = options.backend
    if not torch.cuda.is_available() and not options.dry_run:
        sys.exit("needs a CUDA or HIP device; --dry-run walks the code without one")
    BACKENDS.setdefault("triton", TritonBackend())
    device = torch.device("cpu" if options.dry_run else "cuda")
    deadline = time.monotonic() + 60 * options.minutes
    b = Bench(device, backend, deadline, 1 if options.dry_run else 10, options.dry_run)
    run = {"backend": backend, "dry": options.dry_run}
    path = options.output or machine.ROOT / "benchmarks" / "results" / f"gpu-{backend}.json"
    record = Record(path, machine.stamp(torch.get_num_threads()) | run)
    record.run("device", lambda: [describe(b)])
    for name in options.sections:
        if b.left > 0 or name in record.sections:
            print(table(name, record.run(name, partial(SECTIONS[name], b))), flush=True)
    print(f"\n{readme_table(record.sections.get('headline', []))}\n\n{path}")
    failed = [row for row in record.sections.get("check", []) if not row.get("passed")]
    if failed:
        sys.exit(f"{len(failed)} checks failed")


def describe(b: Bench) -> Row:
    """The device, and what it does at best: a copy, and a large product in bf16."""
    made: Row = {"memcpy GB/s": round(memcpy(b))}
    if b.device.type == "cuda":
        properties = torch.cuda.get_device_properties(b.device)
        made |= {"name": properties.name, "memory": properties.total_memory}
        made |= {"capability": f"{properties.major}.{properties.minor}"}
        x, y = (torch.randn(8192, 8192, device=b.device, dtype=torch.bfloat16) for _ in range(2))
        ms = b.race({"product": lambda: x @ y}, 1.0)["product"]["ms"]
        made |= {"bf16 TFLOP/s": round(2 * 8192**3 / ms / 1e9)}
    print(json.dumps(made), flush=True)
    return made


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=7.5, help="after which no more is started")
    add("--backend", default="triton", help="of ours")
    add("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    add("--output", type=Path, help="default: benchmarks/results/gpu-BACKEND.json")
    add("--dry-run", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
