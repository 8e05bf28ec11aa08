"""A step whose vocabulary is shared out among ranks: ``python -m benchmarks.parallel --ranks 2``.

Each rank holds an equal run of columns. Beside the step, each round times what it cannot do
without: the rank's own matrix products, and the collectives alone (the state of every token
gathered, dX summed). A time is that of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.multiprocessing import start_processes

import bgkernels as bg
from benchmarks import machine
from benchmarks.cases import Case, Problem
from benchmarks.limits import MIB, Products, best_tiling
from benchmarks.measure import PAUSE, spread
from benchmarks.run import RESULTS
from benchmarks.suites import TARGET
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.state import empty


@dataclass(frozen=True)
class Work:
    """What the ranks do.

    Args:
        case: the whole problem.
        ranks: that share it, each with as many ``threads``.
        threads: of each rank.
        rounds: how often each part is timed, in turn.
        budget: bytes of temporaries of each rank.
    """

    case: Case
    ranks: int = 2
    threads: int = 1
    rounds: int = 5
    budget: int = 512 * MIB

    @property
    def shard(self) -> Case:
        """What one rank holds; its rows are the whole problem's."""
        return replace(self.case, vocab=self.case.vocab // self.ranks, vocab_t=0)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    case = replace(TARGET, dtype=options.dtype, rows=options.rows).scaled(options.scale)
    work = Work(case, options.ranks, options.threads, options.rounds, options.budget * MIB)
    results = study(work)
    stamp = results["machine"]
    name = f"{stamp['date'][:10]}-parallel-{stamp['commit'] or 'unknown'}.json"
    path = options.output or RESULTS / machine.slug(stamp) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(f"{results['ratio']:.3f} × products and collectives; {path}")


def study(work: Work) -> dict[str, Any]:
    """Seconds of the step and of its parts, and the ratio of their medians."""
    stamp = machine.stamp(work.threads)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, (work, folder), work.ranks, start_method="forkserver")
        by_rank = [json.loads(Path(folder, f"{i}.json").read_text()) for i in range(work.ranks)]
    slowest = {
        name: spread([max(times) for times in zip(*(r[name] for r in by_rank), strict=True)])
        for name in by_rank[0]
    }
    least = slowest["products"]["median"] + slowest["collectives"]["median"]
    return {
        "machine": stamp,
        "work": asdict(work),
        "seconds": slowest,
        "ratio": slowest["step"]["median"] / least,
    }


def _rank(rank: int, work: Work, folder: str) -> None:
    torch.set_num_threads(work.threads)
    store = dist.FileStore(f"{folder}/store", work.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=work.ranks)
    parts = _parts(work)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for round_ in range(work.rounds + 1):
        for name, part in parts.items():
            taken = _seconds(part)
            if round_:  # the first is to warm up
                seconds[name].append(taken)
    Path(folder, f"{rank}.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def _parts(work: Work) -> dict[str, Callable[[], object]]:
    """What is timed; every rank makes the same."""
    problem = Problem.of(work.shard)
    tiling = [best_tiling(problem)]
    dist.broadcast_object_list(tiling)
    group = dist.group.WORLD
    assert group is not None
    teacher = bg.LinearTeacher(problem.t_input, problem.t_weight)
    loss_fn = bg.LinearHybridDistillationLoss(vocab_group=group, memory_budget=work.budget)
    dx = torch.zeros(work.case.rows, work.case.hidden_s)
    spec = RowSpec(work.case.vocab, work.case.vocab, extras=bg.routing.entropy().extras)
    state = empty(work.case.rows, spec, dtype=dx.dtype, device=dx.device)
    gathered = [([torch.empty_like(x)] * work.ranks, x) for x in (state.floats, state.ints)]

    def step() -> None:
        loss = loss_fn(problem.input, problem.weight, teacher, problem.target)
        torch.autograd.grad(loss, (problem.input, problem.weight))

    def collectives() -> None:
        for parts, own in gathered:
            dist.all_gather(parts, own)
        dist.all_reduce(dx)

    return {"products": Products(problem, tiling[0]).run, "collectives": collectives, "step": step}


def _seconds(part: Callable[[], object]) -> float:
    """Of one run that all ranks begin together."""
    time.sleep(PAUSE)
    dist.barrier()
    begin = time.perf_counter()
    part()
    return time.perf_counter() - begin


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    add = parser.add_argument
    add("--ranks", type=int, default=2)
    add("--threads", type=int, default=1, help="of each rank")
    add("--rows", type=int, default=TARGET.rows, help="tokens")
    add("--dtype", default=TARGET.dtype, choices=("float32", "bfloat16", "float16"))
    add("--scale", type=float, default=1.0, help="factor on the vocabulary, to try things out")
    add("--rounds", type=int, default=5)
    add("--budget", type=int, default=512, help="MiB of temporaries of each rank")
    add("--output", type=Path, help="default: benchmarks/results/<machine>/…")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
