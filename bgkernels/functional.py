"""The loss and the statistics as functions; see :mod:`bgkernels.modules` for the same as modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import Unpack

from bgkernels.api import Common, Routing, make_objective, prepare, reduce
from bgkernels.divergences import Divergence
from bgkernels.spec import Extra
from bgkernels.stats import RowStats
from bgkernels.teachers import Teacher

Loss = Tensor | tuple[Tensor, RowStats]


def linear_hybrid_distillation(
    input: Tensor, linear_weight: Tensor, teacher: Teacher | None, target: Tensor | str, *,
    linear_bias: Tensor | None = None, divergence: str | Divergence = "forward_kl", routing: Routing = "entropy",
    temperature: float = 1.0, label_smoothing: float = 0.0, z_loss: float = 0.0, token_weight: Tensor | None = None,
    reduction: str = "mean", num_items: int | Tensor | None = None, mode: str = "auto", return_stats: bool = False,
    **common: Unpack[Common],
) -> Loss:  # fmt: skip
    """Hybrid distillation loss from hidden states: ``hard·CE + soft·T²·D`` a token, never holding ``[tokens, vocab]``.

    Gradients flow to ``input``, ``linear_weight`` and ``linear_bias``, where they are asked for.

    Args:
        input: ``(..., D)`` the student's last hidden states.
        linear_weight: ``(V, D)`` the student's head.
        teacher: a :class:`LinearTeacher` or :class:`LogitsTeacher`; None if ``routing="hard"`` and ``target`` is a tensor.
        target: ``(...)`` int64 labels, ``"teacher_argmax"``, or ``"teacher_sample"`` (at temperature 1).
        linear_bias: ``(V,)``, or None.
        divergence: name in ``bg.divergences`` or a :class:`Divergence`.
        routing: name in ``bg.routing``, a :class:`Policy`, or a callable ``RowStats -> (hard, soft)``.
        temperature: ``T`` of the divergence and of the routing statistics; the divergence is multiplied by ``T²``.
        logit_scale, logit_softcap: the student's real logits are ``cap·tanh(scale·x / cap)``.
        label_smoothing: of the cross-entropy, as in ``F.cross_entropy``.
        z_loss: weight of the squared log-sum-exp of the student's logits.
        ignore_index: rows whose target is this take no part.
        token_weight: ``(...)`` factor on each token's loss; not part of the divisor.
        reduction: ``"mean"`` over the rows that are not ignored, ``"sum"``, or ``"none"``: ``(...)``.
        num_items: divisor of the mean instead, for gradient accumulation and data parallelism; both terms share it.
        vocab_size: compare these leading columns, and take the cross-entropy over them too. None: compare the columns
            that both models have, and take the cross-entropy over all of the student's.
        memory_budget: bytes of temporaries beside the gradients; None: 1 GiB on a CPU, 2 GiB on a GPU.
        mode: ``"fused"`` computes the gradient in the forward pass (four GEMM-equivalents), ``"recompute"`` in backward
            (six). ``"auto"``: fused where a gradient is wanted, the reduction is a sum or mean and the policy looks at
            one token at a time.
        backend: ``"auto"``, ``"native"`` or ``"eager"``; a name raises if it cannot serve.
        seed: of ``"teacher_sample"``; None: torch's initial seed. The same seed gives the same tokens everywhere.
        return_stats: also return :class:`RowStats`, detached, shaped ``(...)``.

    Returns:
        The loss, fp32, ``()`` or ``(...)``; with ``return_stats`` also the statistics.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.

    Example:
        >>> import torch, bgkernels as bg
        >>> x, w = torch.randn(5, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
        >>> teacher = bg.LinearTeacher(torch.randn(5, 12), torch.randn(50, 12))
        >>> loss = bg.linear_hybrid_distillation(x, w, teacher, torch.randint(50, (5,)))
        >>> loss.backward()
    """
    objective = make_objective(divergence, routing, temperature, label_smoothing, z_loss)
    prepared = prepare(
        (input, linear_weight, linear_bias), ("input", "linear_weight", "linear_bias"), teacher, target, objective.extras,
        reads_teacher=objective.policy.uses_teacher, logit_sum=label_smoothing > 0, temperature=temperature, **common,
    )  # fmt: skip
    loss, stats = reduce(
        prepared, objective, reduction=reduction, mode=mode, token_weight=token_weight, num_items=num_items
    )
    return (loss, stats) if return_stats else loss


def hybrid_distillation(
    logits: Tensor, teacher: Teacher | None, target: Tensor | str, *,
    divergence: str | Divergence = "forward_kl", routing: Routing = "entropy", temperature: float = 1.0,
    label_smoothing: float = 0.0, z_loss: float = 0.0, token_weight: Tensor | None = None, reduction: str = "mean",
    num_items: int | Tensor | None = None, mode: str = "auto", return_stats: bool = False,
    overwrite_logits: bool = False, **common: Unpack[Common],
) -> Loss:  # fmt: skip
    """The same loss from logits that exist already.

    Args:
        logits: ``(..., V)`` the student's raw head outputs.
        teacher, target: as in :func:`linear_hybrid_distillation`.
        overwrite_logits: write the gradient over ``logits`` in the forward pass (fused mode only): half the memory, but their
            values are gone. Autograd is told: an earlier operation that saved them raises in its backward.
        divergence: name in ``bg.divergences`` or a :class:`Divergence`.
        routing: name in ``bg.routing``, a :class:`Policy`, or a callable ``RowStats -> (hard, soft)``.
        temperature: ``T`` of the divergence and of the routing statistics; the divergence is multiplied by ``T²``.
        logit_scale, logit_softcap: the student's real logits are ``cap·tanh(scale·x / cap)``.
        label_smoothing: of the cross-entropy, as in ``F.cross_entropy``.
        z_loss: weight of the squared log-sum-exp of the student's logits.
        ignore_index: rows whose target is this take no part.
        token_weight: ``(...)`` factor on each token's loss; not part of the divisor.
        reduction: ``"mean"`` over the rows that are not ignored, ``"sum"``, or ``"none"``: ``(...)``.
        num_items: divisor of the mean instead, for gradient accumulation and data parallelism; both terms share it.
        vocab_size: compare these leading columns, and take the cross-entropy over them too. None: compare the columns
            that both models have, and take the cross-entropy over all of the student's.
        memory_budget: bytes of temporaries beside the gradients; None: 1 GiB on a CPU, 2 GiB on a GPU.
        mode: ``"fused"`` computes the gradient in the forward pass (four GEMM-equivalents), ``"recompute"`` in backward
            (six). ``"auto"``: fused where a gradient is wanted, the reduction is a sum or mean and the policy looks at
            one token at a time.
        backend: ``"auto"``, ``"native"`` or ``"eager"``; a name raises if it cannot serve.
        seed: of ``"teacher_sample"``; None: torch's initial seed. The same seed gives the same tokens everywhere.
        return_stats: also return :class:`RowStats`, detached, shaped ``(...)``.

    Returns:
        The loss, fp32, ``()`` or ``(...)``; with ``return_stats`` also the statistics.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.

    Example:
        >>> import torch, bgkernels as bg
        >>> logits = torch.randn(5, 50, requires_grad=True)
        >>> loss = bg.hybrid_distillation(logits, bg.LogitsTeacher(torch.randn(5, 50)), "teacher_argmax")
        >>> loss.backward()
    """
    objective = make_objective(divergence, routing, temperature, label_smoothing, z_loss)
    prepared = prepare(
        (logits,), ("logits",), teacher, target, objective.extras, reads_teacher=objective.policy.uses_teacher,
        logit_sum=label_smoothing > 0, temperature=temperature, **common,
    )  # fmt: skip
    loss, stats = reduce(
        prepared, objective, reduction=reduction, mode="fused" if overwrite_logits else mode,
        token_weight=token_weight, num_items=num_items, overwrite=overwrite_logits,
    )  # fmt: skip
    return (loss, stats) if return_stats else loss


def linear_row_stats(
    input: Tensor, linear_weight: Tensor, teacher: Teacher | None, target: Tensor | str, *,
    linear_bias: Tensor | None = None, extras: Sequence[Extra] = (), **common: Unpack[Common],
) -> RowStats:  # fmt: skip
    """Differentiable statistics of each token, to build any objective on in plain torch.

    Backward multiplies the logits again (recompute mode). Keywords are those of :func:`linear_hybrid_distillation`.

    Args:
        input, linear_weight, teacher, target, linear_bias: as in :func:`linear_hybrid_distillation`; without a teacher
            its fields and the comparisons are 0.
        extras: extra statistics (:class:`Tilt`, :class:`Mixture`, :class:`TotalVariation`).

    Returns:
        :class:`RowStats` shaped ``(...)``.

    Example:
        >>> import torch, bgkernels as bg
        >>> x, w = torch.randn(5, 8, requires_grad=True), torch.randn(50, 8)
        >>> stats = bg.linear_row_stats(x, w, bg.LinearTeacher(torch.randn(5, 12), torch.randn(50, 12)), "teacher_argmax")
        >>> (stats.kl_ts + 0.1 * stats.nll - 0.01 * stats.entropy_s).mean().backward()
    """
    prepared = prepare(
        (input, linear_weight, linear_bias), ("input", "linear_weight", "linear_bias"), teacher, target, extras,
        reads_teacher=teacher is not None, logit_sum=True, **common,
    )  # fmt: skip
    return prepared.shaped(prepared.statistics()[0])
