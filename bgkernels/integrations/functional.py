"""``torch.nn.functional.linear_cross_entropy``, computed by the kernels of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bgkernels as bg


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """Cross-entropy of ``input @ linear_weight.T + linear_bias``, which never exists.

    The arguments are torch's. The differences: a mean over no token is 0 instead of NaN; label
    smoothing does not materialise the logits.

    Args:
        input: ``(..., D)``.
        linear_weight: ``(V, D)``.
        target: ``(...)`` integer labels.
        linear_bias: ``(V,)`` or None.
        weight: ``(V,)`` a factor for each class; the mean divides by the factors of the labels.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: a label that takes no part; None means -100.
        label_smoothing: in [0, 1].
        options: accepted and not used; the planner chooses.

    Raises:
        NotImplementedError: probabilities as targets, or label smoothing with class weights.
        TypeError, ValueError: an argument that does not fit, by name.

    Example:
        >>> x, w = torch.randn(5, 8), torch.randn(50, 8)
        >>> y = torch.randint(50, (5,))
        >>> torch.allclose(
        ...     linear_cross_entropy(x, w, y), torch.nn.functional.cross_entropy(x @ w.T, y)
        ... )
        True
    """
    if target.is_floating_point():
        raise NotImplementedError(
            "`target` holds probabilities; pass the model that gives them as a teacher to "
            "bg.linear_hybrid_distillation(..., routing='soft')"
        )
    skip = -100 if ignore_index is None else ignore_index
    token_weight = num_items = None
    if weight is not None:
        if label_smoothing:
            raise NotImplementedError("`weight` together with `label_smoothing`; drop one of them")
        valid = target != skip
        token_weight = torch.where(valid, weight.detach()[torch.where(valid, target, 0)], 0.0)
        total = token_weight.sum().double()
        num_items = torch.where(total > 0, total, 1.0) if reduction == "mean" else None
    loss = bg.linear_hybrid_distillation(
        input,
        linear_weight,
        None,
        target,
        linear_bias=linear_bias,
        routing="hard",
        label_smoothing=label_smoothing,
        ignore_index=skip,
        token_weight=token_weight,
        reduction=reduction,
        num_items=num_items,
    )
    assert isinstance(loss, Tensor)
    return loss
