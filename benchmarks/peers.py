"""The losses of other libraries, imported where they are used.

Each runs in a process of its own, and may have packages of its own: a folder ``.peers/<entry>``
made by ``pip install --target`` comes first on that process's path.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Problem
from benchmarks.dense import mean


def liger(problem: Problem, *, chunk: int = 1024, compile_chunks: bool = True) -> Tensor:
    """Liger's nearest loss: cross-entropy and forward KL, half and half, for every token."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        beta=0.0, temperature=problem.case.temperature, chunk_size=chunk, compiled=compile_chunks
    )
    return _tensor(
        loss(problem.input, problem.weight, problem.t_input, problem.t_weight, problem.target)
    )


def liger_jsd(problem: Problem) -> Tensor:
    """Liger's Triton operator; its beta 0 is the forward KL."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(
        jsd_beta=0.0, ignore_index=-100, temperature=problem.case.temperature
    )
    return _tensor(
        loss(problem.input, problem.weight, problem.t_input, problem.t_weight, problem.target)
    )


def liger_kl(problem: Problem) -> Tensor:
    """Liger's Triton operator from hidden states; it takes the teacher's probabilities whole."""
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    heat = problem.case.temperature
    with torch.no_grad():
        probabilities = (problem.t_input @ problem.t_weight.T / heat).float().softmax(-1)
    loss = LigerFusedLinearKLDivLoss(temperature=heat)
    return _tensor(loss(problem.input, problem.weight, probabilities, problem.target))


def orda(problem: Problem) -> Tensor:
    """Cross-entropy and forward KL, half and half."""
    from orda_kernel import SeparateTeacher, distillation_loss

    made = distillation_loss(
        problem.input, problem.weight, problem.target,
        SeparateTeacher(hidden=problem.t_input, weight=problem.t_weight),
        student_ce_weight=0.5, teacher_ce_weight=0.0, kl_weight=0.5,
        kl_temperature=problem.case.temperature,
    )  # fmt: skip
    return _tensor(made.loss)


def trl(problem: Problem) -> Tensor:
    """TRL's divergence of each token; it has no cross-entropy."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        problem.input, problem.weight, None, problem.t_input, problem.t_weight, None, 0.0,
        problem.case.temperature,
    )  # fmt: skip
    return mean(divergence.view(-1), problem.target)


def torch_lce(problem: Problem) -> Tensor:
    """Torch's cross-entropy from hidden states."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError("torch has it from 2.13 on")
    return _tensor(F.linear_cross_entropy(problem.input, problem.weight, problem.target))


def cce(problem: Problem) -> Tensor:
    """Apple's cut cross-entropy; on a CPU its compiled fall-back."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if problem.input.is_cuda else "torch_compile"
    return _tensor(linear_cross_entropy(problem.input, problem.weight, problem.target, impl=impl))


def quack(problem: Problem) -> Tensor:
    """QuACK's chunked cross-entropy."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _tensor(chunked_linear_cross_entropy(problem.input, problem.weight, problem.target))


def _tensor(x: object) -> Tensor:
    assert isinstance(x, Tensor)
    return x
