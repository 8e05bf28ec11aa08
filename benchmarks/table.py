"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.limits import BARE, MIB
from benchmarks.sweeps import slopes

READING = """\
A row of a table is one entry: a library, mode and budget, each run in its own process. Columns:

* **step**, s: the median time of forward and backward of the loss and both heads, over interleaved
  runs. **forward** is the forward part of it, **min–max** the range over the runs, whose number is
  in brackets.
* **× limit**: the time as a multiple of the limit, which is the faster of the two rows of bare
  products of the same shape in the same run. Bare products multiply the same matrices and do
  nothing else.
* **peak**, MiB: the high-water mark of resident memory above the inputs. **temporaries** are the
  peak without the gradients.
* **passes**: the share of the step that pass 1 and pass 2 take, with the products of logits that
  they multiply inline.
* **plan**: chunks of tokens × tiles of the vocabulary, the columns of a tile, and how many tiles
  are kept between the passes. All other tiles are multiplied twice. *Inline*: logits are
  multiplied by the passes that read them.

An entry that would take minutes a step at the whole vocabulary says so in the first table, and is
measured at a reduced vocabulary."""
ACCURACY = """\
Each cell is the relative error of dX / of dW against float64, ‖error‖ / ‖exact‖. The column *gap*
says how far the teacher's hidden states are from the student's, with the same head; none means
unrelated models."""

SLOPES = """\
Each cell is the slope of log time by log size along one axis; 1 means proportional. All axes are
varied around 512 tokens, width 512 for both models, 16,384 columns, float32."""
END_TO_END = """\
A step is the forward of teacher and student, the loss, and backward through the student, with
random weights. *Largest batch* is sequences × length: the last of 1, 2, 4 … sequences for which
the step stays within the memory of the last column, which does not count the models."""


def render(results: dict[str, Any]) -> str:
    """All tables."""
    parts = [machine(results), READING]
    for field in results["fields"]:
        parts += [_title(field), steps(field)]
    if "accuracy" in results:
        parts += ["## Gradient error", ACCURACY, _accuracy(results["accuracy"])]
        parts += [_chunks(results["chunks"]), _scales(results.get("scales", []))]
    if "sweeps" in results:
        parts += ["## How cost grows", SLOPES, _slopes(results["sweeps"])]
    if "end to end" in results:
        parts += ["## A step of whole models", END_TO_END, _end_to_end(results["end to end"])]
    if "primitives" in results:
        parts += [
            "## Primitives",
            "GB/s of memory traffic, and the share of memcpy, for logits larger than the caches.",
            _primitives(results["primitives"]),
        ]
    return "\n\n".join(parts)


def headline(results: dict[str, Any]) -> str:
    """The first case in two sentences: our memory and our time beside the fastest peer's."""
    field = results["fields"][0]
    measured = [e for e in field["entries"] if "error" not in e and e["kind"] not in BARE]
    ours = [e for e in measured if e["kind"] == "ours"]
    peers = [e for e in measured if e["kind"] != "ours"]
    smallest, fastest = min(ours, key=_temporaries), min(ours, key=_median)
    case = field["case"]
    sentences = [
        f"Measured: forward and backward of {case['rows']:,} tokens over a vocabulary of "
        f"{case['vocab']:,} ({case['dtype']}; student {case['hidden_s']} wide, teacher "
        f"{case['hidden_t']}). With the smallest budget, the loss holds "
        f"**{_temporaries(smallest):,.0f} MiB** besides inputs and gradients. With the largest, it "
        f"takes **{_median(fastest) / limit(field):.2f} ×** the time of its matrix products alone."
    ]
    if peers:
        peer = min(peers, key=_median)
        sentences.append(
            f"The fastest alternative in that run, {peer['about']}, holds "
            f"{_temporaries(peer):,.0f} MiB and takes {_median(peer) / limit(field):.2f} ×."
        )
    m = results["machine"]
    sentences.append(f"{m['processor']}, {m['threads']} threads: [all tables](docs/benchmarks.md).")
    return "\n".join(sentences)


def _temporaries(e: dict[str, Any]) -> float:
    return float(e["peak"] - e["gradients"]) / MIB


def _median(e: dict[str, Any]) -> float:
    return float(e["seconds"]["median"])


def choices(results: dict[str, Any]) -> str:
    """Our own modes and budgets where heads are multiplied: what each costs, and holds."""
    rows = []
    for field in (f for f in results["fields"] if f["flops"]):
        title, best = field["title"], limit(field)
        for e in field["entries"]:
            if e["kind"] != "ours" or "error" in e or e["backend"] == "eager":
                continue
            what = e["about"].removeprefix("bgkernels, ")
            rows.append([title, what, f"{_median(e) / best:.2f}", f"{_temporaries(e):,.0f}"])
            title = ""
    return markdown(["shape", "mode, budget", "× limit", "temporaries, MiB"], rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def limit(field: dict[str, Any]) -> float:
    """Seconds of the fastest bare products; NaN if none ran."""
    kinds = [e for e in field["entries"] if e["kind"] == "limit" and "error" not in e]
    return min((e["seconds"]["median"] for e in kinds), default=float("nan"))


def machine(results: dict[str, Any]) -> str:
    """Where and when."""
    m = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["packages"].items() if v != "absent")
    return (
        f"{m['processor']} ({', '.join(m['instructions'])}), {m['threads']} threads of "
        f"{m['cores']} cores, {m['memory'] / 2**30:.0f} GiB, {m['system']}; Python {m['python']}, "
        f"{versions}; bgkernels {m['bgkernels']} at {m['commit']}, {m['date']} UTC."
    )


def _title(field: dict[str, Any]) -> str:
    gradients = next((e["gradients"] for e in field["entries"] if "gradients" in e), 0)
    return (
        f"**{field['case']['name']}**: {field['title']} (inputs {field['inputs'] / MIB:,.0f} MiB, "
        f"gradients {gradients / MIB:,.0f} MiB, {field['flops'] / 1e9:,.0f} GFLOP)"
    )


def steps(field: dict[str, Any]) -> str:
    """One field, a line an entry."""
    best = limit(field)
    head = ["entry", "step, s", "forward", "min–max", "× limit", "peak, MiB", "temporaries, MiB",
            "passes", "plan"]  # fmt: skip
    rows = [_step(e, best) for e in field["entries"]]
    if any(e.get("joules") is not None for e in field["entries"]):
        head.append("energy, J")
        rows = [[*r, _digits(e.get("joules"))] for r, e in zip(rows, field["entries"], strict=True)]
    return markdown(head, rows)


def _step(e: dict[str, Any], best: float) -> list[str]:
    name = f"**{e['about']}**" if e["kind"] == "ours" else e["about"]
    if "error" in e:
        return [f"{name}: {_cell(e['error'])}", *["–"] * 8]
    s, memory = e["seconds"], ["–", "–"]
    if e["kind"] not in BARE:
        memory = [f"{b / MIB:,.0f}" for b in (e["peak"], e["peak"] - e["gradients"])]
    share = f"{e['share of passes']['median']:.0%}" if e["share of passes"] else "–"
    return [
        name, _digits(s["median"]), _digits(e["forward"]["median"] or None),
        f"{_digits(s['min'])}–{_digits(s['max'])} ({s['runs']})",
        f"{s['median'] / best:.2f}", *memory, share, _plan(e),
    ]  # fmt: skip


def _plan(e: dict[str, Any]) -> str:
    """``chunks × tiles of width, kept``, for each walk; or the tiling of bare products."""
    walks = [
        f"{p['chunks']} × {p['tiles']} of {p['width']:,}, {p['kept']} kept"
        + ", inline" * p.get("inline", False)
        for p in e["plans"]
    ]
    if walks:
        return f"{e['backend']}: " + "; ".join(dict.fromkeys(walks))
    return str(e["notes"].get("tiling", "–"))


def _accuracy(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(r["entry"] for r in rows))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for r in rows:
        key = (r["dtype"], f"{r['temperature']:g}", f"{r['gap']:g}" if r["gap"] else "none")
        lines.setdefault(key, {})[r["entry"]] = _errors(r)
    table = [[*key, *(cells.get(n, "–") for n in names)] for key, cells in lines.items()]
    return markdown(["dtype", "T", "gap", *names], table)


def _chunks(rows: list[dict[str, Any]]) -> str:
    counts = sorted({r["chunks"] for r in rows})
    cells = {(r["entry"], r["chunks"]): _errors(r) for r in rows}
    names = dict.fromkeys(r["entry"] for r in rows)
    return markdown(
        ["bfloat16, chunks of tokens", *map(str, counts)],
        [[n, *(cells[n, c] for c in counts)] for n in names],
    )


def _scales(rows: list[dict[str, Any]]) -> str:
    scales = list(dict.fromkeys(r["scale"] for r in rows))
    cells = {(r["entry"], r["scale"]): _errors(r) for r in rows}
    names = dict.fromkeys(r["entry"] for r in rows)
    return markdown(
        ["bfloat16, gap 0.01, logits times", *(f"{x:g}" for x in scales)],
        [[n, *(cells[n, x] for x in scales)] for n in names],
    )


def _slopes(points: list[dict[str, Any]]) -> str:
    found = slopes(points)
    axes, names = (list(dict.fromkeys(p[k] for p in points)) for k in ("axis", "entry"))
    rows = [[n, *(f"{found.get((a, n), float('nan')):.2f}" for a in axes)] for n in names]
    return markdown(["exponent of", *axes], rows)


def _end_to_end(rows: list[dict[str, Any]]) -> str:
    head = ("variant", "step, s", "peak, MiB", "largest batch", "within, MiB")
    return markdown(
        head,
        [
            [
                r["who"], _digits(r["seconds"]["median"]), f"{r['peak'] / MIB:,.0f}",
                f"{r['largest']} × {r['length']}", f"{r['room'] / MIB:,.0f}",
            ]
            for r in rows
        ],
    )  # fmt: skip


def _errors(r: dict[str, Any]) -> str:
    return "–" if "error" in r else f"{r['input']:.1e} / {r['weight']:.1e}"


def _primitives(rows: list[dict[str, Any]]) -> str:
    head = ("backend", "dtype", "routing", "threads", "memcpy, GB/s", "pass 1", "pass 2")
    table = []
    for r in rows:
        rates = (f"{r[name]:.1f} ({r[name] / r['memcpy']:.0%})" for name in head[-2:])
        labels = (str(r[name]) for name in head[:4])
        table.append([*labels, f"{r['memcpy']:.1f}", *rates])
    return markdown(head, table)


def _digits(x: float | None) -> str:
    """Three significant digits."""
    if x is None:
        return "–"
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
