"""Who runs a step: our modes and budgets, the peers, and the bare products."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bgkernels as bg
from benchmarks.cases import Case, Problem
from benchmarks.limits import MIB, Products, Tiling, best_tiling, expected_step
from bgkernels.backends import BACKENDS

GAMMA = 0.1
"""Of the power-sum entropy, as in the library's default policy."""


@dataclass(frozen=True)
class Outcome:
    """What a step leaves: a loss (None for bare products) and gradients of ``input``, ``weight``.

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


@dataclass(frozen=True)
class Entry:
    """A contestant.

    Args:
        about: what it computes, in a line.
        start: makes ready for a problem; what it returns runs one step.
        kind: ``"ours"``, ``"peer"`` or ``"limit"``.
        mix: of cross-entropy and divergence: ``"entropy"``, routed by the teacher, ``"fixed"``, or
            ``"kept …"``: routed by what is kept of it.
        kept: columns kept of each of the teacher's rows; 0: all.
        native: it multiplies in the dtype of its inputs, whatever the processor makes of that.
        buffers: fp32 matrices (rows, vocab) that it holds at once, roughly.
        compiles: its first step compiles.
        lacks: features of a case that it cannot serve, by the case's field, with the reason.
    """

    about: str
    start: Callable[[Problem], Step]
    kind: str = "peer"
    mix: str = "entropy"
    native: bool = True
    buffers: float = 0.0
    compiles: bool = False
    lacks: dict[str, str] = field(default_factory=dict)
    kept: int = 0

    def refuses(self, case: Case, patience: float, memory: float) -> str | None:
        """None, or why the case is not for this entry on this machine.

        Args:
            case: the work.
            patience: seconds that a step may take.
            memory: free bytes.
        """
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
        """The same loss in the words of ``bgkernels.oracle.hybrid_loss``."""
        common = {"divergence": "forward_kl", "temperature": case.temperature}
        if self.mix != "fixed":
            return common | {"routing": "entropy", "routing_params": {"gamma": GAMMA}}
        weights = {"hard": 0.5, "soft": 0.5 / case.temperature**2}  # the peer leaves out T²
        return common | {"routing": "additive", "routing_params": weights}


def training(loss: Loss) -> Callable[[Problem], Step]:
    """A step that runs a loss forward and backward."""

    def start(problem: Problem) -> Step:
        def step() -> Outcome:
            begin = time.perf_counter()
            value = loss(problem)
            forward = time.perf_counter() - begin
            gradients = torch.autograd.grad(value, (problem.input, problem.weight))
            return Outcome(value.detach(), gradients, forward)

        return step

    return start


def products(problem: Problem, tiling: Tiling | None = None) -> Step:
    """The four products in a tiling; None: the fastest."""
    tiling = tiling or best_tiling(problem)
    bare = Products(problem, tiling)
    return lambda: Outcome(None, bare.run(), notes={"tiling": str(tiling)})


def natural(problem: Problem) -> Step:
    """The four products over the whole vocabulary, in the dtype of the inputs."""
    return products(problem, Tiling(problem.weight.dtype, problem.case.vocab))


def ours(
    problem: Problem, *, mode: str, budget: int, backend: str = "auto",
    teacher: bg.TopKTeacher | None = None,
) -> Tensor:  # fmt: skip
    """The library, by default with the teacher's hidden states and head."""
    cap = problem.case.softcap or None
    dense = bg.LinearTeacher(problem.t_input, problem.t_weight, logit_softcap=cap)
    loss = bg.linear_hybrid_distillation(
        problem.input, problem.weight, teacher or dense, problem.target,
        routing=bg.routing.entropy(gamma=GAMMA), temperature=problem.case.temperature,
        logit_softcap=cap, mode=mode, memory_budget=budget, backend=backend,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    return loss


def cached(problem: Problem, *, kept: int, **options: Any) -> Step:
    """The library with what was kept of the teacher, before the step, in fp32."""
    cap, parts = problem.case.softcap, []
    weight = problem.t_weight[: problem.case.vocab]
    with torch.no_grad():
        for rows in problem.t_input.split(64):
            t = torch.cat([rows.float() @ w.float().T for w in weight.split(8192)], 1)
            t = cap * torch.tanh(t / cap) if cap else t
            parts.append(t.log_softmax(-1).topk(kept))
    logprobs, indices = (torch.cat(x) for x in zip(*parts, strict=True))
    teacher = bg.TopKTeacher(indices.int(), logprobs, "renormalize")
    return training(functools.partial(ours, teacher=teacher, **options))(problem)


def logits(problem: Problem) -> tuple[Tensor, Tensor]:
    """Dense logits of student and teacher over the columns of the student."""
    with torch.no_grad():
        t = problem.t_input @ problem.t_weight[: problem.case.vocab].T
    z, cap = problem.input @ problem.weight.T, problem.case.softcap
    return (cap * torch.tanh(z / cap), cap * torch.tanh(t / cap)) if cap else (z, t)


def dense(problem: Problem) -> Tensor:
    """The same loss as one would write it over logits."""
    z, t = (x.float() for x in logits(problem))
    heat, valid = problem.case.temperature, problem.target != -100
    lp_s, lp_t = F.log_softmax(z / heat, -1), F.log_softmax(t / heat, -1)
    soft = _power_entropy((GAMMA * lp_t).exp(), z.shape[1])
    divergence = heat**2 * (lp_t.exp() * (lp_t - lp_s)).sum(-1)
    hard_label = F.cross_entropy(z, problem.target, reduction="none")
    loss = (1 - soft) * hard_label + soft * divergence
    return (loss * valid).sum() / valid.sum().clamp_min(1)


def widened(problem: Problem) -> Tensor:
    """:func:`dense` on fp32 copies of hidden states and heads: for processors slow in 16 bits."""
    names = ("input", "weight", "t_input", "t_weight")
    return dense(replace(problem, **{name: getattr(problem, name).float() for name in names}))


def compiled(problem: Problem, loss: Loss = dense) -> Step:
    """A dense loss through ``torch.compile``."""
    return training(torch.compile(loss, dynamic=False))(problem)


def paper(problem: Problem) -> Tensor:
    """The entropy-routed loss in the order of operations of the paper's release.

    It copies both logits (their shift by one token), takes the divergence twice (the configured
    one, which is dropped, and its alpha-beta form at (1, 0)), and the gate from one more softmax.
    """
    z, t = (x.clone() for x in logits(problem))
    valid = problem.target != -100
    count = valid.sum().clamp_min(1)
    _alpha_beta(z, t)
    divergence = _alpha_beta(z, t)
    powers = F.softmax(t, -1, dtype=torch.float32) ** GAMMA
    soft = _power_entropy(powers, t.shape[1])
    hard_label = F.cross_entropy(z.float(), problem.target, reduction="none")
    hard_loss = ((1 - soft) * hard_label * valid).sum() / count
    return hard_loss + (soft * divergence * valid).sum() / count


def _alpha_beta(z: Tensor, t: Tensor) -> Tensor:
    """Alpha-beta at (1, 0), which is the forward KL: ``Σ p(log(p/q) - 1) + q``."""
    q, p = F.softmax(z, -1, dtype=torch.float32), F.softmax(t, -1, dtype=torch.float32)
    log_q = F.log_softmax(z, -1, dtype=torch.float32)
    log_p = F.log_softmax(t, -1, dtype=torch.float32)
    return (p * (log_p - log_q - 1) + q).sum(-1)


def _power_entropy(powers: Tensor, vocab: int) -> Tensor:
    return ((powers.sum(-1) - 1) / (vocab ** (1 - GAMMA) - 1)).clamp(0, 1)


def liger(problem: Problem, *, chunk: int = 1024, compile_chunks: bool = True) -> Tensor:
    """Liger's nearest loss: cross-entropy and forward KL, half and half, for every token."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        beta=0.0, temperature=problem.case.temperature, chunk_size=chunk, compiled=compile_chunks
    )
    tensors = (problem.input, problem.weight, problem.t_input, problem.t_weight, problem.target)
    value = loss(*tensors)
    assert isinstance(value, Tensor)
    return value


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
        for kept in (64, 512):
            start = functools.partial(cached, kept=kept, mode=mode, budget=1536 * MIB)
            about = f"bgkernels, {mode}, 1536 MiB, the teacher's top {kept} from a cache"
            made[f"{mode}-top-{kept}"] = Entry(
                about, start, "ours", mix=f"kept {kept}", native=False, kept=kept
            )
    return made


_NO_SOFTCAP = {"softcap": "has no soft-cap"}
ENTRIES: dict[str, Entry] = {
    "limit": Entry("bare products, best tiling", products, "limit", native=False),
    "natural": Entry("bare products, whole vocabulary", natural, "limit", buffers=2),
    **_ours(),
    "dense": Entry("dense torch, eager", training(dense), buffers=7),
    "compiled": Entry("dense torch, `torch.compile`", compiled, buffers=3, compiles=True),
    "widened": Entry(
        "dense torch on fp32 copies of the heads, `torch.compile`",
        functools.partial(compiled, loss=widened), native=False, buffers=4, compiles=True,
    ),
    "paper": Entry(
        "the paper's formula, eager", training(paper), buffers=8,
        lacks=_NO_SOFTCAP
        | {
            "temperature": "has no temperature in its routed loss",
            "vocab_t": "lets the teacher's padding change the weights",
        },
    ),
    "liger": Entry(
        "Liger chunked JSD: fixed weights, no routing", training(liger), mix="fixed",
        buffers=5, compiles=True,
        lacks=_NO_SOFTCAP | {"vocab_t": "gives the student's missing columns logit 0"},
    ),
}  # fmt: skip
