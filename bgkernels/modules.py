"""Each loss is a module here: it is configured when it is made, and called with tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bgkernels import functional
from bgkernels.loss.options import Options
from bgkernels.loss.reduction import Loss
from bgkernels.teachers import Teacher


class _Configured(nn.Module):
    """The module keeps the options of a function, and checks them when it is made."""

    def __init__(self, *, return_stats: bool = False, **options: Any) -> None:
        super().__init__()
        functional.objective_of(Options(**options))
        self.config = options | {"return_stats": return_stats}

    def extra_repr(self) -> str:
        """Return the configuration, as it was passed."""
        return ", ".join(f"{k}={v!r}" for k, v in self.config.items())

    def _loss(
        self, function: Callable[..., Loss], *args: object, seed: int | None, **options: object
    ) -> Loss:
        """Call the function with the configured options and these."""
        config = self.config if seed is None else self.config | {"seed": seed}
        return function(*args, **options, **config)


class LinearHybridDistillationLoss(_Configured):
    """The module computes :func:`bgkernels.linear_hybrid_distillation`.

    Args:
        return_stats: return ``(loss, RowStats)``.
        **options: divergence, routing and the other options of the function, with its defaults.

    Raises:
        TypeError, ValueError: an option that is unknown or out of range, by name.

    Example:
        >>> import torch, bgkernels as bg
        >>> loss_fn = bg.LinearHybridDistillationLoss(divergence="jeffreys", temperature=2.0)
        >>> x, w = torch.randn(5, 8), torch.randn(50, 8)
        >>> loss = loss_fn(x, w, bg.LogitsTeacher(torch.randn(5, 50)), torch.randint(50, (5,)))
    """

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        teacher: Teacher | None,
        target: Tensor | str,
        linear_bias: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
        seed: int | None = None,
        weight_grad: Tensor | None = None,
    ) -> Loss:
        """Return the loss; arguments are the function's. ``seed`` overrides the configured one."""
        return self._loss(
            functional.linear_hybrid_distillation, input, linear_weight, teacher, target,
            linear_bias=linear_bias, token_weight=token_weight, num_items=num_items, seed=seed,
            weight_grad=weight_grad,
        )  # fmt: skip


class HybridDistillationLoss(_Configured):
    """The module computes :func:`bgkernels.hybrid_distillation`.

    Args:
        return_stats: return ``(loss, RowStats)``.
        **options: divergence, routing and the other options of the function, with its defaults.

    Raises:
        TypeError, ValueError: an option that is unknown or out of range, by name.

    Example:
        >>> import torch, bgkernels as bg
        >>> loss_fn = bg.HybridDistillationLoss(routing="confidence")
        >>> teacher = bg.LogitsTeacher(torch.randn(5, 50))
        >>> loss = loss_fn(torch.randn(5, 50), teacher, "teacher_argmax")
    """

    def forward(
        self,
        logits: Tensor,
        teacher: Teacher | None,
        target: Tensor | str,
        *,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
        seed: int | None = None,
        overwrite_logits: bool = False,
    ) -> Loss:
        """Return the loss; arguments are the function's. ``seed`` overrides the configured one."""
        return self._loss(
            functional.hybrid_distillation, logits, teacher, target, token_weight=token_weight,
            num_items=num_items, overwrite_logits=overwrite_logits, seed=seed,
        )  # fmt: skip
