"""The loss that a model computes of its labels, compared with the hard loss of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bgkernels as bg
from bgkernels.integrations import heads
from bgkernels.integrations.heads import Head, HeadError
from bgkernels.integrations.probe import tap as taps
from bgkernels.integrations.probe.tokens import IGNORE, decoder_inputs, probe_labels, settings

TOLERANCE = 1e-3
"""Relative; the comparison is made in fp32 or wider, whatever the model's dtype."""


@dataclass(frozen=True)
class OwnLoss:
    """What a model makes of labels, beside the hard loss of the tokens that have one.

    Args:
        shifted: the label of a position is the token after it; False: the one at its place.
        extras: factors of other losses, by their names in the model's output.
    """

    shifted: bool = True
    extras: Mapping[str, float] = field(default_factory=dict)

    def aligned(self, labels: Tensor) -> Tensor:
        """``(batch, length)`` labels at the positions that predict them."""
        return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE) if self.shifted else labels


def examine(model: Any, forward: Callable[..., Any], **flags: Any) -> OwnLoss:
    """Compare a model's own loss with the hard loss, in value and gradient, on a few tokens.

    It takes two forwards: one up to the head, on which scale and soft-cap are measured, and one
    with labels, whose loss is followed back to the input of the head.

    Args:
        model: unwrapped; evaluated meanwhile.
        forward: its own, without ours around it.
        **flags: further arguments of the forward, which ask for further losses.

    Raises:
        HeadError: they differ: by another loss, a mask or a factor, or the model does more to its
            logits than scale and soft-cap them.
    """
    tap = taps.on(heads.linear(model))
    tap.curve = None
    with heads.tried(model) as tokens:
        labels = probe_labels(tokens["input_ids"])
        inputs = {**tokens, **flags}
        body = {**inputs, **decoder_inputs(model, labels)}
        _, hidden = heads.until_head(model, forward, body)
        with torch.enable_grad():
            own = _own_loss(model, forward, {**inputs, "labels": labels})
    if own.hidden.shape != hidden.shape or not torch.allclose(
        own.hidden.detach(), hidden.to(own.hidden.dtype), rtol=1e-2, atol=1e-3
    ):
        raise HeadError(
            f"{type(model).__name__} feeds its head other states where it is given labels; its "
            "loss cannot be computed from the hidden states of a forward without them"
        )
    value, tried = own.loss - sum(own.extras.values()), []
    for shifted in (True, False):
        candidate = OwnLoss(shifted, own.factors)
        target = candidate.aligned(labels)
        gradient, ours = heads.with_head(model, partial(_hard_loss, target), own.hidden.detach())
        if _close(own, value, ours, gradient):
            return candidate
        tried.append(ours)
    raise HeadError(_difference(model, own, value, tried))


@dataclass(frozen=True)
class _Own:
    loss: float
    gradient: Tensor
    hidden: Tensor
    factors: dict[str, float]
    extras: dict[str, float]


def extra_losses(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and values of what looks like a loss in a model's output, except the first."""
    for name, x in dict(output).items():
        if name != "loss" and isinstance(x, Tensor) and x.ndim == 0 and x.is_floating_point():
            yield name, x


def _own_loss(model: Any, forward: Callable[..., Any], inputs: Mapping[str, Any]) -> _Own:
    """A model's loss in fp32 or wider, and its gradient at the input of the head."""
    layer, leaves = heads.linear(model), []
    wide = torch.promote_types(layer.weight.dtype, torch.float32)

    def cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves.append(args[0].detach().to(wide).requires_grad_())
        return (args[0].detach(), *args[1:])

    def widened(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.detach().to(wide)
        return nn.functional.linear(leaves[-1], layer.weight.detach().to(wide), bias)

    hooks = [
        layer.register_forward_pre_hook(cut),
        layer.register_forward_hook(widened, prepend=True),
    ]
    try:
        output = forward(**{**inputs, **settings(model)})
    finally:
        for hook in hooks:
            hook.remove()
    loss = getattr(output, "loss", None)
    if loss is None or not loss.requires_grad or loss.ndim:
        raise HeadError(
            f"{type(model).__name__} returns no loss for `labels` that depends on its head; "
            "choose the class of the model that is trained as a language model"
        )
    extras = [(name, x) for name, x in extra_losses(output) if x.requires_grad]
    (gradient, *factors) = torch.autograd.grad(
        loss, [leaves[-1], *(x for _, x in extras)], allow_unused=True
    )
    known = {
        name: (float(factor), float(x.detach()))
        for (name, x), factor in zip(extras, factors, strict=True)
        if factor is not None
    }
    return _Own(
        float(loss.detach()),
        torch.zeros_like(leaves[-1]) if gradient is None else gradient,
        leaves[-1],
        {name: factor for name, (factor, _) in known.items()},
        {name: factor * x for name, (factor, x) in known.items()},
    )


@torch.enable_grad()
def _hard_loss(target: Tensor, hidden: Tensor, head: Head) -> tuple[Tensor, float]:
    """The gradient at the input of the head, and the loss."""
    leaf = hidden.detach().requires_grad_()
    weight = head.weight.detach().to(leaf.dtype)
    bias = None if head.bias is None else head.bias.detach().to(leaf.dtype)
    loss = bg.linear_hybrid_distillation(
        leaf, weight, None, target, linear_bias=bias, routing="hard",
        logit_scale=head.logit_scale, logit_softcap=head.logit_softcap,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, leaf)[0], float(loss.detach())


def _close(own: _Own, value: float, ours: float, gradient: Tensor) -> bool:
    size = float(own.gradient.abs().max())
    error = float((own.gradient - gradient).abs().max())
    return abs(value - ours) <= TOLERANCE * max(abs(value), 1) and error <= TOLERANCE * size


def _difference(model: Any, own: _Own, value: float, tried: list[float]) -> str:
    """What to say of a loss that is another."""
    names = [
        f"config.{name}={x}"
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values()
        for name, x in vars(config).items()
        if isinstance(x, (float, bool)) and x and any(w in name for w in ("loss", "coef"))
    ]
    hint = f" (its configuration has {', '.join(names)})" if names else ""
    return (
        f"{type(model).__name__} computes another loss than the cross-entropy of its logits: on a "
        f"few labelled tokens its own is {value:.4f}, and that of the logits {tried[0]:.4f} with "
        f"labels shifted by one position, {tried[1]:.4f} without{hint}. Switch off what it adds, "
        "or choose another model"
    )
