"""Small problems: the same tensors for the library, the float64 reference and the yardstick.

Entries of the registries are described by name and parameters, in the oracle's words, so that one
description serves both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.backends import BACKENDS
from bgkernels.backends.native import products
from tests import oracle
from tests.yardstick import assert_each_close

CPU = torch.device("cpu")
IGNORED = -100
Params = Mapping[str, Any]

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def cells(*names: str) -> list[tuple[str, str]]:
    """The (backend, dtype) pairs that can be computed on this CPU."""
    return [
        (backend, name)
        for backend, made in BACKENDS.items()
        for name in names
        if made.supports(CPU, (DTYPES[name],)) is None
    ]


WIDEN = "widen"
"""The way of a CPU to multiply 16-bit tensors that every CPU has."""


def ways(dtype: str) -> list[str]:
    """The ways of this CPU to multiply them, :data:`WIDEN` first."""
    usable = [n for n in products.WAYS if products.way(n, DTYPES[dtype]).unusable() is None]
    return sorted(usable, key=lambda name: name != WIDEN)


def widest() -> list[tuple[str, str]]:
    """Each backend on this CPU with the widest dtype that it serves."""
    served = cells("fp32", "fp64")
    return list({backend: (backend, dtype) for backend, dtype in served}.values())


DIVERGENCES, POLICIES = list(bg.divergences.registry), list(bg.routing.registry)
PAIRS = [(d, "static") for d in DIVERGENCES] + [("forward_kl", r) for r in POLICIES]
"""Each divergence with a policy, and each policy with a divergence."""


def normal(*shape: int, seed: int, std: float = 1.0) -> Tensor:
    """Normal numbers in float64 that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return (std * torch.randn(*shape, generator=generator)).bfloat16().double()


def curriculum(c: float = 1.0, **params: Any) -> bg.routing.Policy:
    """The oracle's curriculum is told where its schedule stands."""
    return bg.routing.registry.get("curriculum", schedule=lambda step: c, **params)


LIBRARY_POLICIES: dict[str, Callable[..., bg.routing.Policy]] = {"curriculum": curriculum}
"""Policies whose parameters have other names in the oracle."""

ORACLE_DEFAULTS: dict[str, Params] = {"curriculum": {"c": 1.0}}
"""What the oracle must be told where the library has a default."""


OF_DIVERGENCE: dict[str, list[Params]] = {
    "generalized_jsd": [{"beta": x} for x in (0.1, 0.9, 0, 1)],
    "skew_forward_kl": [{"lam": x} for x in (0.0, 0.6)],
    "skew_reverse_kl": [{"lam": x} for x in (0.0, 0.6)],
    "renyi": [{"alpha": x} for x in (0.3, 1, 2.0)],
    "adaptive_kl": [{"mu": 2.0}, {"mu": 0.5, "detach": True}],
    "alpha_beta": [
        {"alpha": a, "beta": b}
        for a, b in [(1, 0), (0, 1), (0.5, 0), (0, 0.5), (0.5, -0.5), (0, 0), (0.4, -0.2), (2, 1)]
    ],
}
"""Parameters beside the defaults, by name: each branch of a formula, each limit."""

OF_ROUTING: dict[str, list[Params]] = {
    "static": [{"w": x} for x in (0, 0.3, 1)],
    "additive": [{"hard": 0.3, "soft": 2.0}, {"hard": 0.0}, {"soft": 0}],
    "confidence": [{"kind": "max"}],
    "entropy": [{"kind": "shannon"}, {"gamma": 0.5}],
    "threshold": [{"tau": 0.8, "sharpness": 5.0}],
    "top_entropy": [{"fraction": x} for x in (0, 0.07, 0.5, 1)],
    "weighted_soft": [{"w": 0.2}, {"inverted": True}],
    "reverse": [{"policy": name} for name in ("confidence", "top_entropy", "risk_guided")],
    "curriculum": [{"c": c} for c in (0, 0.3)]
    + [{"c": 0.3, "policy": name} for name in ("entropy", "top_entropy", "risk_guided")],
    "risk_guided": [{"w": w} for w in (0, 1)] + [{"alpha": 0.5, "gamma": x} for x in (0.9, 1)],
}


@dataclass(frozen=True)
class Loss:
    """A loss by names and parameters; ``options`` go to both sides as they are."""

    divergence: str = "forward_kl"
    routing: str = "entropy"
    of_divergence: Params = field(default_factory=dict)
    of_routing: Params = field(default_factory=dict)
    options: Params = field(default_factory=dict)

    def library(self) -> dict[str, Any]:
        """Keyword arguments of the library."""
        policy = LIBRARY_POLICIES.get(self.routing)
        made = policy or (lambda **params: bg.routing.registry.get(self.routing, **params))
        divergence = bg.divergences.get(self.divergence, **self.of_divergence)
        return {"divergence": divergence, "routing": made(**self.of_routing), **self.options}

    def oracle(self) -> dict[str, Any]:
        """Keyword arguments of the oracle."""
        of_routing = {**ORACLE_DEFAULTS.get(self.routing, {}), **self.of_routing}
        return {
            "divergence": self.divergence, "divergence_params": self.of_divergence,
            "routing": self.routing, "routing_params": of_routing, **self.options,
        }  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Tensors of one problem, all in one dtype.

    Args:
        student: ``{input, linear_weight, linear_bias}`` or ``{logits}``, in the library's order.
        teacher: ``{hidden, weight, bias}`` or ``{logits}``.
        target: labels or a word.
        student_cap, teacher_cap: ``{logit_scale, logit_softcap}``.
    """

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    target: Tensor | str
    student_cap: Params = field(default_factory=dict)
    teacher_cap: Params = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem in another dtype."""
        student, teacher = (
            {name: x.to(dtype) for name, x in side.items()} for side in (self.student, self.teacher)
        )
        return replace(self, student=student, teacher=teacher)

    def leaves(self) -> dict[str, Tensor]:
        """The student's tensors, each wanting a gradient."""
        return {name: x.detach().clone().requires_grad_() for name, x in self.student.items()}

    def library_teacher(self) -> bg.LinearTeacher | bg.LogitsTeacher:
        """The teacher as the library takes it."""
        if "logits" in self.teacher:
            return bg.LogitsTeacher(**self.teacher)
        return bg.LinearTeacher(**self.teacher, **self.teacher_cap)

    def call(self, student: Mapping[str, Tensor], **options: Any) -> Any:
        """The library's loss of these student tensors."""
        options = {**self.student_cap, **options}
        return called(student, self.library_teacher(), self.target, **options)

    def logits(self, student: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Dense real logits of student and teacher, of low-precision ones kept in fp32."""
        s = _dense(student, ("input", "linear_weight", "linear_bias"), self.student_cap)
        t = _dense(self.teacher, ("hidden", "weight", "bias"), self.teacher_cap)
        return _at_least_fp32(s), _at_least_fp32(t)

    def ours(self, loss: Loss, upstream: Tensor | float = 1.0, **more: Any) -> list[Tensor]:
        """The library's loss, then the gradient of each student tensor."""
        leaves = self.leaves()
        value = self.call(leaves, **loss.library(), **more)
        return with_gradients(value, leaves, upstream)

    def dense(self, loss: Loss, upstream: Tensor | float = 1.0) -> list[Tensor]:
        """The same of the oracle, in the problem's dtype."""
        leaves = self.leaves()
        s, t = self.logits(leaves)
        return with_gradients(
            oracle.hybrid_loss(s, t, self.target, **loss.oracle()), leaves, upstream
        )


def _dense(tensors: Mapping[str, Tensor], names: tuple[str, ...], cap: Params) -> Tensor:
    if "logits" not in tensors:
        return oracle.real_logits(*(tensors.get(name) for name in names), **cap)  # type: ignore[arg-type]
    y = tensors["logits"] * cap.get("logit_scale", 1.0)
    bound = cap.get("logit_softcap")
    return y if bound is None else bound * torch.tanh(y / bound)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def called(
    student: Mapping[str, Tensor], teacher: Any, target: Tensor | str, **options: Any
) -> Any:
    """The library's loss of a student's logits, or of its hidden states and head."""
    rest = dict(student)
    if "logits" in rest:
        return bg.hybrid_distillation(rest["logits"], teacher, target, **options)
    x, w = rest.pop("input"), rest.pop("linear_weight")
    return bg.linear_hybrid_distillation(x, w, teacher, target, **rest, **options)


def with_gradients(
    loss: Tensor, leaves: Mapping[str, Tensor], upstream: Tensor | float = 1.0
) -> list[Tensor]:
    """The loss, then the gradient of each leaf."""
    factor = torch.as_tensor(upstream, dtype=loss.dtype).expand(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), factor)]


def make(
    kind: str = "linear",
    *,
    leading: tuple[int, ...] = (3, 16),
    hidden: tuple[int, int] = (16, 24),
    vocab: tuple[int, int] = (300, 300),
    seed: int = 0,
    target: Tensor | str | None = None,
    **caps: Params,
) -> Problem:
    """A problem in float64, exact in bf16.

    Args:
        kind: ``"linear"``: both models by hidden states and head; ``"logits"``: both by logits;
            ``"mixed"``: the student by its head, the teacher by logits.
        target: labels; None draws some, of which every fifth is ignored.
        caps: ``student_cap`` and ``teacher_cap``.
    """
    (d_s, d_t), (v_s, v_t), at = hidden, vocab, 10 * seed
    student = {
        "input": normal(*leading, d_s, seed=at + 1),
        "linear_weight": normal(v_s, d_s, seed=at + 2, std=0.5),
        "linear_bias": normal(v_s, seed=at + 3),
    }
    teacher = {
        "hidden": normal(*leading, d_t, seed=at + 4),
        "weight": normal(v_t, d_t, seed=at + 5, std=0.4),
        "bias": normal(v_t, seed=at + 6),
    }
    if kind == "logits":
        student = {"logits": normal(*leading, v_s, seed=at + 7, std=2.0)}
    if kind in ("logits", "mixed"):
        teacher = {"logits": normal(*leading, v_t, seed=at + 8, std=2.0)}
    if target is None:
        target = labels(leading, min(vocab), seed=at + 9)
    return Problem(student, teacher, target, **caps)


def labels(leading: tuple[int, ...], vocab: int, seed: int = 9) -> Tensor:
    """Random labels, every fifth ignored."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(vocab, leading, generator=generator).reshape(-1)
    drawn[3::5] = IGNORED
    return drawn.reshape(leading)


def runs(backend: str, loss: Loss) -> list[dict[str, Any]]:
    """The modes that can serve this loss."""
    batchwide = loss.library()["routing"].batchwide
    fused = not batchwide and loss.options.get("reduction") != "none"
    return [{"backend": backend, "mode": m} for m in ("recompute", "fused")[: 1 + fused]]


def conform(
    problem: Problem,
    loss: Loss,
    dtype: torch.dtype,
    runs: list[dict[str, Any]],
    upstream: Tensor | float = 0.5,
) -> None:
    """Compare loss and every gradient with the oracle, for each run's backend, mode and so on.

    The default upstream gradient is a power of two: any other rounds a 16-bit gradient twice in
    fused mode, which holds it in its own dtype.
    """
    agree(
        problem,
        lambda made, **run: made.ours(loss, upstream, **run),
        lambda made: made.dense(loss, upstream),
        dtype,
        runs,
    )


def agree(
    problem: Any,
    ours: Callable[..., list[Tensor]],
    dense: Callable[[Any], list[Tensor]],
    dtype: torch.dtype,
    runs: list[dict[str, Any]],
) -> None:
    """Compare what the library makes of a problem with what is dense, in each run.

    Args:
        problem: with ``student`` tensors, and ``to`` another dtype.
        ours: ``(problem, **run)`` -> loss and gradients of the student.
        dense: ``(problem)`` -> the same.
        dtype: of the problem.
        runs: backend, mode and so on of each.
    """
    mine = problem.to(dtype)
    reference = dense(mine.to(torch.float64))
    yardstick = reference if dtype == torch.float64 else dense(mine)
    for run in runs:
        got, eps = ours(mine, **run), torch.finfo(dtype).eps
        assert_each_close(["loss", *mine.student], got, reference, yardstick, eps, run)


class Failures:
    """Runs many cells in one test, and names all that failed."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    @contextmanager
    def cell(self, *name: object) -> Iterator[None]:
        """One cell; its failure does not stop the next."""
        try:
            yield
        except (AssertionError, RuntimeError, ValueError) as error:
            text = f"{type(error).__name__}: {error}" if str(error) else repr(error)
            self.messages.append(f"{' '.join(map(str, name))}: {text}")

    def __enter__(self) -> Failures:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self.messages:
            head = "\n".join(self.messages[:12])
            raise AssertionError(f"{len(self.messages)} cells failed\n{head}")
