"""Runs cells of a test in several processes at once, each in a process group of its own.

A cell is a function of a :class:`World`; what it returns or raises is written down by rank, so that
one start of the processes serves many tests.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing import start_processes

from bgkernels.backends.native import products
from tests.conftest import poison_unwritten_memory
from tests.problems import DTYPES, WIDEN, Loss, Problem
from tests.yardstick import assert_each_close

PRELOADED = ["tests.conftest", "torch.distributed.tensor", "sympy"]
"""Imported once, for the processes of all tests; torch imports sympy when it first needs it."""
PATIENCE = timedelta(seconds=30)
CUT = {"linear_weight": 0, "linear_bias": 0, "weight": 0, "bias": 0, "logits": -1}
"""The dimension of each tensor that is the vocabulary."""


@dataclass(frozen=True)
class World:
    """Where a cell runs: one of the ranks of ``group``."""

    rank: int
    size: int
    group: dist.ProcessGroup


Cell = Callable[[World], Any]


@dataclass
class Outcome:
    """What a cell did on each rank: an error's text or None, and a value that JSON can hold."""

    errors: list[str | None]
    values: list[Any]

    def same(self) -> Any:
        """The value of every rank, which must be one; no rank may have failed."""
        assert not any(self.errors), "\n".join(
            f"rank {i}: {e}" for i, e in enumerate(self.errors) if e
        )
        assert all(v == self.values[0] for v in self.values), self.values
        return self.values[0]


@functools.cache
def outcomes(module: str, size: int) -> dict[str, Outcome]:
    """Run ``CELLS[size]`` of a module on as many ranks of this machine."""
    get_context("forkserver").set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        try:
            start_processes(_work, (size, folder, module), size, start_method="forkserver")
        except Exception as error:  # a process died: once said, not tried again for each cell
            gone = Outcome([f"the processes ended: {error}"], [None])
            return defaultdict(lambda: gone)
        written = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
    by_name = {name: [w[name] for w in written] for name in written[0]}
    return {name: Outcome([e for e, _ in x], [v for _, v in x]) for name, x in by_name.items()}


def _work(rank: int, size: int, folder: str, module: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    poison_unwritten_memory(pytest.MonkeyPatch())
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    written = {}
    for name, cell in importlib.import_module(module).CELLS[size].items():
        torch.manual_seed(0)
        group = dist.new_group(timeout=PATIENCE)
        try:
            with products.using(WIDEN):
                written[name] = (None, cell(World(rank, size, group)))
        except (Exception, pytest.fail.Exception) as error:
            written[name] = (f"{type(error).__name__}: {error}", None)
    Path(folder, f"{rank}.json").write_text(json.dumps(written))
    dist.destroy_process_group()


Edges = tuple[int, ...]


def sharded(tensors: Mapping[str, Tensor], edges: Edges, rank: int) -> dict[str, Tensor]:
    """Each tensor with the columns of one rank; those without a vocabulary whole."""
    start, stop = edges[rank], edges[rank + 1]
    return {
        name: x.narrow(CUT[name], start, stop - start) if name in CUT else x
        for name, x in tensors.items()
    }


def shard_of(problem: Problem, edges: Edges, of_teacher: Edges, rank: int) -> Problem:
    """The problem as one rank of a vocabulary group holds it."""
    return replace(
        problem,
        student=sharded(problem.student, edges, rank),
        teacher=sharded(problem.teacher, of_teacher, rank),
    )


def conforms(
    world: World, problem: Problem, loss: Loss, edges: Edges, of_teacher: Edges | None = None,
    dtype: str = "fp32", **run: Any,
) -> Any:  # fmt: skip
    """Compare a rank's loss and gradients with its part of the dense oracle's; return the loss."""
    whole = problem.to(DTYPES[dtype])
    reference = whole.to(torch.float64).dense(loss, 0.5)
    yardstick = whole.dense(loss, 0.5)
    mine = shard_of(whole, edges, of_teacher or edges, world.rank)
    got = mine.ours(loss, 0.5, vocab_group=world.group, **run)
    names = ["loss", *problem.student]
    cut = [
        [*sharded(dict(zip(names, x, strict=True)), edges, world.rank).values()]
        for x in (reference, yardstick)
    ]
    assert_each_close(names, got, *cut, torch.finfo(DTYPES[dtype]).eps, run)
    return got[0].tolist()
