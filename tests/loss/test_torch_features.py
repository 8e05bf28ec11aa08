"""What torch offers around a loss. Checkpointing, offloading and autocast: ``test_driver.py``;
``torch.compile``: ``test_compile.py``; CUDA graphs of the passes: ``test_triton_gpu.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import bgkernels as bg

V = 50


def tensors(rows: int = 6) -> list[Tensor]:
    """Input, weight, teacher's hidden states and weight, labels (one ignored)."""
    labels = torch.randint(V, (rows,))
    labels[2] = -100
    return [
        torch.randn(rows, 8),
        torch.randn(V, 8),
        torch.randn(rows, 4),
        torch.randn(V, 4),
        labels,
    ]


def loss(x: Tensor, w: Tensor, h: Tensor, v: Tensor, y: Tensor, **options: object) -> Tensor:
    return bg.linear_hybrid_distillation(x, w, bg.LinearTeacher(h, v), y, **options)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.vmap(f)(x.expand(2, *x.shape)),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.jacrev(f)(x),
    ],
    ids=["grad", "vmap", "jvp", "jacrev"],
)
def test_func_transforms_are_refused(transform: Callable[..., object]) -> None:
    x, *rest = tensors()
    with pytest.raises(NotImplementedError, match=r"torch\.func.*autograd\.grad"):
        transform(lambda x: loss(x, *rest), x)
    stats = bg.linear_row_stats(x, rest[0], bg.LinearTeacher(*rest[1:3]), rest[3])
    assert stats.valid.sum() == 5


def test_double_backward_is_refused() -> None:
    x, *rest = tensors()
    x.requires_grad_()
    for mode in ("fused", "recompute"):
        (first,) = torch.autograd.grad(loss(x, *rest, mode=mode), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
            first.sum().backward()


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_deterministic_algorithms(deterministic: None, mode: str) -> None:
    """Nothing of ours is refused, and a repetition gives the same bits."""
    args = tensors()
    for x in args[:2]:
        x.requires_grad_()
    runs = []
    for _ in range(2):
        value = loss(*args, mode=mode, divergence="generalized_jsd", memory_budget=1 << 14)
        runs.append([value.detach(), *torch.autograd.grad(value, args[:2])])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_a_scaled_loss_gives_scaled_gradients(mode: str) -> None:
    """What ``torch.amp.GradScaler`` does around backward."""
    args = tensors()
    leaves = [x.requires_grad_() for x in args[:2]]
    plain = torch.autograd.grad(loss(*args, mode=mode), leaves)
    optimizer = torch.optim.SGD(leaves, lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss(*args, mode=mode)).backward()
    for x, g in zip(leaves, plain, strict=True):
        torch.testing.assert_close(x.grad, 1024 * g)
    scaler.unscale_(optimizer)
    for x, g in zip(leaves, plain, strict=True):
        torch.testing.assert_close(x.grad, g)


TEACHERS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "linear": lambda h, v: bg.LinearTeacher(h, v),
    "logits": lambda h, v: bg.LogitsTeacher(h @ v.t()),
    "kept": lambda h, v: bg.TopKTeacher(*reversed((h @ v.t()).log_softmax(1).topk(7))),
    "sum": lambda h, v: bg.MixtureTeacher(
        [bg.LogitsTeacher(h @ v.t()), bg.LinearTeacher(-h, v)], torch.rand(len(h), 2)
    ),
    "distribution": lambda h, v: bg.MixtureTeacher(
        [bg.LogitsTeacher(h @ v.t()), bg.LinearTeacher(-h, v)], (0.3, 0.7), kind="distribution"
    ),
}
FORMS: dict[str, Callable[..., Tensor]] = {
    "fused": lambda *args: bg.linear_hybrid_distillation(*args, mode="fused"),
    "recompute": lambda *args: bg.linear_hybrid_distillation(*args, mode="recompute"),
    "none": lambda *args: bg.linear_hybrid_distillation(*args, reduction="none").sum(),
    "statistics": lambda *args: bg.linear_row_stats(*args).kl_st.sum(),
}


@pytest.mark.parametrize("factor", [1.0, 1 / 3])
def test_a_kept_graph_gives_the_same_gradient_again(factor: float) -> None:
    """A scaled gradient lies in the memory of the saved one only where nobody comes back for it."""
    x, w, *rest = tensors()
    leaves = [t.bfloat16().requires_grad_() for t in (x, w)]
    value = loss(*leaves, *(t.bfloat16() for t in rest[:2]), rest[2], mode="fused") * factor
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    for g, again in zip(kept, torch.autograd.grad(value, leaves), strict=True):
        assert torch.equal(g, again) and g.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", TEACHERS)
def test_teachers_and_labels_of_inference_mode(kind: str, form: str) -> None:
    """They are read in backward too, where autograd would refuse them."""
    x, w, h, v, y = tensors()
    leaves = [x.requires_grad_(), w.requires_grad_()]
    results = []
    for mode in (torch.no_grad(), torch.inference_mode()):
        torch.manual_seed(5)
        with mode:
            teacher, labels = TEACHERS[kind](h.clone(), v.clone()), y.clone()
        value = FORMS[form](x, w, teacher, labels)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert labels.is_inference() and all(g.any() for g in results[0])
    for usual, inferred in zip(*results, strict=True):
        assert torch.equal(usual, inferred)


class Evaluation(nn.Module):
    """Loss and statistics of held-out rows."""

    def __init__(self, weight: Tensor, teacher_weight: Tensor) -> None:
        super().__init__()
        self.head, self.teacher_head = nn.Buffer(weight), nn.Buffer(teacher_weight)

    def forward(self, x: Tensor, h: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        teacher = bg.LinearTeacher(h, self.teacher_head)
        value, stats = bg.linear_hybrid_distillation(
            x, self.head, teacher, labels, temperature=2.0, return_stats=True
        )
        return value, stats.kl_ts, stats.argmax_s


def test_export_of_an_evaluation() -> None:
    """For any number of rows, also from a file."""
    x, w, h, v, y = tensors()
    module = Evaluation(w, v)
    rows = torch.export.Dim("rows", min=2, max=1000)
    shapes = {"x": {0: rows}, "h": {0: rows}, "labels": {0: rows}}
    with torch.no_grad():
        program = torch.export.export(module, (x, h, y), dynamic_shapes=shapes)
    other = tensors(rows=11)
    args = (other[0], other[2], other[4])
    for got, ref in zip(program.module()(*args), module(*args), strict=True):
        torch.testing.assert_close(got, ref)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_a_step_in_a_cuda_graph(mode: str) -> None:
    """Captured once, and replayed on other tokens."""
    args, other = ([x.cuda() for x in tensors(64)] for _ in range(2))
    leaves = [x.requires_grad_() for x in args[:2]]

    def step() -> list[Tensor]:
        value = loss(*args, mode=mode)
        return [value, *torch.autograd.grad(value, leaves)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x, new in zip(args, other, strict=True):
            x.copy_(new)
    graph.replay()
    for got, ref in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, ref)
