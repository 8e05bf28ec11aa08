"""How a step is measured on a GPU: taking turns, with events, beside a copy of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.cases import Case, Problem

GIB = 1 << 30
Row = dict[str, Any]
Step = Callable[[], Any]


@dataclass(frozen=True)
class Bench:
    """Where and how long to measure.

    Args:
        device: of all tensors.
        backend: that computes ours.
        deadline: ``time.monotonic()`` by which to be done.
        rounds: most runs of a step.
        dry: tiny shapes.
    """

    device: torch.device
    backend: str
    deadline: float
    rounds: int = 10
    dry: bool = False

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def case(self, case: Case) -> Case:
        """The case, or in a dry run a tiny one like it."""
        if not self.dry:
            return case
        tiny = replace(case, rows=min(case.rows, 6), hidden_s=8, hidden_t=12, vocab=70)
        return replace(tiny, vocab_t=75 if case.vocab_t else 0, dtype="float32")

    def problem(self, case: Case) -> Problem:
        """Tensors on the device, made there."""
        return Problem.of(case, device=self.device)

    def race(self, steps: dict[str, Step], seconds: float = 4.0) -> dict[str, Row]:
        """Median milliseconds of steps that take turns, and their peak memory in MiB."""
        rows: dict[str, Row] = {name: {} for name in steps}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for name, step in steps.items():
            try:
                step()  # compiles, allocates
                rows[name]["peak MiB"] = self.peak(step)
            except Exception as error:  # its reason belongs in the table
                rows[name]["error"] = f"{type(error).__name__}: {str(error)[:160]}"
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        running = [name for name in steps if "error" not in rows[name]]
        begin = time.monotonic()
        for i in range(self.rounds):
            if i >= 2 and (time.monotonic() - begin > seconds or self.left < 0):
                break
            for name in running:
                times[name].append(self.once(steps[name]))
        for name in running:
            rows[name]["ms"] = round(sorted(times[name])[len(times[name]) // 2], 4)
            rows[name]["runs"] = len(times[name])
            if self.left > 0 and (joules := self.joules(steps[name])) is not None:
                rows[name]["J"] = round(joules, 3)
        return rows

    def joules(self, step: Step, seconds: float = 0.4) -> float | None:
        """Energy of one run, where the device counts it, some ten times a second."""
        before, begin, runs = _energy(self.device), time.monotonic(), 0
        if before is None:
            return None
        while time.monotonic() - begin < seconds:
            step()
            self.sync()
            runs += 1
        after = _energy(self.device)
        return None if after is None else (after - before) / runs

    def once(self, step: Step) -> float:
        """Milliseconds of one run."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - begin)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        self.sync()
        return start.elapsed_time(end)

    def peak(self, step: Step) -> float:
        """MiB that one run allocates at most, beside what was there."""
        if self.device.type != "cuda":
            return 0.0
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made = step()
        self.sync()
        del made
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def _energy(device: torch.device) -> float | None:
    """Joules since the driver was loaded, by NVML, or None."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(
            str(torch.cuda.get_device_properties(device).uuid)
        )
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except Exception:  # no such package, or a device that does not count
        return None


def products(p: Problem, rows: int = 8192) -> Step:
    """The four bare products, at most so many rows at a time, in the inputs' dtype."""
    x, w, t_x, t_w = (y.detach() for y in (p.input, p.weight, p.t_input, p.t_weight))
    n, vocab = min(rows, len(x)), len(w)
    z, t = x.new_empty(n, vocab), x.new_empty(n, len(t_w))
    dx, dw = torch.empty_like(x), torch.empty_like(w)

    def step() -> None:
        for i in range(0, len(x), n):
            part = slice(i, min(i + n, len(x)))
            m = part.stop - i
            torch.mm(x[part], w.t(), out=z[:m])
            torch.mm(t_x[part], t_w.t(), out=t[:m])
            torch.mm(z[:m], w, out=dx[part])
            torch.addmm(dw, z[:m].t(), x[part], beta=float(i > 0), out=dw)

    return step


def memcpy(b: Bench) -> float:
    """GB/s of a device copy, bytes read and written."""
    source = torch.empty(2 * GIB if not b.dry else 1 << 16, dtype=torch.uint8, device=b.device)
    target = torch.empty_like(source)
    row = b.race({"memcpy": lambda: target.copy_(source)})["memcpy"]
    return 2 * source.numel() / row["ms"] / 1e6


def table(title: str, rows: list[Row]) -> str:
    """Rows as text in columns."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    text = [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(x) for x in column) for column in zip(columns, *text, strict=True)]
    lines = [
        "  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)) for r in (columns, *text)
    ]
    return "\n".join([f"\n{title}", *lines])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 0.1 else str(value)
