"""The loss and the statistics are functions here, and modules in :mod:`bgkernels.modules`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from bgkernels import divergences
from bgkernels import routing as policies
from bgkernels.loss.forecast import StepPlan, forecast
from bgkernels.loss.objective import Divergence, Objective
from bgkernels.loss.options import Options, Routing
from bgkernels.loss.reduction import Loss, hybrid_loss, posed, row_stats, with_weight_grad
from bgkernels.rows.caching import remembered
from bgkernels.rows.extras import Extra
from bgkernels.rows.stats import RowStats
from bgkernels.teachers import Teacher


def linear_hybrid_distillation(
    input: Tensor,
    linear_weight: Tensor,
    teacher: Teacher | None,
    target: Tensor | str,
    *,
    linear_bias: Tensor | None = None,
    divergence: str | Divergence = "forward_kl",
    routing: Routing = "entropy",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    vocab_group: ProcessGroup | None = None,
    memory_budget: int | None = None,
    mode: str = "auto",
    backend: str = "auto",
    seed: int | None = None,
    return_stats: bool = False,
    weight_grad: Tensor | None = None,
) -> Loss:
    """Compute a hybrid distillation loss from hidden states, never holding ``[tokens, vocab]``.

    Each token's loss is ``hard·CE + soft·T²·D``: CE is the student's cross-entropy with the label
    at temperature 1, D a divergence from the teacher at temperature T, and a routing policy gives
    the weights ``hard`` and ``soft``. ``input``, ``linear_weight`` and ``linear_bias`` get a
    gradient if they require one.

    Args:
        input: ``(..., D)`` the student's last hidden states, fp32, bf16, fp16 or fp64.
        linear_weight: ``(V, D)`` the student's head.
        teacher: a :class:`LinearTeacher`, :class:`LogitsTeacher`, :class:`TopKTeacher` or
            :class:`MixtureTeacher` with the same leading shape; None is enough for
            ``routing="hard"`` with a target tensor.
        target: ``(...)`` integer labels, ``"teacher_argmax"``, or ``"teacher_sample"`` (a token
            sampled from the teacher at temperature 1).
        linear_bias: ``(V,)`` the student's bias, or None.
        divergence: a name in ``bg.divergences``, or a :class:`Divergence`.
        routing: a name in ``bg.routing``, a :class:`Policy`, or any callable
            ``RowStats -> (hard, soft)``.
        temperature: ``T`` of the divergence. Routing sees the distributions at temperature 1,
            whatever T is: whether a token is a bridge does not depend on how it is trained.
        logit_scale, logit_softcap: the student's real logits are ``cap·tanh(scale·x / cap)``.
        label_smoothing: smoothing of the cross-entropy, as in
            ``torch.nn.functional.cross_entropy``.
        z_loss: weight of the squared log-sum-exp of the student's logits.
        ignore_index: tokens with this target are left out of the loss; their logits do not matter.
        token_weight: ``(...)`` factor on each token's loss; it does not change the divisor.
        reduction: ``"mean"`` over the tokens with a label, ``"sum"``, or ``"none"``: ``(...)``.
        num_items: divisor of the mean, for gradient accumulation and data parallelism; both terms
            have the same one. None: the number of tokens with a label.
        vocab_size: compare these leading columns, and normalise the cross-entropy over them too.
            None: compare the columns that both models have, and normalise the cross-entropy over
            all of the student's.
        vocab_group: ranks over which the vocabulary is split: weights, biases and logits hold this
            rank's columns. Tokens and labels (of the whole vocabulary) must be the same on each
            rank; loss, statistics and the gradient of ``input`` then are, too. See
            :mod:`bgkernels.distributed`, and for DTensors :mod:`bgkernels.loss.dtensor`.
        memory_budget: most bytes of temporaries, besides inputs and gradients. None: 1.5 GiB on a
            CPU, 2 GiB on a GPU. A smaller budget costs additional matrix products: see
            :mod:`bgkernels.streaming.planner`.
        mode: ``"fused"`` computes the gradient in the forward pass, ``"recompute"`` in backward.
            ``"auto"`` is fused if a gradient is required, the reduction is a mean or sum, the
            policy looks at one token at a time (a plain callable is assumed not to), and the
            budget is large enough; otherwise it is recompute, which needs less memory.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"eager"``; a named backend that cannot
            serve the call raises.
        seed: seed of ``"teacher_sample"``; the same seed gives the same tokens in every backend and
            chunking. None: a new seed from torch's generator at each call.
        return_stats: also return :class:`RowStats`, detached, shaped ``(...)``.
        weight_grad: ``(V, D)`` contiguous fp32 (fp64 for fp64 inputs), such as Megatron's
            ``main_grad``: the weight's gradient is added to it, and ``linear_weight.grad`` gets
            none. The library keeps no sum of its own, so more tiles fit ``memory_budget``. Fused
            mode adds in the forward pass. Its loss must then be the one that ``backward`` is called
            on, once and without a factor (use ``num_items`` or ``token_weight`` for factors); a
            factor raises on a CPU, and makes the sum NaN on a GPU. Recompute mode adds in
            backward, with any factor.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs), ``()`` or ``(...)``; with ``return_stats`` the pair
        of loss and statistics. Without any labelled token, loss and gradients are 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.
        NotImplementedError: a named backend cannot serve the call; the message says why.

    Example:
        >>> import torch, bgkernels as bg
        >>> x, w = torch.randn(5, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
        >>> teacher = bg.LinearTeacher(torch.randn(5, 12), torch.randn(50, 12))
        >>> loss = bg.linear_hybrid_distillation(x, w, teacher, torch.randint(50, (5,)))
        >>> loss.backward()
    """
    options = Options.of(
        divergence=divergence, routing=routing, temperature=temperature, logit_scale=logit_scale,
        logit_softcap=logit_softcap, label_smoothing=label_smoothing, z_loss=z_loss,
        ignore_index=ignore_index, reduction=reduction, vocab_size=vocab_size,
        vocab_group=vocab_group, memory_budget=memory_budget, mode=mode, backend=backend, seed=seed,
    )  # fmt: skip
    student = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    return hybrid_loss(
        student, teacher, target, options, objective_of(options),
        token_weight=token_weight, num_items=num_items, return_stats=return_stats,
        weight_grad=weight_grad,
    )  # fmt: skip


def hybrid_distillation(
    logits: Tensor,
    teacher: Teacher | None,
    target: Tensor | str,
    *,
    divergence: str | Divergence = "forward_kl",
    routing: Routing = "entropy",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    vocab_group: ProcessGroup | None = None,
    memory_budget: int | None = None,
    mode: str = "auto",
    backend: str = "auto",
    seed: int | None = None,
    return_stats: bool = False,
    overwrite_logits: bool = False,
) -> Loss:
    """Compute a hybrid distillation loss from logits that exist already.

    The gradient is a second ``[tokens, vocab]`` tensor. With hidden states and a head,
    :func:`linear_hybrid_distillation` needs neither of the two tensors.

    Args:
        logits: ``(..., V)`` the student's raw head outputs.
        overwrite_logits: write the gradient over ``logits`` in the forward pass (fused mode). Their
            values are lost. If an earlier operation saved them for its backward, autograd raises.

    The other arguments, the result and the errors are those of :func:`linear_hybrid_distillation`.

    Example:
        >>> import torch, bgkernels as bg
        >>> logits = torch.randn(5, 50, requires_grad=True)
        >>> teacher = bg.LogitsTeacher(torch.randn(5, 50))
        >>> bg.hybrid_distillation(logits, teacher, "teacher_argmax").backward()
    """
    options = Options.of(
        divergence=divergence, routing=routing, temperature=temperature, logit_scale=logit_scale,
        logit_softcap=logit_softcap, label_smoothing=label_smoothing, z_loss=z_loss,
        ignore_index=ignore_index, reduction=reduction, vocab_size=vocab_size,
        vocab_group=vocab_group, memory_budget=memory_budget,
        mode="fused" if overwrite_logits else mode, backend=backend, seed=seed,
    )  # fmt: skip
    return hybrid_loss(
        {"logits": logits}, teacher, target, options, objective_of(options),
        token_weight=token_weight, num_items=num_items, return_stats=return_stats,
        overwrite=overwrite_logits,
    )  # fmt: skip


def plan(
    input: Tensor,
    linear_weight: Tensor,
    teacher: Teacher | None,
    target: Tensor | str,
    *,
    linear_bias: Tensor | None = None,
    divergence: str | Divergence = "forward_kl",
    routing: Routing = "entropy",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
    vocab_group: ProcessGroup | None = None,
    memory_budget: int | None = None,
    mode: str = "auto",
    backend: str = "auto",
    seed: int | None = None,
    return_stats: bool = False,
    weight_grad: Tensor | None = None,
) -> StepPlan:
    """Say how :func:`linear_hybrid_distillation` would run with these arguments; compute nothing.

    The plan depends on the shapes, dtypes and device of the tensors, on which of them require a
    gradient, and on the number of threads. Only the values of labels are read, to check them.

    Returns:
        A :class:`StepPlan`.

    Raises:
        TypeError, ValueError, NotImplementedError: the errors of the loss.

    Example:
        >>> import torch, bgkernels as bg
        >>> x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
        >>> w = torch.randn(5000, 32, dtype=torch.bfloat16, requires_grad=True)
        >>> teacher = bg.LinearTeacher(x.detach(), w.detach())
        >>> labels = torch.randint(5000, (64,))
        >>> ample = bg.plan(x, w, teacher, labels)
        >>> ample.mode, ample.products
        ('fused', 4.0)
        >>> tight = bg.plan(x, w, teacher, labels, memory_budget=ample.bytes // 4)
        >>> tight.products > 4 and tight.bytes < ample.bytes
        True
    """
    options = Options.of(
        divergence=divergence, routing=routing, temperature=temperature, logit_scale=logit_scale,
        logit_softcap=logit_softcap, label_smoothing=label_smoothing, z_loss=z_loss,
        ignore_index=ignore_index, reduction=reduction, vocab_size=vocab_size,
        vocab_group=vocab_group, memory_budget=memory_budget, mode=mode, backend=backend, seed=seed,
    )  # fmt: skip
    objective = objective_of(options)
    student = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    problem = posed(student, teacher, target, options, objective, return_stats=return_stats)
    problem = with_weight_grad(problem, student, weight_grad)
    return forecast(problem, objective, options)


def objective_of(options: Options) -> Objective:
    """Return the loss of a row that options ask for.

    Raises:
        TypeError, ValueError: the divergence or policy is unknown; the message names it.
    """
    names = options.divergence, options.routing
    numbers = float(options.temperature), options.label_smoothing, options.z_loss
    named = all(isinstance(name, str) for name in names)
    return (_named_objective if named else _objective)(*names, *numbers)


def _objective(
    divergence: str | Divergence, routing: Routing, temperature: float, smoothing: float, z: float
) -> Objective:
    if isinstance(divergence, str):
        divergence = divergences.get(divergence)
    if not isinstance(divergence, Divergence):
        kind = type(divergence).__name__
        raise TypeError(f"`divergence` must be a name or a Divergence; got {kind}")
    return Objective(divergence, policies.get(routing), temperature, smoothing, z)


_named_objective = remembered(_objective)


def linear_row_stats(
    input: Tensor,
    linear_weight: Tensor,
    teacher: Teacher | None,
    target: Tensor | str,
    *,
    linear_bias: Tensor | None = None,
    extras: Sequence[Extra] = (),
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    vocab_group: ProcessGroup | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    seed: int | None = None,
) -> RowStats:
    """Compute differentiable statistics of each token, to build any objective in plain torch.

    Backward multiplies the logits again (recompute mode), and takes any upstream gradient.

    Args:
        teacher: as in :func:`linear_hybrid_distillation`; with None, the teacher's fields are 0.
        extras: extra statistics to compute: :class:`Tilt`, :class:`Tempered`,
            :class:`Mixture`, :class:`TotalVariation`.
        temperature: temperature of all statistics except ``nll``, ``lse_hard`` and ``logit_mean``,
            which are at temperature 1.

    The other arguments and the errors are those of :func:`linear_hybrid_distillation`.

    Returns:
        :class:`RowStats` shaped ``(...)``.

    Example:
        >>> import torch, bgkernels as bg
        >>> x, w = torch.randn(5, 8, requires_grad=True), torch.randn(50, 8)
        >>> teacher = bg.LinearTeacher(torch.randn(5, 12), torch.randn(50, 12))
        >>> stats = bg.linear_row_stats(x, w, teacher, "teacher_argmax")
        >>> (stats.kl_ts + 0.1 * stats.nll - 0.01 * stats.entropy_s).mean().backward()
    """
    options = Options.of(
        temperature=temperature, logit_scale=logit_scale, logit_softcap=logit_softcap,
        ignore_index=ignore_index, vocab_size=vocab_size, vocab_group=vocab_group,
        memory_budget=memory_budget, backend=backend, seed=seed,
    )  # fmt: skip
    student = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    return row_stats(student, teacher, target, options, tuple(extras))
