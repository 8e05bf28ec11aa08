"""What a plan costs: the arithmetic by which the planner compares tilings, term by term.

Times are in units of one multiply-add at the full speed of a device's products. Each term is a
roofline: products by their multiply-adds, everything else by the bytes it moves, and what is
started by a number of its own; nothing is taken to run beside anything else.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bgkernels.streaming.planner import Plan, Workload


@dataclass(frozen=True)
class Cost:
    """What the planner knows of a device, in units of one multiply-add.

    Args:
        overhead: rows, and columns, whose time a product loses for being small: r rows take as long
            as r + this many at full speed.
        byte: multiply-adds in the time of moving one byte.
        launch: multiply-adds in the time of starting one tile.
        width: widest tile; on a CPU a tile and its weights should stay near the last-level cache.
        chunk: multiply-adds in the time of what a chunk of rows takes between its passes.
        block: rows and columns that products take at once, and pay for if there are fewer.
        pair: multiply-adds in the time in which a pass computes with a pair of logits, beside the
            bytes that it moves.
    """

    overhead: float
    byte: float
    launch: float
    width: int
    chunk: float = 0
    block: int = 1
    pair: float = 0

    def rounded(self, size: int) -> int:
        """Rows or columns that a product pays for."""
        return -(-size // self.block) * self.block


# Of other devices: the CPU's. Those of CUDA are computed, not measured: for 788 TFLOP/s in 16 bits,
# 4.3 TB/s, 10 µs to start the kernels of a tile, 60 launches of 2.5 µs between the passes, and
# products in blocks of 128 rows. Wider tiles would leave less choice of how many are kept.
# What pairs take on a CPU was measured on a Zen 4 (RATE).
# `python -m benchmarks.gpu --sections tiles` measures each number, and prints the line to put here.
COST = {
    "cpu": Cost(overhead=24, byte=4, launch=1e7, width=4096, pair=50),
    "cuda": Cost(overhead=0, byte=92, launch=4e9, width=16384, chunk=6e10, block=128),
}


RATE = 1e11
"""Multiply-adds a second at which the numbers of a CPU were measured: of one thread."""


def cost_of(device: str) -> Cost:
    """What is known of a type of device."""
    return COST.get(device, COST["cpu"])


@dataclass(frozen=True)
class Estimate:
    """The terms of a plan's time, in multiply-adds; their sum is what the planner compares.

    Args:
        products: logits, dX and dW, each once, with what small ones lose.
        repeated: logits that are multiplied again.
        sums: traffic of dX, tile by tile, of dW, chunk by chunk, and of widened weights.
        rows: of the primitives: what they compute, and traffic of logits, codes and gradients.
        launches: of tiles, and between the passes.
    """

    products: float
    repeated: float
    sums: float
    rows: float
    launches: float

    @property
    def total(self) -> float:
        """The sum of all terms."""
        return float(sum(astuple(self)))


def total(work: Workload, p: Plan) -> float:
    """Time of a plan in multiply-adds."""
    return estimate(work, p).total


def seconds(work: Workload, p: Plan, rate: float, threads: int) -> float:
    """Expected time of a plan on a CPU.

    Args:
        work: the workload.
        p: a plan for it.
        rate: multiply-adds a second of its products.
        threads: which share the other work.
    """
    terms = estimate(work, p)
    multiplied = terms.products + terms.repeated
    return multiplied / rate + (terms.total - multiplied) / (RATE * threads)


def bare_products(work: Workload) -> float:
    """Multiply-adds of the products that no plan can do without."""
    student, teacher = work.columns * work.hidden_s, work.compared * work.hidden_t
    gradients = work.grad_products * student * work.backward
    return float(work.rows * (student + teacher + gradients))


def estimate(work: Workload, p: Plan) -> Estimate:
    """The terms of a plan's time."""
    cost, tiles = cost_of(work.device), len(p.tiles())
    student, teacher = work.columns * work.hidden_s, work.compared * work.hidden_t
    passes = work.reads * work.statistics + work.backward
    rows = sum(cost.rounded(c.stop - c.start) + cost.overhead for c in p.chunks())
    small = rows / max(work.rows, 1) * (cost.rounded(p.width) + cost.overhead) / p.width
    again = (student + teacher) * p.repeated(passes)
    widened = p.chunk_count * (student + teacher + again) * work.weight_bytes
    started = passes * tiles * cost.launch + cost.chunk * (work.statistics and work.backward)
    return Estimate(
        products=bare_products(work) * small,
        repeated=work.rows * again * small,
        sums=(widened + _sums(work, p)) * cost.byte,
        rows=_row_bytes(work, p) * cost.byte + passes * work.rows * work.columns * cost.pair,
        launches=p.chunk_count * started,
    )


def _sums(work: Workload, p: Plan) -> float:
    """Bytes that move while dX and dW are added up."""
    if not (work.backward and work.grad_products):
        return 0.0
    student, moved = work.columns * work.hidden_s, 0.0
    weight = work.grad_products == 2 or work.weight_sum_bytes or work.weight_grad_bytes
    if work.grad_products == 2 or not weight:
        moved += work.sum_traffic * work.rows * work.hidden_s * len(p.tiles())
    # Deferred gradients make dW at once: it is added to a sum of the caller's or to none.
    times = int(work.weight_owned) if p.deferred else p.chunk_count
    if weight and (times > 1 or work.weight_owned):
        moved += work.sum_traffic * student * times
        moved += 6 * student * (work.weight_sum_bytes > 0)  # narrowed at the end
    return moved + (p.groups - 1) * p.chunk_count * 8 * p.chunk * (work.hidden_s + work.hidden_t)


def _row_bytes(work: Workload, p: Plan) -> float:
    """Bytes of logits that are computed, of their codes and gradient, which the primitives move."""
    coded, logits = p.coded / len(p.tiles()), 0 if p.inline else work.logit_bytes
    later = (work.reads - 1) * work.statistics + work.backward  # reads of logits or codes
    a_pair = logits * work.statistics + 4 * coded
    a_pair += later * (4 * coded + logits * (1 - coded))
    return work.rows * work.columns * (a_pair + work.gradient_bytes * work.backward)
