"""Who runs a step: our modes and budgets, dense torch, the peers, and the limits."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import bgkernels as bg
from benchmarks import peers
from benchmarks.cases import FORMS, Case, Problem
from benchmarks.dense import GAMMA, HALF, dense, paper, widened
from benchmarks.limits import (
    MIB,
    Memcpy,
    Products,
    Tiling,
    WideProducts,
    best_tiling,
    expected_step,
)
from bgkernels.backends import BACKENDS
from bgkernels.teachers import Teacher


@dataclass(frozen=True)
class Outcome:
    """What a step leaves: a loss (None for limits), and the gradients that the form asks for.

    Args:
        forward: seconds of the forward pass.
        notes: anything worth a line in the table.
    """

    loss: Tensor | None
    gradients: Sequence[Tensor]
    forward: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


Step = Callable[[], Outcome]
Loss = Callable[[Problem], Tensor]
HEADS, EVERY = ("step",), tuple(FORMS)
MIX = {"hard": "hard", "top-k": "fixed", "matched": "fixed"}
"""What a form mixes, whoever runs it; in other forms it is the entry's choice."""


@dataclass(frozen=True)
class Entry:
    """A contestant.

    Args:
        about: what it computes, in a line.
        start: makes ready for a problem; what it returns runs one step.
        kind: ``"ours"``, ``"peer"``, ``"limit"``, or ``"bare"`` for what stands beside limits.
        mix: of cross-entropy and divergence: ``"entropy"``, routed by the teacher; ``"fixed"``,
            half and half; ``"halves"``, the same without T²; ``"soft"`` or ``"hard"``, one alone.
        forms: of a step that it can run.
        native: it multiplies in the dtype of its inputs, whatever the processor makes of that.
        buffers: fp32 matrices (rows, vocab) that it holds at once, roughly.
        compiles: its first step compiles.
        needs_gpu: its kernels run on GPUs only.
        lacks: features of a case that it cannot serve, by the case's field, with the reason.
    """

    about: str
    start: Callable[[Problem], Step]
    kind: str = "peer"
    mix: str = "entropy"
    forms: tuple[str, ...] = EVERY
    native: bool = True
    buffers: float = 0.0
    compiles: bool = False
    needs_gpu: bool = False
    lacks: dict[str, str] = field(default_factory=dict)

    def refuses(self, case: Case, patience: float, memory: float) -> str | None:
        """None, or why the case is not for this entry on this machine.

        Args:
            case: the work.
            patience: seconds that a step may take.
            memory: free bytes.
        """
        if self.needs_gpu and not torch.cuda.is_available():
            return "its kernels need a GPU"
        if case.form not in self.forms:
            return f"has no such form: {FORMS[case.form].about}"
        plain = Case("plain", 0, 0, 0, 0)
        for name, reason in self.lacks.items():
            if getattr(case, name) != getattr(plain, name):
                return reason
        need = self.buffers * 4 * case.rows * case.vocab
        if need > memory:
            return f"needs about {need / 2**30:.0f} GiB; {memory / 2**30:.0f} GiB are free"
        seconds = expected_step(case) if self.native and case.dtype != "float32" else 0.0
        if seconds > patience:
            return f"its {case.dtype} products alone would take about {seconds:.0f} s here"
        return None

    def oracle_options(self, case: Case) -> dict[str, Any]:
        """The same loss in the words of ``tests.oracle.hybrid_loss``."""
        common = {"divergence": "forward_kl", "temperature": case.temperature}
        mix = MIX.get(case.form, self.mix)
        if mix == "entropy":
            return common | {"routing": "entropy", "routing_params": {"gamma": GAMMA}}
        unscaled = 1 / case.temperature**2  # the peer leaves out T²
        weights = {
            "hard": (1.0, 0.0), "soft": (0.0, unscaled),
            "fixed": (HALF, HALF), "halves": (HALF, HALF * unscaled),
        }  # fmt: skip
        hard, soft = weights[mix]
        return common | {"routing": "additive", "routing_params": {"hard": hard, "soft": soft}}


def training(loss: Loss) -> Callable[[Problem], Step]:
    """Forward and backward; forward alone where no gradient is asked for."""

    def start(problem: Problem) -> Step:
        def step() -> Outcome:
            begin = time.perf_counter()
            with torch.set_grad_enabled(bool(problem.wanted)):
                value = loss(problem)
            forward = time.perf_counter() - begin
            gradients = torch.autograd.grad(value, problem.wanted) if problem.wanted else ()
            return Outcome(value.detach(), gradients, forward)

        return step

    return start


def products(problem: Problem, tiling: Tiling | None = None) -> Step:
    """The bare products in a tiling; None: the fastest."""
    tiling = tiling or best_tiling(problem)
    bare = Products(problem, tiling)
    return lambda: Outcome(None, bare.run(), notes={"tiling": str(tiling)})


def natural(problem: Problem) -> Step:
    """The bare products over the whole vocabulary, in the dtype of the inputs."""
    return products(problem, Tiling(problem.weight.dtype, problem.case.vocab))


def wide_products(problem: Problem) -> Step:
    """The library's own bare products, in tiles as wide as those of its plans."""
    bare = WideProducts(problem, 4096)
    return lambda: Outcome(None, bare.run(), notes={"tiling": "fp32 results, tiles of 4,096"})


def copying(problem: Problem) -> Step:
    """As many bytes as a step from logits has to read and write."""
    copy = Memcpy(problem.case.moved)

    def step() -> Outcome:
        copy.run()
        return Outcome(None, ())

    return step


def ours(problem: Problem, *, mode: str, budget: int, backend: str = "auto") -> Tensor:
    """The library."""
    case = problem.case
    cap = case.softcap or None
    mix = MIX.get(case.form, "entropy")
    routing = {"hard": bg.routing.hard(), "entropy": bg.routing.entropy(gamma=GAMMA)}
    options = {
        "routing": routing.get(mix, bg.routing.additive(HALF, HALF)),
        "temperature": case.temperature, "logit_softcap": cap, "mode": mode,
        "memory_budget": budget, "backend": backend,
    }  # fmt: skip
    if case.form == "logits":
        teacher = bg.LogitsTeacher(problem.t_logits)
        return _tensor(bg.hybrid_distillation(problem.logits, teacher, problem.target, **options))
    made: Teacher | None = None
    if case.form == "top-k":
        made = bg.TopKTeacher(problem.indices, problem.logprobs)
    elif case.form != "hard":
        made = bg.LinearTeacher(problem.t_input, problem.t_weight, logit_softcap=cap)
    if made is not None and case.form == "matched":
        made = bg.MatchedTeacher(made, problem.pairs)
    return _tensor(
        bg.linear_hybrid_distillation(
            problem.input, problem.weight, made, problem.target, **options
        )
    )


def compiled(problem: Problem, loss: Loss = dense) -> Step:
    """A dense loss through ``torch.compile``."""
    return training(torch.compile(loss, dynamic=False))(problem)


def _tensor(x: object) -> Tensor:
    assert isinstance(x, Tensor)
    return x


def _ours() -> dict[str, Entry]:
    """``mode-MiB`` with the backend that the library chooses, ``mode-MiB-backend`` with each."""
    made = {}
    for mode in ("fused", "recompute"):
        for mib in (32, 128, 512, 1024, 1536):
            for backend in ("auto", *BACKENDS):
                name = f"{mode}-{mib}" + (f"-{backend}" if backend != "auto" else "")
                loss = functools.partial(ours, mode=mode, budget=mib * MIB, backend=backend)
                about = f"bgkernels, {mode}, {mib} MiB"
                about += "" if backend == "auto" else f", {backend} backend"
                made[name] = Entry(about, training(loss), "ours", native=False)
    return made


def _peer(about: str, loss: Loss, mix: str, **more: Any) -> Entry:
    """A peer from hidden states, without soft-cap and padding unless said otherwise."""
    lacks = {"softcap": "has no soft-cap", "vocab_t": "wants equal vocabularies"}
    forms = ("hard",) if mix == "hard" else HEADS
    return Entry(about, training(loss), mix=mix, forms=forms, **({"lacks": lacks} | more))


ENTRIES: dict[str, Entry] = {
    "limit": Entry("bare products, best tiling", products, "limit", native=False),
    "natural": Entry("bare products, whole vocabulary", natural, "limit", buffers=2),
    "wide": Entry("bare products of this library, fp32 results", wide_products, "bare"),
    "copy": Entry("copy of memory, the same bytes", copying, "limit", native=False),
    **_ours(),
    "dense": Entry("dense torch, eager", training(dense), buffers=7),
    "compiled": Entry("dense torch, `torch.compile`", compiled, buffers=3, compiles=True),
    "widened": Entry(
        "dense torch on fp32 copies of the heads, `torch.compile`",
        functools.partial(compiled, loss=widened), native=False, buffers=4, compiles=True,
    ),
    "paper": Entry(
        "the paper's formula, eager", training(paper), forms=HEADS, buffers=8,
        lacks={
            "softcap": "has no soft-cap",
            "temperature": "has no temperature in its routed loss",
            "vocab_t": "lets the teacher's padding change the weights",
        },
    ),
    "liger": _peer("Liger chunked JSD: CE and KL, half and half", peers.liger, "halves", buffers=5,
                   compiles=True),
    "liger-jsd": _peer("Liger FusedLinearJSD: KL alone", peers.liger_jsd, "soft", needs_gpu=True),
    "liger-kl": _peer("Liger FusedLinearKLDiv: KL alone, teacher's probabilities whole",
                      peers.liger_kl, "soft", needs_gpu=True),
    "trl": _peer("TRL chunked divergence: KL alone", peers.trl, "soft", buffers=1),
    "orda": _peer("ORDA: CE and KL, half and half", peers.orda, "fixed", buffers=12),
    "torch-lce": _peer("torch `linear_cross_entropy`", peers.torch_lce, "hard", buffers=1),
    "cce": _peer("cut cross-entropy", peers.cce, "hard", buffers=2, compiles=True),
    "quack": _peer("QuACK chunked cross-entropy", peers.quack, "hard", needs_gpu=True),
}  # fmt: skip
