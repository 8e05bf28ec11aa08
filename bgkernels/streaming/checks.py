"""Each check here raises a message that names the argument, what was expected, and what came."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch import distributed as dist

LABEL_WORDS = ("teacher_argmax", "teacher_sample")


def tensor(name: str, value: object, *, floating: bool = True) -> Tensor:
    """Return a value that is a plain, dense tensor, floating point unless said otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor; got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise NotImplementedError(
            f"`{name}` is a DTensor; pass `{name}.full_tensor()`, or `{name}.to_local()`"
        )
    here(name, value)
    if value.layout is not torch.strided:
        raise TypeError(f"`{name}` must be a dense tensor; got layout {value.layout}")
    if floating and not value.is_floating_point():
        raise TypeError(f"`{name}` must be floating point; got {value.dtype}")
    return value


def here(name: str, value: Tensor) -> None:
    """Not what is left of a parameter that is kept in parts; detached, it has no ``ds_id``."""
    parts = hasattr(value, "ds_id") or (
        value.ndim == 1 and name.endswith(("linear_weight", ".weight"))
    )
    if parts and not value.numel():
        raise ValueError(
            f"`{name}` is empty here: its elements are on other processes (DeepSpeed ZeRO-3, "
            "FSDP). Let bgkernels.integrations.causal_lm.attach(model, teacher) gather it, or do "
            "so in the module that calls the loss: "
            "deepspeed.zero.register_external_parameter(module, weight), for a teacher "
            "deepspeed.zero.GatheredParameters(weight)"
        )


def legible(x: Tensor) -> bool:
    """Tell whether looking at values neither waits for a device nor breaks a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def wants_gradient(x: Tensor | None) -> bool:
    """Tell whether autograd will ask for the gradient of a tensor."""
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def instance(name: str, value: object, kind: type) -> None:
    """Check that a value is an object of a class."""
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be a {kind.__name__}; got {type(value).__name__}")


def no_transform() -> None:
    """Check that no transform of ``torch.func`` is active: it does not see into the kernels."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "torch.func transforms (grad, vmap, jvp, ...) are not supported; take the gradient "
            "with loss.backward() or torch.autograd.grad, and put further dimensions in front: "
            "leading dimensions are free"
        )


def shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Check that a tensor has the ``expected`` shape, which ``meaning`` spells out."""
    if tuple(value.shape) != expected:
        raise ValueError(f"`{name}` must be {meaning} = {expected}; got {tuple(value.shape)}")


def same_device(reference: Tensor, **others: Tensor | None) -> None:
    """Check that all tensors are on the device of ``reference`` (the input)."""
    for name, x in others.items():
        if x is not None and x.device != reference.device:
            raise ValueError(
                f"`{name}` must be on the input's device {reference.device}; got {x.device}"
            )


def number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> float:
    """Return a value that is a finite number in ``[low, high]``, or ``(low, high]``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number; got {type(value).__name__}")
    inside = low < value <= high if open_low else low <= value <= high
    if not (inside and math.isfinite(value)):
        bracket = "(" if open_low else "["
        raise ValueError(f"`{name}` must be finite and lie in {bracket}{low}, {high}]; got {value}")
    return float(value)


def integer(name: str, value: object, *, low: float = -math.inf) -> None:
    """Check that a value is a whole number, at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer; got {type(value).__name__} {value!r}")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}; got {value}")


def choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    """Return a value that is one of a few words."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    return str(value)


def process_group(name: str, value: object) -> None:
    """Check that a value is None, or a process group that has this process as a member."""
    if value is None:
        return
    if not isinstance(value, dist.ProcessGroup) or dist.get_rank(value) < 0:
        raise TypeError(
            f"`{name}` must be a torch.distributed.ProcessGroup that this process belongs to, or "
            f"None (from a mesh: `mesh.get_group(name)`); got {value!r}"
        )


def linear(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, mixed: bool) -> None:
    """Check that ``hidden (..., D)`` fits ``weight (V, D)`` and ``bias (V,)``."""
    if hidden.ndim < 1 or weight.ndim != 2:
        raise ValueError(
            f"{name}: hidden states must be (..., hidden) and the weight (vocab, hidden); "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: the weight must be (vocab, hidden) = ({weight.shape[0]}, {hidden.shape[-1]}) "
            f"to fit hidden states {tuple(hidden.shape)}; got {tuple(weight.shape)}"
        )
    if bias is not None:
        shape(f"{name} bias", bias, (weight.shape[0],), "(vocab,)")
    dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
    if len(dtypes) > 1 and not mixed:
        got = ", ".join(sorted(map(str, dtypes)))
        raise TypeError(
            f"{name}: hidden states, weight and bias must share a dtype; got {got}. "
            "Convert them, or call under torch.autocast"
        )


def cap(owner: str, scale: object, softcap: object) -> None:
    """Check a logit scale, and a soft-cap that is positive or None."""
    number(f"{owner}logit_scale", scale)
    if softcap is not None:
        number(f"{owner}logit_softcap", softcap, low=0, open_low=True)


def vocab_size(value: int, limit: int) -> None:
    """Check that all models have so many columns."""
    if value > limit:
        raise ValueError(
            f"`vocab_size` must lie in [1, {limit}], the columns that all models have; got {value}"
        )


def target(
    value: object, reference: Tensor, leading: tuple[int, ...], columns: int, ignore_index: int
) -> Tensor | str:
    """Return a value that is integer labels, or one of the words that name the teacher's label.

    On a CPU an out-of-range label raises. Elsewhere looking would wait for the device, and the
    loss of such a row becomes NaN.
    """
    if isinstance(value, str):
        return choice("target", value, LABEL_WORDS)
    x = tensor("target", value, floating=False)
    if x.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(
            f"`target` must hold integer labels (int64), or be one of {LABEL_WORDS}; got {x.dtype}"
        )
    shape("target", x, leading, "the input's leading shape")
    same_device(reference, target=x)
    if legible(x):
        labels(x, columns, ignore_index)
    return x


def labels(target: Tensor, columns: int, ignore_index: int) -> None:
    """Check that labels are columns, or ignored."""
    wrong = ((target < 0) | (target >= columns)) & (target != ignore_index)
    if wrong.any():
        raise ValueError(
            f"`target` labels must lie in [0, {columns}) or be ignore_index={ignore_index}; "
            f"got {int(target[wrong][0])} ({int(wrong.sum())} of {target.numel()} out of range)"
        )
