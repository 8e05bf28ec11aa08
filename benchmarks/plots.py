"""Results as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.limits import MIB
from benchmarks.sweeps import slopes

Results = dict[str, Any]
Rows = list[dict[str, Any]]


def draw(results: Results, folder: Path) -> list[Path]:
    """Every picture that the results have numbers for."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (part, plot) in PLOTS.items():
        if not results.get(part):
            continue
        figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        plot(axes, results)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110, metadata={"Software": None})
        plt.close(figure)
    return paths


def _curves(axes: Axes, rows: Rows, x: str, y: str, label: dict[str, str] | None = None) -> None:
    for name in dict.fromkeys(r["entry"] for r in rows):
        own = [r for r in rows if r["entry"] == name and r.get(y) is not None]
        if own:
            points = [r[x] for r in own], [r[y] for r in own]
            axes.plot(*points, "o-", label=(label or {}).get(name, name))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")


def time_by_tokens(axes: Axes, results: Results) -> None:
    """Seconds a step; the legend has the exponents."""
    rows = [r for r in results["sweeps"] if r["axis"] == "tokens"]
    found = slopes(rows)
    names = {e: f"{e}: tokens^{slope:.2f}" for (_, e), slope in found.items()}
    _curves(axes, rows, "size", "seconds", names)
    axes.set(xlabel="tokens", ylabel="seconds a step", title="Time against tokens")


def memory_by_vocabulary(axes: Axes, results: Results) -> None:
    """MiB of temporaries."""
    rows = [r for r in results["sweeps"] if r["axis"] == "vocabulary" and r["entry"] != "limit"]
    rows = [r | {"MiB": max(r["temporaries"] / MIB, 1)} for r in rows if "error" not in r]
    _curves(axes, rows, "size", "MiB")
    axes.set(xlabel="vocabulary", ylabel="temporaries, MiB", title="Memory against vocabulary")


def error_by_chunks(axes: Axes, results: Results) -> None:
    """Relative distance of dW from float64, in bf16."""
    _curves(axes, results["chunks"], "chunks", "weight")
    axes.set(xlabel="chunks of tokens", ylabel="error of dW", title="bf16 error against chunks")


def error_by_scale(axes: Axes, results: Results) -> None:
    """The same of dX as logits grow, teacher and student nearly equal."""
    _curves(axes, results["scales"], "scale", "input")
    axes.set(xlabel="factor on the logits", ylabel="error of dX", title="bf16 error against scale")


def roofline(axes: Axes, results: Results) -> None:
    """Rates of the passes as shares of a copy."""
    rows = results["primitives"]
    labels = [f"{r['backend']} {r['dtype']}, {r['routing']}, {r['threads']} thr." for r in rows]
    for k, name in enumerate(("pass 1", "pass 2")):
        at = [i + 0.4 * k for i in range(len(rows))]
        axes.barh(at, [r[name] / r["memcpy"] for r in rows], height=0.38, label=name)
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set_yticks([i + 0.2 for i in range(len(rows))], labels, fontsize="xx-small")
    axes.set(xlabel="rate ÷ that of a copy of memory", title="Primitives beside memcpy")


PLOTS: dict[str, tuple[str, Callable[[Axes, Results], None]]] = {
    "time-tokens": ("sweeps", time_by_tokens),
    "memory-vocabulary": ("sweeps", memory_by_vocabulary),
    "error-chunks": ("chunks", error_by_chunks),
    "error-scale": ("scales", error_by_scale),
    "roofline": ("primitives", roofline),
}
