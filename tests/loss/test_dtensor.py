"""DTensor heads: sharded by tensor parallelism, by FSDP2, and by both, on two and four ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import bgkernels as bg
from bgkernels.loss import dtensor
from tests.problems import Problem, labels, make
from tests.ranks import Cell, World, outcomes

ROWS, D, V = (4, 6), 16, 51  # 51 columns: no two shards of equal length
TARGET = labels(ROWS, V)
CELLS: dict[int, dict[str, Cell]] = {2: {}, 4: {}}


def cell(size: int, name: str, *args: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enrol a function of a :class:`World`, which returns what must be equal on all ranks."""

    def enrol(function: Callable[..., Any]) -> Callable[..., Any]:
        CELLS[size][name] = partial(function, *args)
        return function

    return enrol


def problem(kind: str = "linear") -> Problem:
    return make(kind, leading=ROWS, hidden=(D, 24), vocab=(V, V))


def same(ours: Tensor | DTensor | None, reference: Tensor) -> None:
    """Equal to rounding in float64; a DTensor as a whole."""
    assert ours is not None
    whole = ours.full_tensor() if isinstance(ours, DTensor) else ours
    torch.testing.assert_close(whole.detach(), reference.detach(), rtol=1e-9, atol=1e-12)


def single() -> list[Tensor]:
    """Loss and gradients of one process."""
    whole = problem()
    leaves = whole.leaves()
    loss = whole.call(leaves)
    return [loss, *torch.autograd.grad(loss, list(leaves.values()))]


def head() -> nn.Linear:
    """The student's head as a module."""
    made = nn.Linear(D, V, dtype=torch.float64)
    made.load_state_dict({name: problem().student[f"linear_{name}"] for name in ("weight", "bias")})
    return made


def loss_of(x: Tensor, made: nn.Linear, rows: slice = slice(None), **options: Any) -> Tensor:
    """The loss of some sequences, with a head's own parameters."""
    whole = problem()
    teacher = whole.teacher | {"hidden": whole.teacher["hidden"][rows]}
    student = {"input": x, "linear_weight": made.weight, "linear_bias": made.bias}
    return Problem(student, teacher, TARGET[rows]).call(student, **options)


@cell(2, "a head sharded by hand")
def by_hand(w: World) -> float:
    mesh = init_device_mesh("cpu", (2,))
    whole, placed = problem(), {"input": [Replicate()]}
    leaves = {
        name: distribute_tensor(x, mesh, placed.get(name, [Shard(0)])).requires_grad_()
        for name, x in whole.student.items()
    }
    teacher = bg.LinearTeacher(
        *(
            distribute_tensor(x, mesh, placed.get(name, [Shard(0)]))
            for name, x in zip(("input", "weight", "bias"), whole.teacher.values(), strict=True)
        )
    )
    target = distribute_tensor(TARGET, mesh, [Replicate()])
    x, weight, bias = leaves.values()
    pair = bg.MixtureTeacher([teacher, teacher], (0.25, 0.75))
    group, ones = mesh.get_group(), distribute_tensor(torch.ones(ROWS), mesh, [Replicate()])
    for soft, gathered in product((teacher, pair), (False, True)):
        loss = bg.linear_hybrid_distillation(
            x, weight, soft, target, linear_bias=bias, token_weight=ones,
            vocab_group=None if gathered else group,
        )  # fmt: skip
        made = torch.autograd.grad(loss, (x, weight, bias))
        for ours, leaf, ref in zip(made, leaves.values(), single()[1:], strict=True):
            assert ours.placements == leaf.placements
            same(ours, ref)
    return loss.item()


@cell(2, "torch's tensor parallelism")
def colwise(w: World) -> float:
    mesh = init_device_mesh("cpu", (2,))
    made = parallelize_module(head(), mesh, ColwiseParallel())
    x = problem().student["input"].requires_grad_()
    whole = problem()
    teacher = bg.LinearTeacher(
        whole.teacher["hidden"],
        *(distribute_tensor(whole.teacher[n], mesh, [Shard(0)]) for n in ("weight", "bias")),
    )
    loss = bg.linear_hybrid_distillation(
        x, made.weight, teacher, TARGET, linear_bias=made.bias, vocab_group=mesh.get_group()
    )
    loss.backward()
    for ours, ref in zip((loss, x.grad, made.weight.grad, made.bias.grad), single(), strict=True):
        same(ours, ref)
    return loss.item()


class Student(nn.Module):
    """An embedding and a head, tied or not, and a loss of its own."""

    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D, dtype=torch.float64)
        self.head = head()
        self.embed.load_state_dict({"weight": self.head.weight.detach() * 0.5})
        if tie:
            self.embed.weight = self.head.weight

    def forward(self, tokens: Tensor, rows: slice | None = None, **options: Any) -> Tensor:
        x = self.embed(tokens)
        return x if rows is None else loss_of(x, self.head, rows, **options)


@cell(2, "FSDP2, a head that it gathers", False, False, False)
@cell(2, "FSDP2, a head that we gather", False, False, True)
@cell(2, "FSDP2, a tied head", True, False, False)
@cell(2, "FSDP2, a tied head, the loss inside", True, True, False)
def fsdp(tie: bool, inside: bool, apart: bool, w: World) -> None:
    """Each rank has its own sequences; FSDP averages gradients."""
    tokens = labels(ROWS, V, seed=3).clamp_min(0)
    alone = Student(tie)
    loss_of(alone(tokens), alone.head).backward()
    model, mesh = Student(tie), init_device_mesh("cpu", (2,))
    if apart:
        fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mine = slice(0, 2) if w.rank == 0 else slice(2, 4)
    items = bg.distributed.global_num_items(TARGET[mine], w.group, averaged=True)
    if inside:
        loss = model(tokens[mine], mine, num_items=items)
    else:
        x = model(tokens[mine])
        assert isinstance(model.head.weight, DTensor) == apart
        loss = loss_of(x, model.head, mine, num_items=items)
    loss.backward()
    for (name, ours), ref in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert isinstance(ours.grad, DTensor), name
        same(ours.grad, ref.grad)


@cell(4, "FSDP2 over tensor parallelism", dtensor.STRIDED_SINCE)
@cell(4, "FSDP2 over tensor parallelism, refused by an older torch", (99, 0))
def two_dimensions(since: tuple[int, int], w: World) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocabulary"))
    tokens = labels(ROWS, V, seed=3).clamp_min(0)
    alone = Student(False)
    loss_of(alone(tokens), alone.head).backward()
    model = Student(False)
    parallelize_module(model.head, mesh["vocabulary"], ColwiseParallel())
    model.head = fully_shard(model.head, mesh=mesh["data"])
    made = model.head
    mine = slice(0, 2) if mesh["data"].get_local_rank() == 0 else slice(2, 4)
    whole, group = problem(), mesh["vocabulary"].get_group()
    teacher = bg.LinearTeacher(
        whole.teacher["hidden"][mine],
        *(
            distribute_tensor(whole.teacher[n], mesh["vocabulary"], [Shard(0)])
            for n in ("weight", "bias")
        ),
    )
    items = bg.distributed.global_num_items(TARGET[mine], mesh["data"].get_group(), averaged=True)
    step = partial(
        bg.linear_hybrid_distillation, model(tokens[mine]), made.weight, teacher, TARGET[mine],
        linear_bias=made.bias, vocab_group=group, num_items=items,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dtensor, "STRIDED_SINCE", since)
        if since > dtensor.TORCH:
            with pytest.raises(NotImplementedError, match="needs torch"):
                step()
            return
        step().backward()
    for name in ("weight", "bias"):
        same(getattr(made, name).grad, getattr(alone.head, name).grad)


@cell(4, "shards that are replicated")
def replicated_shards(w: World) -> None:
    """Each rank has one sequence; the gradient is the mean over both dimensions of the mesh."""
    mesh, made = init_device_mesh("cpu", (2, 2)), head()
    weight, bias = (
        distribute_tensor(x.detach(), mesh, [Replicate(), Shard(0)]).requires_grad_()
        for x in (made.weight, made.bias)
    )
    mine, whole = slice(w.rank, w.rank + 1), problem()
    teacher = whole.teacher | {"hidden": whole.teacher["hidden"][mine]}
    student = {"input": whole.student["input"][mine], "linear_weight": weight, "linear_bias": bias}
    items = bg.distributed.global_num_items(TARGET[mine], averaged=True)
    Problem(student, teacher, TARGET[mine]).call(student, num_items=items).backward()
    for ours, ref in zip((weight, bias), single()[2:], strict=True):
        assert ours.grad is not None and ours.grad.placements == ours.placements
        same(ours.grad, ref)


@cell(2, "logits sharded over the vocabulary")
def logits(w: World) -> float:
    mesh, whole = init_device_mesh("cpu", (2,)), problem("logits")
    reference = whole.leaves()
    loss = whole.call(reference)
    loss.backward()
    x = distribute_tensor(whole.student["logits"], mesh, [Shard(2)]).requires_grad_()
    teacher = bg.LogitsTeacher(distribute_tensor(whole.teacher["logits"], mesh, [Shard(2)]))
    ours = bg.hybrid_distillation(x, teacher, TARGET, vocab_group=mesh.get_group())
    ours.backward()
    same(ours, loss)
    same(x.grad, reference["logits"].grad)
    return ours.item()


@cell(2, "collectives under way")
def under_way(w: World) -> float:
    """What torch's parallel modules return is a tensor whose values may be still on their way."""
    mesh, whole = init_device_mesh("cpu", (2,)), problem("logits").to(torch.float32)

    def arriving(x: DTensor) -> Tensor:
        return x.redistribute(placements=[Replicate()], async_op=True).to_local()

    reference = whole.leaves()
    loss = whole.call(reference)
    loss.backward()
    leaf, taught = (
        distribute_tensor(side["logits"], mesh, [Shard(0)])
        for side in (whole.student, whole.teacher)
    )
    leaf.requires_grad_()
    teacher = bg.LogitsTeacher(arriving(taught))
    for mode in ("fused", "recompute"):
        ours = bg.hybrid_distillation(arriving(leaf), teacher, TARGET, mode=mode)
        assert ours.item() == loss.item()
        (grad,) = torch.autograd.grad(ours, leaf)
        torch.testing.assert_close(grad.full_tensor(), reference["logits"].grad)
    return ours.item()


@cell(2, "placements that cannot be used")
def refusals(w: World) -> None:
    mesh, whole = init_device_mesh("cpu", (2,)), problem()
    teacher = whole.library_teacher()
    student = {name: distribute_tensor(x, mesh, [Shard(0)]) for name, x in whole.student.items()}
    with pytest.raises(ValueError, match=r"`input` is a DTensor .*Shard\(dim=0\).*expected"):
        whole.call(student)
    replicated = {n: distribute_tensor(x, mesh, [Replicate()]) for n, x in whole.student.items()}
    with pytest.raises(ValueError, match=r"`linear_weight` is a DTensor .*expected"):
        whole.call(replicated, vocab_group=mesh.get_group())
    sharded = distribute_tensor(problem("logits").student["logits"], mesh, [Shard(2)])
    with pytest.raises(ValueError, match=r"`logits` is a DTensor .*need `vocab_group`"):
        bg.hybrid_distillation(sharded, teacher, TARGET)
    alone = [dist.new_group([rank]) for rank in range(2)][w.rank]
    with pytest.raises(ValueError, match="no dimension of it has the ranks"):
        whole.call(whole.student | {"linear_weight": student["linear_weight"]}, vocab_group=alone)


@pytest.mark.parametrize(("size", "name"), [(s, name) for s in CELLS for name in CELLS[s]])
def test_dtensors(size: int, name: str) -> None:
    outcomes(__name__, size)[name].same()
