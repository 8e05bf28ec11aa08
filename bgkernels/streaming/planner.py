"""How a memory budget becomes a tiling: rows a chunk, columns a tile, tiles kept between passes.

A chunk of rows walks the vocabulary once to gather statistics and once, backwards, for the
gradient. Tiles that stay in memory in between cost nothing the second time; the others are
multiplied again. So one loop runs from four GEMM-equivalents (student and teacher logits, dX, dW)
where everything fits to six where nothing does, and the planner looks for the cheapest point within
the budget. With a single chunk every tile of dW is complete at once; with several, dW is summed in
fp32 beside the gradient. Where that sum does not fit and the statistics are known already, the
chunks are walked once for each of several *groups* of columns, and the sum is of one group.

The gradient of a single chunk is written from its end to its beginning, so until then its beginning
is free memory: the last tiles, which are read again first, are kept there at no cost.

On a GPU, the gradients of tiles may be *deferred* instead: they wait, in 16 bits, until all chunks
have been walked, and then one product makes a tile's dW, without a sum. Columns for which there is
no room are walked again, now that the statistics are known. Half of the gradients can wait in
memory of dW that is written later.

Kept tiles of two heads with 16-bit operands may be *coded* in half the bytes
(:mod:`bgkernels.backends.code`). The last tile of pass 1 is the first of pass 2, and needs no slot.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from bgkernels.backends.code import row_words
from bgkernels.streaming.cost import cost_of, total

DEFAULT_BUDGET = {"cpu": 3 << 29, "cuda": 2 << 30}
"""Bytes of temporaries where ``memory_budget`` is None, by device type."""

PANEL = 64
"""Columns of a packed operand that are at least packed at once (csrc/cpu/packing.h)."""

WIDTHS = (256, 512, 1024, 2048, 4096, 6144, 8192, 12288, 16384)


class BudgetError(ValueError):
    """No tiling fits the memory budget; the message says what would."""


@dataclass(frozen=True)
class Demand:
    """What the tiles of a model take.

    Args:
        logit_bytes: a (row, column) that is kept between the passes.
        tile_bytes: further bytes a (row, column) of the one tile in work.
        weight_bytes: a weight element of a tile that is widened.
        row_bytes: a row of a chunk.
        hidden: width of the head; 0 where the logits are given.
    """

    logit_bytes: int = 0
    tile_bytes: int = 0
    weight_bytes: int = 0
    row_bytes: int = 0
    hidden: int = 0

    def __add__(self, other: Demand) -> Demand:
        """Both; of weights one tile at a time."""
        return Demand(
            self.logit_bytes + other.logit_bytes,
            self.tile_bytes + other.tile_bytes,
            max(self.weight_bytes, other.weight_bytes),
            self.row_bytes + other.row_bytes,
            self.hidden + other.hidden,
        )


@dataclass(frozen=True)
class Workload:
    """Sizes of one call, in rows, columns and bytes.

    Args:
        rows, columns, compared: tokens, student columns, columns with a teacher.
        hidden_s, hidden_t: widths; 0 where the logits are given.
        logit_bytes: bytes a (row, column) that a kept tile takes: student and teacher logits that
            are computed.
        tile_bytes: further bytes a (row, column) of the one tile in work: gradient beside the
            logits, backend scratch.
        weight_bytes: bytes a weight element of a tile that is widened, or multiplied by a library
            that packs it (0: none).
        row_bytes: bytes a row of a chunk: widened inputs, input gradient, state.
        weight_sum_bytes: bytes of the fp32 sum of dW that several chunks need beside the gradient
            (0: none needed).
        weight_grad_bytes: bytes a column of the weight's gradient, where tiles may be kept until it
            is written (0: they may not).
        input_sum_bytes: bytes of the fp32 sum of dX that several groups need (0: none needed).
        grad_products: student products of pass 2 (dX, dW): 0, 1 or 2; 0 with ``backward`` False.
        statistics, backward: which passes run.
        reads: reads of the logits in pass 1: 2 with pairwise statistics.
        codable: whether kept tiles may be coded.
        inline: bytes in which logits are multiplied that primitives multiply as they read them;
            0: they are multiplied before.
        packing: bytes of packed operands that a product fills if it can, a panel at least; 0: its
            operands are not packed.
        scratch_bytes: bytes an element of a tile of dW that is multiplied beside its gradient.
        sum_traffic: bytes that are moved to add a product to an element of a sum.
        gradient_bytes: bytes a (row, column) of the gradient of a tile.
        weight_owned: whether dW is added to a sum of the caller's.
        deferrable: whether the gradients of tiles may wait for the last chunk.
    """

    rows: int
    columns: int
    compared: int
    hidden_s: int
    hidden_t: int
    logit_bytes: int
    tile_bytes: int
    weight_bytes: int
    row_bytes: int
    weight_sum_bytes: int
    weight_grad_bytes: int
    grad_products: int
    statistics: bool = True
    backward: bool = True
    reads: int = 1
    device: str = "cpu"
    input_sum_bytes: int = 0
    codable: bool = False
    inline: int = 0
    packing: int = 0
    scratch_bytes: int = 0
    sum_traffic: int = 8
    gradient_bytes: int = 4
    weight_owned: bool = False
    deferrable: bool = False


@dataclass(frozen=True)
class Plan:
    """A tiling. ``kept`` tiles, the last ones, stay in memory between the passes of a chunk.

    ``lent`` of them, the very last, lie in the gradient of the weight. All chunks are walked for
    each of ``groups`` groups of tiles. A kept pair of logits takes ``pair_bytes``; where tiles are
    coded, ``coded`` of the kept ones are: the first. Where the logits of tiles are multiplied
    ``inline``, by the primitives that read them, all of the kept ones are.

    Where gradients are deferred, those of all kept tiles are: ``deferred``. Of them, the last
    ``deposited`` lie in the gradient of the weight. Every other tile is a group of its own.
    """

    rows: int
    columns: int
    chunk: int
    width: int
    kept: int
    bytes: int
    lent: int = 0
    groups: int = 1
    pair_bytes: int = 0
    coded: int = 0
    inline: bool = False
    deferred: int = 0
    deposited: int = 0

    @property
    def slot_bytes(self) -> int:
        """Of a kept tile that is not in work."""
        if self.coded or self.inline:
            return coded_bytes(self.chunk, self.width)
        return self.chunk * self.width * self.pair_bytes

    def chunks(self) -> Iterator[slice]:
        """Row ranges, balanced."""
        for start in range(0, max(self.rows, 1), self.chunk):
            yield slice(start, min(start + self.chunk, self.rows))

    def tiles(self) -> list[slice]:
        """Column ranges, in order."""
        return [
            slice(c, min(c + self.width, self.columns)) for c in range(0, self.columns, self.width)
        ]

    def leading_tiles(self, columns: int) -> list[slice]:
        """Column ranges, of which those beyond so many columns are empty or negative."""
        return [slice(c.start, min(c.stop, columns)) for c in self.tiles()]

    def tile_groups(self) -> list[range]:
        """Numbers of the tiles of each group; where gradients are deferred, last tiles first."""
        count = len(self.tiles())
        if self.deferred:
            first = count - self.deferred
            return [range(first, count), *(range(i, i + 1) for i in reversed(range(first)))]
        size = max(1, math.ceil(count / self.groups))
        return [range(i, min(i + size, count)) for i in range(0, max(count, 1), size)]

    def repeated(self, reads: int) -> float:
        """How often the logits are multiplied again in so many reads of all tiles.

        The second read begins where the first ended. Of later ones, each begins at the other end,
        and the place of the tile in work holds nothing that is needed, where it must serve others.
        """
        missing = len(self.tiles()) - self.kept
        lost = max(0, reads - 2) * (missing > 0 and not self.coded and not self.inline)
        return (missing * (reads - 1) + lost) / len(self.tiles())

    @property
    def chunk_count(self) -> int:
        """Number of row ranges."""
        return max(1, math.ceil(self.rows / self.chunk))


def plan(work: Workload, budget: int | None) -> Plan:
    """The cheapest tiling whose temporaries fit ``budget`` bytes; None: the device's default.

    Raises:
        BudgetError: none fits; the message says how much would.
    """
    budget = budget or DEFAULT_BUDGET.get(work.device, DEFAULT_BUDGET["cpu"])
    best, least = _search(work, budget)
    if best is None:
        raise BudgetError(
            f"`memory_budget` must be at least {least} bytes for these shapes; got {budget}"
        )
    return best


@functools.lru_cache(maxsize=256)
def _search(work: Workload, budget: int) -> tuple[Plan | None, int]:
    """The cheapest plan, or None; and the bytes that some plan needs. Every step asks again."""
    best: tuple[float, Plan] | None = None
    least = math.inf
    for width in _widths(work):
        for count in _chunk_counts(work.rows):
            chunk = cost_of(work.device).rounded(max(1, math.ceil(work.rows / count)))
            chunk = max(1, min(chunk, work.rows))
            least = min(least, _least_bytes(work, chunk, width))
            for coded in (True,) if work.inline else (False, True)[: 1 + work.codable]:
                for fit in (_fit, _fit_deferred):
                    found = fit(work, chunk, width, budget, coded)
                    if found is not None and (best is None or total(work, found) < best[0]):
                        best = (total(work, found), found)
    return (None if best is None else best[1]), int(least)


def _widths(work: Workload) -> list[int]:
    """Candidate tile widths, widest first; the last tile is never tiny."""
    limit = cost_of(work.device).width
    found = {_balanced(work.columns, w) for w in WIDTHS if w <= limit}
    if work.device == "cpu" and not work.hidden_s + work.hidden_t:
        found.add(max(work.columns, 1))  # logits that exist are read fastest in the order they lie
    if work.device == "cuda":  # so that rows of tiles begin at multiples of 128 bytes
        found = {cost_of(work.device).rounded(width) for width in found}
    return sorted(found, reverse=True)


def _balanced(columns: int, width: int) -> int:
    return (
        math.ceil(columns / math.ceil(columns / width) / 64) * 64
        if columns > width
        else max(columns, 1)
    )


def _chunk_counts(rows: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 11 …: numbers of row chunks to try."""
    count = 1
    while count < max(rows, 1):
        yield count
        count = max(count + 1, int(count * 1.4))
    yield max(rows, 1)


def _fixed_bytes(work: Workload, chunk: int, width: int) -> int:
    """All but kept tiles and sums."""
    weights = width * (work.hidden_s + work.hidden_t) * work.weight_bytes
    weights += width * work.hidden_s * work.scratch_bytes
    tiles = chunk * (width * work.tile_bytes + work.row_bytes)
    return tiles + weights + _packing_bytes(work, chunk, width)


def _packing_bytes(work: Workload, chunk: int, width: int) -> int:
    """Of the packed operand of the product that packs most, or of blocks of logits."""
    if not work.packing:
        return 0
    heads = () if work.inline else (work.hidden_s, work.hidden_t)
    shapes = [(hidden, width) for hidden in heads]
    if work.backward and work.grad_products:
        shapes += [(width, work.hidden_s), (chunk, work.hidden_s)]
    sizes = (
        2 * depth * max(PANEL, min(PANEL * math.ceil(columns / PANEL), work.packing // (2 * depth)))
        for depth, columns in shapes
        if depth and columns
    )
    return max(work.inline, *sizes, 0)


def coded_bytes(chunk: int, width: int) -> int:
    """Of a kept tile that is coded."""
    return 4 * chunk * row_words(width)


def _sums(work: Workload, chunk: int) -> int:
    """Bytes of the sum of dW over several chunks."""
    return work.weight_sum_bytes if chunk < work.rows and work.backward else 0


def _most_groups(work: Workload, width: int) -> int:
    """A group is a tile at least; where statistics are yet to come there is one."""
    return 1 if work.statistics else math.ceil(work.columns / width)


def _logits_in_work(work: Workload, chunk: int, width: int) -> int:
    """Bytes of the tile that is in work, of both models."""
    return 0 if work.inline else chunk * width * work.logit_bytes


def _least_bytes(work: Workload, chunk: int, width: int) -> int:
    fixed = _fixed_bytes(work, chunk, width) + _logits_in_work(work, chunk, width)
    sums, groups = _sums(work, chunk), _most_groups(work, width)
    grouped = math.ceil(sums / groups) + work.input_sum_bytes
    return fixed + (min(sums, grouped) if sums and groups > 1 else sums)


def _fit(work: Workload, chunk: int, width: int, budget: int, coded: bool = False) -> Plan | None:
    tiles = math.ceil(work.columns / width)
    fixed, tile = _fixed_bytes(work, chunk, width), _logits_in_work(work, chunk, width)
    sums, groups = _sums(work, chunk), 1
    if sums and fixed + tile + sums > budget and _most_groups(work, width) > 1:
        room = budget - fixed - tile - work.input_sum_bytes
        size = max(0, room) * tiles // sums  # of a group, in tiles
        if size < 1:
            return None
        groups = math.ceil(tiles / size)
        sums = math.ceil(sums * size / tiles) + work.input_sum_bytes
    fixed += sums
    several_passes = work.statistics and (work.backward or work.reads > 1)
    inline = work.inline > 0
    if coded:
        if not (several_passes or inline):
            return None
        fixed, tile = fixed + tile, coded_bytes(chunk, width)
    spared = coded and work.reads == 1 and not inline  # the tile in work is the first of pass 2
    lent = _lent(work, tiles, width, tile) if chunk >= work.rows else 0
    lent = min(lent, tiles - spared)
    wanted = tiles - spared - lent if several_passes else not inline
    own = wanted if tile == 0 else min(wanted, (budget - fixed) // tile)
    if own < (not coded) or fixed > budget:
        return None
    kept = max(int(not inline), own + lent + spared)
    return Plan(
        work.rows, work.columns, chunk, width, kept, int(fixed + own * tile), lent, groups,
        work.logit_bytes, coded=(own + lent) * coded, inline=inline,
    )  # fmt: skip


def _fit_deferred(
    work: Workload, chunk: int, width: int, budget: int, coded: bool = False
) -> Plan | None:
    """Several chunks with as many deferred tiles as fit; each of them is kept in its chunk too."""
    if not work.deferrable or chunk >= work.rows:
        return None
    tiles, slot = math.ceil(work.columns / width), work.rows * width * work.gradient_bytes
    tile, beside = chunk * width * work.logit_bytes, work.gradient_bytes % 4  # of fp32 logits
    fixed = _fixed_bytes(work, chunk, width) - chunk * width * beside  # it waits elsewhere
    if coded:
        fixed, tile = fixed + tile, coded_bytes(chunk, width)
    spared, free = coded and work.reads == 1, _lent(work, tiles, width, slot)
    count = tiles
    if fixed + (tiles - spared) * tile + (tiles - free) * slot > budget:
        # Of the others, one at a time takes a slot that is not lent; dX is complete at the end.
        fixed += work.input_sum_bytes * (work.rows - chunk) // work.rows
        room = budget - fixed + spared * tile
        count = min(tiles - 1, (room - slot) // tile, (room + free * slot) // (tile + slot))
    if count < 1:
        return None
    deposited = min(free, count - (count < tiles))
    memory = fixed + (count - spared) * tile + (count - deposited) * slot
    return Plan(
        work.rows, work.columns, chunk, width, count, int(memory), groups=tiles - count + 1,
        pair_bytes=work.logit_bytes, coded=(count - spared) * coded, deferred=count,
        deposited=deposited,
    )  # fmt: skip


def _lent(work: Workload, tiles: int, width: int, tile: int) -> int:
    """How many tiles fit before the place in the gradient where the last of them is written.

    Then each of them lies before its own place: slots of the gradient are filled in the order in
    which tiles are.
    """
    if not (work.statistics and work.backward and tile):
        return 0
    return min(tiles - 1, (tiles - 1) * width * work.weight_grad_bytes // tile)
