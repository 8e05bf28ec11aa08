"""Run a suite and write its results: ``python -m benchmarks.run --suite cpu``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import accuracy, end_to_end, machine, primitives, sweeps
from benchmarks.cases import Problem
from benchmarks.entries import ENTRIES, MIX
from benchmarks.measure import Sample, Worker, interleave, spread
from benchmarks.suites import SUITES, Field

RESULTS = machine.ROOT / "benchmarks" / "results"
SHARED_MEMORY = "/dev/shm"
ALSO = ("accuracy", "sweeps", "end to end", "primitives")
AGREEMENT = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 2e-2}
"""How far the losses of entries with the same loss may be apart at the timed shape."""


class CheckFailed(Exception):
    """A result that is wrong; nothing is written."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    begin = time.perf_counter()
    results = {"suite": options.suite, "machine": machine.stamp(torch.get_num_threads())}
    try:
        results["fields"] = [measure_field(field) for field in chosen(options)]
        if "accuracy" in options.also:
            _tell("accuracy: gradients against float64")
            results["accuracy"], results["chunks"] = accuracy.study(), accuracy.chunk_study()
            results["scales"] = accuracy.scale_study()
        if "sweeps" in options.also:
            _tell("sweeps: cost by tokens, vocabulary and width")
            results["sweeps"] = sweeps.study(measure_field)
        if "end to end" in options.also:
            _tell("end to end: a step of whole models")
            results["end to end"] = end_to_end.study(torch.get_num_threads())
        if "primitives" in options.also:
            _tell("primitives: rates of both passes")
            results["primitives"] = primitives.study()
    except CheckFailed as failure:
        sys.exit(f"nothing written: {failure}")
    results["seconds"] = round(time.perf_counter() - begin)
    write(results, options.output)


def write(results: dict[str, Any], output: Path | None) -> Path:
    """Results as JSON, by default in the folder of the machine."""
    stamp = results["machine"]
    name = f"{stamp['date'][:10]}-{results['suite']}-{stamp['commit'] or 'unknown'}.json"
    path = output or RESULTS / machine.slug(stamp) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    _tell(f"{path} after {results['seconds']} s; pages: python -m benchmarks.publish {path}")
    return path


def chosen(options: argparse.Namespace) -> list[Field]:
    """The fields of the suite, as cut down by the command line."""
    fields = []
    for field in SUITES[options.suite]:
        entries = tuple(e for e in field.entries if not options.entries or e in options.entries)
        field = replace(field, case=field.case.scaled(options.scale), entries=entries)
        if options.seconds:
            field = replace(field, seconds=options.seconds)
        if entries and any(word in field.case.title for word in options.cases or [""]):
            fields.append(field)
    return fields


def measure_field(field: Field) -> dict[str, Any]:
    """Check, then time, everyone in a field."""
    case, rows, workers = field.case, {}, []
    _tell(f"{case.name}: {case.title}")
    folder = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=folder) as inputs:
        Problem.store(case, inputs)
        memory = machine.free_memory()
        try:
            for name in field.entries:
                reason = ENTRIES[name].refuses(case, field.patience, memory)
                if reason:
                    rows[name] = {"error": reason}
                    _tell_sample(name, rows[name])
                else:
                    workers.append(Worker(name, case, inputs, torch.get_num_threads()))
            rows |= {w.name: _checked(w) for w in workers}
            running = [w for w in workers if "error" not in rows[w.name]]
            samples = interleave(running, field.rounds, field.seconds, 600.0, _tell_sample)
        finally:
            for worker in workers:
                worker.stop()
    for name, taken in samples.items():
        rows[name] |= summary(taken)
    _sound(field, rows)
    described = [
        {"entry": name, "about": ENTRIES[name].about, "kind": ENTRIES[name].kind} | rows[name]
        for name in field.entries
    ]
    return {
        "case": asdict(case), "title": case.title, "flops": case.flops, "inputs": case.bytes,
        "entries": described,
    }  # fmt: skip


def _checked(worker: Worker) -> dict[str, Any]:
    """The worker's check, or the reason why it cannot run; raises where the result is wrong."""
    answer = worker.ask(600.0)
    if "error" in answer:
        _tell_sample(worker.name, answer)
        return answer
    if answer["passed"]:
        return {"check": answer["errors"]}
    wrong = f"{answer['errors']} from float64; allowed is {answer['bound']}"
    if ENTRIES[worker.name].kind == "ours":
        raise CheckFailed(f"{worker.name} is {wrong}")
    worker.stop()
    answer = {"error": f"wrong, and so not timed: {wrong}"}
    _tell_sample(worker.name, answer)
    return answer


def summary(samples: list[Sample]) -> dict[str, Any]:
    """One entry's samples: medians with their spread; the highest memory; what the last one saw."""
    good = [s for s in samples if "error" not in s]
    failed = [s["error"] for s in samples if "error" in s]
    if failed or not good:
        return {"error": failed[0] if failed else "did not run"}
    last = good[-1]
    inside = spread([sum(s["passes"].values()) / s["seconds"] for s in good])
    return {
        "seconds": spread([s["seconds"] for s in good]),
        "forward": spread([s["forward"] for s in good]),
        "peak": max(s["peak"] for s in good),
        "share of passes": inside if last["passes"] else None,
        **{
            k: last[k]
            for k in (
                "passes",
                "gradients",
                "loss",
                "notes",
                "plans",
                "backend",
                "preparation",
                "joules",
            )
        },
    }


def _sound(field: Field, rows: dict[str, Any]) -> None:
    """Raise if ours failed, or if entries with the same loss found other values than each other."""
    failed = {n: r["error"] for n, r in rows.items() if "error" in r and ENTRIES[n].kind == "ours"}
    if failed:
        raise CheckFailed(f"{field.case.title}: {failed}")
    losses: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        if row.get("loss") is not None:
            losses.setdefault(MIX.get(field.case.form, ENTRIES[name].mix), {})[name] = row["loss"]
    for found in losses.values():
        low, high = min(found.values()), max(found.values())
        if not high - low <= AGREEMENT[field.case.dtype] * abs(high):
            raise CheckFailed(f"losses differ at {field.case.title}: {found}")


def _tell(line: str) -> None:
    print(line, flush=True)


def _tell_sample(name: str, sample: Sample) -> None:
    seconds = sample.get("seconds", 0.0)
    _tell(f"  {name:18} {sample.get('error') or f'{seconds:.3f} s'}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add = parser.add_argument
    add("--suite", choices=SUITES, default="cpu")
    add("--cases", nargs="*", metavar="WORD", help="only cases whose title has one of these")
    add("--entries", nargs="*", choices=ENTRIES, metavar="NAME", help="only these entries")
    add("--also", nargs="*", choices=ALSO, default=ALSO)
    add("--scale", type=float, default=1.0, help="factor on vocabularies, to try things out")
    add("--seconds", type=float, help="time for each entry, instead of the suite's")
    add("--threads", type=int, help="default: torch's choice")
    add("--output", type=Path, help="default: benchmarks/results/<machine>/<date>-<commit>.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Leave through the clean-up: the inputs lie in memory that outlives the process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    main()
