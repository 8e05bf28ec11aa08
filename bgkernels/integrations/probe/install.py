"""Put a loss around a model's forward, and take it off again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from bgkernels.integrations import heads
from bgkernels.integrations.probe import tap as taps
from bgkernels.integrations.probe.watch import NotDistillingError, Watch, computes_its_own


def own_forward(model: Any) -> Callable[..., Any]:
    """The forward of a model as a function of it, without a loss of ours around it."""
    bound = model.forward
    function = getattr(bound, "__func__", None)
    if function is None:
        return functools.wraps(bound)(lambda self, *args, **kwargs: bound(*args, **kwargs))
    while hasattr(function, "attachment"):
        function = function.__wrapped__
    found: Callable[..., Any] = function
    return found


def watches(model: Any) -> Iterator[Watch]:
    """Who watches a model, whatever was put around its forward since."""
    for hook in _watched(model)._forward_hooks.values():
        if isinstance(getattr(hook, "__self__", None), Watch):
            yield hook.__self__


def install(model: Any, attachment: Any, original: Callable[..., Any]) -> Callable[[], None]:
    """Put ``attachment.forward`` where a model is called with labels.

    Args:
        model: unwrapped.
        attachment: has ``forward(model, inputs)`` and ``active``.
        original: what is called else.

    Returns:
        What undoes it.
    """
    before = model.__dict__.get("forward")
    bound = MethodType(original, model)
    names = tuple(inspect.signature(model.forward).parameters)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labelled = kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None
        if args and not labelled:
            labelled = dict(zip(names, args, strict=False)).get("labels") is not None
        if not (attachment.active and labelled):
            return original(self, *args, **kwargs)
        if kwargs.get("fused_lm_head"):
            raise NotDistillingError(computes_its_own())
        return attachment.forward(self, dict(zip(names, args, strict=False)) | kwargs)

    forward.attachment = attachment  # type: ignore[attr-defined]
    forward.__signature__ = _with_self(inspect.signature(bound))  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)  # a method, so that a copy of the model has its own
    watch = _watched(model).register_forward_hook(Watch(attachment).after)
    head = heads.linear(model)

    def restore() -> None:
        if getattr(model.__dict__.get("forward"), "__func__", None) is forward:
            del model.forward
            if before is not None and not hasattr(before, "attachment"):
                model.forward = before
        watch.remove()
        taps.on(head).remove(head)

    return restore


def _watched(model: Any) -> Any:
    """What runs before the head, whoever calls it; of models that hide it, the model."""
    return model.base_model


def _with_self(signature: inspect.Signature) -> inspect.Signature:
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return signature.replace(parameters=[first, *signature.parameters.values()])
