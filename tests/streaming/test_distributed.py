"""Vocabularies shared out among two and four ranks, and tokens spread over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

import bgkernels as bg
from bgkernels.streaming import driver
from bgkernels.streaming.planner import Plan, Workload
from bgkernels.streaming.shard import Shard
from tests.problems import IGNORED, Loss, Problem, labels, make, normal, runs
from tests.ranks import Cell, Edges, World, conforms, outcomes, shard_of

ROWS, V = (2, 12), 150
TARGET = labels(ROWS, V)
EDGES: dict[str, Edges] = {"even": (0, 75, V), "uneven": (0, 11, V), "an empty one": (0, V, V)}
UNEVEN = EDGES["uneven"]
OF_FOUR: Edges = (0, 1, 77, 77, V)
WEIGHTS = normal(*ROWS, seed=50).abs()
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 2.0},
    "smoothing, z-loss": {"label_smoothing": 0.1, "z_loss": 0.02},
    "weights": {"token_weight": WEIGHTS, "num_items": 64},
    "vocab_size": {"vocab_size": 140, "label_smoothing": 0.1},
    "vocab_size before the last rank": {"vocab_size": 10, "label_smoothing": 0.1},
    "sum": {"reduction": "sum", "temperature": 2.0},
    "none": {"reduction": "none", "token_weight": WEIGHTS},
}
CELLS: dict[int, dict[str, Cell]] = {2: {}, 4: {}}


def cell(size: int, name: str, *args: Any, **options: Any) -> Callable[[Cell], Cell]:
    """Enrol a function of a :class:`World`, which returns what must be equal on all ranks."""

    def enrol(function: Callable[..., Any]) -> Cell:
        CELLS[size][name] = partial(function, *args, **options)
        return function

    return enrol


def problem(kind: str = "linear", **more: Any) -> Problem:
    return make(kind, **{"leading": ROWS, "vocab": (V, V), **more})


def agrees(loss: Loss, edges: Edges, of_teacher: Edges | None, made: Any, w: World) -> list[float]:
    """Loss and gradients in every mode are the dense oracle's."""
    dtype, more = made.get("dtype", "fp32"), made.get("more", {})
    posed = problem(**made.get("problem", {}))
    return [
        conforms(w, posed, loss, edges, of_teacher, dtype, **run, **more)
        for run in runs("auto", loss)
    ]


def compare(size: int, name: str, loss: Loss, edges: Edges, other: Edges | None = None,
            **made: Any) -> None:  # fmt: skip
    CELLS[size][name] = partial(agrees, loss, edges, other, made)


for divergence in bg.divergences.registry:
    for way, edges in EDGES.items():
        compare(2, f"{divergence}, {way}", Loss(divergence), edges)
    compare(4, divergence, Loss(divergence), OF_FOUR)
for policy in bg.routing.registry:
    compare(2, f"jsd by {policy}", Loss("generalized_jsd", policy), UNEVEN)
for name, options in OPTIONS.items():
    target = labels(ROWS, min(V, options.get("vocab_size", V)))
    for kind in ("linear", "logits", "mixed"):
        loss = Loss("total_variation", "confidence", options=options)
        compare(2, f"{name}, {kind}", loss, UNEVEN, problem={"kind": kind, "target": target})
compare(4, "argmax", Loss(), OF_FOUR, problem={"target": "teacher_argmax"})
compare(2, "a padded teacher", Loss("jeffreys"), UNEVEN, (0, 11, 160),
        problem={"vocab": (V, 160), "target": TARGET})  # fmt: skip
compare(2, "a padded student", Loss("jeffreys"), (0, 11, 160), UNEVEN,
        problem={"vocab": (160, V), "target": labels(ROWS, 160)})  # fmt: skip
compare(2, "padding of a whole rank", Loss("jeffreys"), (0, V, 160), (0, V, V),
        problem={"vocab": (160, V), "target": labels(ROWS, 160)})  # fmt: skip
compare(2, "a cap", Loss("jeffreys"), UNEVEN, problem={"student_cap": {"logit_softcap": 4.0}})
compare(2, "bf16", Loss("generalized_jsd"), UNEVEN, dtype="bf16")
compare(2, "fp64", Loss("generalized_jsd"), UNEVEN, dtype="fp64")
compare(2, "many chunks", Loss("jeffreys"), UNEVEN, more={"memory_budget": 16_000})
compare(2, "no label", Loss(), UNEVEN, problem={"target": torch.full(ROWS, IGNORED)})
compare(2, "no token", Loss(), UNEVEN,
        problem={"leading": (0,), "target": torch.zeros(0, dtype=torch.int64)})  # fmt: skip


@cell(2, "statistics, sampled", UNEVEN)
@cell(4, "statistics, sampled", OF_FOUR)
def statistics(edges: Edges, w: World) -> list[int]:
    """Every statistic and drawn label is that of one process."""
    whole = problem(target="teacher_sample").to(torch.float32)
    extras = (bg.Tilt(0.4, 0.6), bg.Mixture(0.3), bg.Tempered(1.0), bg.TotalVariation())

    def stats(p: Problem, **options: Any) -> bg.RowStats:
        student, weight, bias = p.student.values()
        return bg.linear_row_stats(
            student, weight, p.library_teacher(), p.target, linear_bias=bias, extras=extras,
            seed=5, **options,
        )  # fmt: skip

    ours, ref = stats(shard_of(whole, edges, edges, w.rank), vocab_group=w.group), stats(whole)
    for a, b in zip(ours.tensors(), ref.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    return ours.label.flatten().tolist()


@cell(4, "random shards")
def random_shards(w: World) -> list[Any]:
    """Any edges, divergence, policy and budget."""
    random, losses = Random(7), []
    for seed in range(12):
        edges = (0, *sorted(random.randint(0, V) for _ in range(w.size - 1)), V)
        names = (sorted(registry) for registry in (bg.divergences.registry, bg.routing.registry))
        loss = Loss(*map(random.choice, names), options={"temperature": random.choice((1.0, 2.0))})
        more = {"memory_budget": random.choice((16_000, 40_000, 1 << 30))}
        made = {"problem": {"seed": seed, "target": TARGET}, "more": more, "dtype": "fp64"}
        losses.append(agrees(loss, edges, None, made, w))
    return losses


@cell(2, "groups of columns", "bf16", 3)
@cell(2, "many tiles", "fp32", 1)
def tiled(dtype: str, groups: int, w: World) -> list[float]:
    """Ranks that have fewer tiles than others, or none, still meet in every collective."""

    def few(work: Workload, budget: int | None) -> Plan:
        return Plan(work.rows, work.columns, 7, 16, 2, 0, groups=1 if work.statistics else groups)

    with patch.object(driver, "plan", few), patch.dict(driver.PLANS, clear=True):
        loss, posed = Loss("generalized_jsd"), problem()
        return [
            conforms(w, posed, loss, edges, None, dtype, mode="recompute")
            for edges in EDGES.values()
        ]


@cell(2, "a gradient of the input alone", "input")
@cell(2, "a gradient of the head alone", "linear_weight")
def only(name: str, w: World) -> None:
    whole = problem()
    for mode in ("fused", "recompute"):
        alone = whole.student[name].detach().requires_grad_()
        (reference,) = torch.autograd.grad(whole.call(whole.student | {name: alone}), alone)
        cut = shard_of(whole, UNEVEN, UNEVEN, w.rank)
        leaf = cut.student[name].detach().requires_grad_()
        loss = cut.call(cut.student | {name: leaf}, vocab_group=w.group, mode=mode)
        start, stop = UNEVEN[w.rank : w.rank + 2]
        expected = reference if name == "input" else reference[start:stop]
        (ours,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-13)


def surer(stats: list[bg.RowStats]) -> Tensor:
    """The teacher that is surer counts more."""
    return torch.softmax(-torch.stack([s.entropy_t for s in stats], -1), -1)


def kept(tail: str) -> bg.TopKTeacher:
    """Columns are named by their place in the whole vocabulary, on every rank."""
    best = normal(*ROWS, V, seed=60, std=2.0).log_softmax(-1).topk(7)
    return bg.TopKTeacher(best.indices, best.values, tail)


def pair(p: Problem, kind: str, *more: bg.TopKTeacher) -> bg.MixtureTeacher:
    logits = p.teacher["hidden"] @ p.teacher["weight"].mT * 0.5
    teachers = [p.library_teacher(), bg.LogitsTeacher(logits), *more]
    return bg.MixtureTeacher(teachers, surer, kind)


TEACHERS: dict[str, Callable[[Problem], Any]] = {
    "a bucket": lambda p: kept("bucket"),
    "renormalised": lambda p: kept("renormalize"),
    "dropped": lambda p: kept("drop"),
    "a sum": lambda p: pair(p, "sum", kept("bucket")),
    "a distribution": lambda p: pair(p, "distribution"),
}


@cell(2, "other teachers", UNEVEN)
@cell(4, "other teachers", OF_FOUR)
def other_teachers(edges: Edges, w: World) -> list[float]:
    """Loss and gradients are those of one process."""
    whole, losses = problem(), []
    cut = shard_of(whole, edges, edges, w.rank)
    start, stop = edges[w.rank : w.rank + 2]
    loss = Loss("generalized_jsd", options={"label_smoothing": 0.1})
    for teacher, mode in product(TEACHERS.values(), ("fused", "recompute")):
        made = []
        for p, group in ((cut, w.group), (whole, None)):
            x, weight, bias = leaves = [*p.leaves().values()]
            value = bg.linear_hybrid_distillation(
                x, weight, teacher(p), p.target, linear_bias=bias, mode=mode, vocab_group=group,
                **loss.library(),
            )  # fmt: skip
            made.append([value, *torch.autograd.grad(value, leaves)])
        ours, ref = made
        for a, b in zip(ours, [*ref[:2], *(g[start:stop] for g in ref[2:])], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
        losses.append(ours[0].item())
    return losses


@cell(2, "a seed of the first rank")
def seed(w: World) -> list[int]:
    torch.manual_seed(w.rank)
    posed = shard_of(problem(target="teacher_sample"), UNEVEN, UNEVEN, w.rank)
    _, stats = posed.call(posed.student, vocab_group=w.group, return_stats=True)
    return stats.label.flatten().tolist()


@contextmanager
def refused(kind: type[Exception], text: str) -> Iterator[None]:
    with pytest.raises(kind, match=text):
        yield


@cell(2, "a lost sum of dX", "sum_", "input, .*: largest error")
@cell(2, "a lost merge", "merged", "loss, .*: ")
def mutation(method: str, message: str, w: World) -> None:
    """What the comparison must catch."""
    alone = {"sum_": lambda self, x: x, "merged": lambda self, state: state}[method]
    with patch.object(Shard, method, alone), refused(AssertionError, message):
        agrees(Loss(), EDGES["even"], None, {}, w)


@cell(2, "tokens that differ")
def tokens_differ(w: World) -> None:
    posed = shard_of(problem(leading=(3 + w.rank,)), UNEVEN, UNEVEN, w.rank)
    with refused(ValueError, r"every rank must hold the same tokens .*got \[3, 4\]"):
        posed.call(posed.student, vocab_group=w.group)


@cell(2, "gradients that differ")
def gradients_differ(w: World) -> None:
    posed = shard_of(problem(), UNEVEN, UNEVEN, w.rank)
    posed.student["input"].requires_grad_(w.rank == 0)
    with refused(ValueError, "same tensors must require grad on every rank"):
        posed.call(posed.student, vocab_group=w.group)


@cell(2, "shards that differ")
def shards_differ(w: World) -> None:
    posed = shard_of(problem(), UNEVEN, (0, 12, V), w.rank)
    with refused(ValueError, r"student and teacher .* got \[11, 139\] and \[12, 138\] columns"):
        posed.call(posed.student, vocab_group=w.group)


@cell(2, "a label beyond all shards")
def label_beyond(w: World) -> None:
    posed = shard_of(problem(target=torch.full(ROWS, V)), UNEVEN, UNEVEN, w.rank)
    with refused(ValueError, r"`target` labels must lie in \[0, 150\)"):
        posed.call(posed.student, vocab_group=w.group)


@cell(2, "compiled")
def compiled(w: World) -> None:
    posed = shard_of(problem(), UNEVEN, UNEVEN, w.rank)
    with (
        patch("torch.compiler.is_compiling", lambda: True),
        refused(NotImplementedError, "`vocab_group` cannot be compiled"),
    ):
        posed.call(posed.student, vocab_group=w.group)


def test_anything_but_a_group_is_refused() -> None:
    with pytest.raises(TypeError, match="`vocab_group` must be a torch"):
        bg.LinearHybridDistillationLoss(vocab_group="tp")


@cell(4, "two by two")
def two_by_two(w: World) -> float:
    """Tokens over one dimension of the ranks, the vocabulary over the other."""
    column, part = divmod(w.rank, 2)
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    tokens, vocabulary = groups[column], groups[2 + part]
    whole = problem()
    reference = whole.dense(Loss())
    rows = slice(0, 5) if part == 0 else slice(5, 24)
    cut = shard_of(whole, UNEVEN, UNEVEN, column)
    x, weight, bias = (x.detach().clone().requires_grad_() for x in cut.student.values())
    hidden = cut.teacher["hidden"].flatten(0, 1)[rows]
    teacher = bg.LinearTeacher(hidden, cut.teacher["weight"], cut.teacher["bias"])
    target = TARGET.flatten()[rows]
    loss = bg.linear_hybrid_distillation(
        x.flatten(0, 1)[rows], weight, teacher, target, linear_bias=bias, vocab_group=vocabulary,
        num_items=bg.distributed.global_num_items(target, tokens),
    )  # fmt: skip
    loss.backward()
    for made in (total := loss.detach().clone(), x.grad, weight.grad, bias.grad):
        dist.all_reduce(made, group=tokens)
    start, stop = UNEVEN[column : column + 2]
    expected = [*reference[:2], *(g[start:stop] for g in reference[2:])]
    for ours, ref in zip((total, x.grad, weight.grad, bias.grad), expected, strict=True):
        torch.testing.assert_close(ours, ref, rtol=1e-10, atol=1e-12)
    return round(total.item(), 9)


class Lookup(torch.autograd.Function):
    """Rows of a table that is cut like the head: its ranks' rows summed, each its own gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        rows = rows.clone()
        dist.all_reduce(rows, group=group)
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@cell(2, "a tied embedding")
def tied(w: World) -> None:
    whole = problem()
    table, tokens = whole.student["linear_weight"], labels(ROWS, V, seed=3).clamp_min(0)
    leaf = table.detach().clone().requires_grad_()
    loss = whole.call({"input": leaf[tokens], "linear_weight": leaf})
    (reference,) = torch.autograd.grad(loss, leaf)
    start, stop = UNEVEN[w.rank : w.rank + 2]
    shard = table[start:stop].detach().clone().requires_grad_()
    here = (tokens >= start) & (tokens < stop)
    rows = shard[torch.where(here, tokens - start, 0)] * here[..., None]
    cut = shard_of(whole, UNEVEN, UNEVEN, w.rank)
    student = {"input": Lookup.apply(rows, w.group), "linear_weight": shard}
    (ours,) = torch.autograd.grad(cut.call(student, vocab_group=w.group), shard)
    torch.testing.assert_close(ours, reference[start:stop], rtol=1e-10, atol=1e-12)


@cell(2, "data parallel")
def data_parallel(w: World) -> None:
    """DDP averages gradients; the head is used beside its module, and is tied to the embedding."""
    whole, tokens = problem(), labels(ROWS, V, seed=3).clamp_min(0)

    def model() -> nn.Embedding:
        return nn.Embedding.from_pretrained(whole.student["linear_weight"].clone(), freeze=False)

    def loss(embed: nn.Module, weight: Tensor, rows: slice, **options: Any) -> Tensor:
        teacher = whole.teacher | {"hidden": whole.teacher["hidden"][rows]}
        student = {"input": embed(tokens[rows]), "linear_weight": weight}
        part = Problem(student, teacher, TARGET[rows])
        return part.call(student, **options)

    single = model()
    loss(single, single.weight, slice(0, 2)).backward()
    mine = slice(w.rank, w.rank + 1)
    ddp = nn.parallel.DistributedDataParallel(model(), process_group=w.group)
    count = bg.distributed.global_num_items(TARGET[mine], w.group, averaged=True)
    loss(ddp, ddp.module.weight, mine, num_items=count).backward()
    torch.testing.assert_close(ddp.module.weight.grad, single.weight.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("size", "name"), [(s, name) for s in CELLS for name in CELLS[s]])
def test_ranks_agree_with_one_process(size: int, name: str) -> None:
    outcomes(__name__, size)[name].same()
