"""The checks of teachers; see :mod:`bgkernels.loss.checks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from bgkernels.loss import checks
from bgkernels.streaming.sources import wrong_weights
from bgkernels.teachers import (
    LinearTeacher,
    LogitsTeacher,
    MixtureTeacher,
    Teacher,
    TopKTeacher,
    members,
)

TENSORS = {
    LinearTeacher: ("hidden", "weight", "bias"),
    LogitsTeacher: ("logits",),
    TopKTeacher: ("indices", "logprobs", "entropy", "power_sum"),
}
"""Names of each teacher's tensors, in the order of ``tensors``."""


def teacher(
    value: object,
    reference: Tensor,
    leading: tuple[int, ...],
    *,
    mixed: bool,
    name: str = "teacher",
) -> Teacher:
    """A teacher whose rows fit ``leading``, on the device of ``reference``, without gradient."""
    kinds = [kind.__name__ for kind in get_args(Teacher)]
    if not isinstance(value, Teacher):
        hint = "; wrap logits in LogitsTeacher(logits)" if isinstance(value, Tensor) else ""
        raise TypeError(
            f"`{name}` must be a {', '.join(kinds[:-1])} or {kinds[-1]}; "
            f"got {type(value).__name__}{hint}"
        )
    if torch.compiler.is_compiling() and isinstance(value, TopKTeacher | MixtureTeacher):
        raise NotImplementedError(
            f"torch.compile does not carry a {type(value).__name__}; "
            "call the loss outside of it, or under torch.compiler.disable"
        )
    if isinstance(value, MixtureTeacher):
        return _mixture(value, reference, leading, mixed=mixed)
    names = TENSORS[type(value)]
    given = {n: x for n, x in zip(names, value.tensors, strict=True) if x is not None}
    for n, x in given.items():
        checks.tensor(f"{name}.{n}", x, floating=n != "indices")
        if x.requires_grad:
            raise ValueError(
                f"`{name}.{n}` requires grad, but a teacher gets none; pass `{n}.detach()`"
            )
    checks.same_device(reference, **{f"{name}.{n}": x for n, x in given.items()})
    if isinstance(value, LinearTeacher):
        checks.linear(name, value.hidden, value.weight, value.bias, mixed=mixed)
        checks.cap(f"{name}.", value.logit_scale, value.logit_softcap)
    first = given[names[0]]
    if tuple(first.shape[:-1]) != leading:
        raise ValueError(
            f"`{name}.{names[0]}` must have the input's leading shape {leading}; "
            f"got {tuple(first.shape)}"
        )
    if isinstance(value, TopKTeacher):
        _topk_shapes(value, leading)
    return value


def _mixture(
    value: MixtureTeacher, reference: Tensor, leading: tuple[int, ...], *, mixed: bool
) -> MixtureTeacher:
    checks.choice("teacher.kind", value.kind, ("sum", "distribution"))
    if not value.teachers:
        raise ValueError("`teacher.teachers` must hold a teacher at least; got none")
    for i, one in enumerate(value.teachers):
        name = f"teacher.teachers[{i}]"
        if isinstance(one, MixtureTeacher):
            raise TypeError(f"`{name}` must not be a MixtureTeacher; give its teachers instead")
        if isinstance(one, TopKTeacher) and value.kind == "distribution":
            raise NotImplementedError(
                f"`{name}` is a TopKTeacher, whose tail has no columns to mix; use kind='sum'"
            )
        teacher(one, reference, leading, mixed=mixed, name=name)
    if not callable(value.weights):
        _mixture_weights(value, reference, leading)
    return value


def _mixture_weights(value: MixtureTeacher, reference: Tensor, leading: tuple[int, ...]) -> None:
    weights, count, name = value.weights, len(value.teachers), "teacher.weights"
    if isinstance(weights, Tensor):
        given = checks.tensor(name, weights).detach()
        checks.shape(name, given, (*leading, count), "(..., teachers)")
        checks.same_device(reference, **{name: given})
        if given.device.type != "cpu":
            return
    elif isinstance(weights, Sequence) and len(weights) == count:
        given = torch.tensor([checks.number(name, w, low=0) for w in weights])
    else:
        raise ValueError(f"`{name}` must be {count} numbers, a tensor or a function; got {weights}")
    normalised = value.kind == "distribution"
    wrong = wrong_weights(given.double(), normalised=normalised)
    if wrong.any():
        rule = " and add up to 1 for kind='distribution'" if normalised else ""
        raise ValueError(
            f"`{name}` must be finite, not negative{rule}; got {given[wrong].flatten().tolist()}"
        )


def comparable(
    value: Teacher | None, compared: int, temperature: float, target: Tensor | str, ignore: int
) -> None:
    """A teacher can be compared on so many columns, at that temperature, and give that label."""
    valid = target != ignore if isinstance(target, Tensor) else None
    for one in members(value):
        if isinstance(one, TopKTeacher):
            _topk(one, compared, temperature, valid)
    if not isinstance(target, str):
        return
    if isinstance(value, MixtureTeacher) and value.kind == "sum":
        raise ValueError(
            f"`target` cannot be {target!r} for a MixtureTeacher with kind='sum', which is no "
            "distribution; use kind='distribution', or pass labels"
        )
    if target != "teacher_sample":
        return
    if isinstance(value, MixtureTeacher) and temperature != 1:
        raise ValueError(
            "`target` cannot be 'teacher_sample' for a MixtureTeacher at another temperature than "
            f"1, since it mixes there; got temperature={temperature}: pass labels"
        )
    if isinstance(value, TopKTeacher) and value.tail == "bucket":
        raise ValueError(
            "`target` cannot be 'teacher_sample' for a TopKTeacher with tail='bucket', which may "
            "draw an unknown column; pass a token that was drawn when the teacher ran"
        )


def logit_tensors(value: Teacher | None) -> list[Tensor]:
    """Of each dense teacher the tensor whose dtype its logits have."""
    first = [t.tensors[0] for t in members(value) if not isinstance(t, TopKTeacher)]
    return [x for x in first if x is not None]


def _topk_shapes(value: TopKTeacher, leading: tuple[int, ...]) -> None:
    if value.indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"`teacher.indices` must be int64 or int32; got {value.indices.dtype}")
    checks.shape(
        "teacher.logprobs", value.logprobs, tuple(value.indices.shape), "that of the indices"
    )
    for name, x in (("entropy", value.entropy), ("power_sum", value.power_sum)):
        if x is not None:
            checks.shape(f"teacher.{name}", x, leading, "the input's leading shape")
    checks.choice("teacher.tail", value.tail, ("bucket", "renormalize", "drop"))
    checks.number("teacher.gamma", value.gamma, low=0, open_low=True)
    if value.vocab is not None:
        checks.integer("teacher.vocab", value.vocab, low=1)


def _topk(value: TopKTeacher, compared: int, temperature: float, valid: Tensor | None) -> None:
    """What a top-k teacher holds makes sense among ``compared`` columns.

    On a CPU the numbers are looked at, where ``valid (...)``; None: everywhere.
    """
    if not 1 <= value.indices.shape[-1] <= compared:
        raise ValueError(
            f"`teacher.indices` must keep from 1 to {compared} columns, which are compared; "
            f"got {value.indices.shape[-1]}"
        )
    if temperature != 1 and value.tail == "bucket":
        raise ValueError(
            f"`temperature` must be 1 for a TopKTeacher with tail='bucket'; got {temperature}: "
            "what the tail weighs at another one is not known; use tail='renormalize' or 'drop'"
        )
    captured = [n for n in ("entropy", "power_sum") if getattr(value, n) is not None]
    if temperature != 1 and captured:
        raise ValueError(
            f"`teacher.{captured[0]}` is of temperature 1, and `temperature` is {temperature}; "
            "leave it out, and routing sees the kept columns"
        )
    if value.indices.device.type != "cpu":
        return
    rows = slice(None) if valid is None else valid
    ids, logp = value.indices[rows].long(), value.logprobs[rows].double()
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < compared:
        raise ValueError(
            f"`teacher.indices` must lie in [0, {compared}), or be -1 for padding; "
            f"got {int(ids.min())} to {int(ids.max())}"
        )
    ordered = ids.sort(-1).values
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        raise ValueError("`teacher.indices` must name a column once a row; got one twice")
    mass = logp.exp().where(ids >= 0, 0.0).sum(-1)
    most = 1 + 1e-3 + 8 * torch.finfo(value.logprobs.dtype).eps
    if (mass > most).any():
        raise ValueError(
            f"`teacher.logprobs` must be log-probabilities, which add up to 1 at most; "
            f"got {float(mass.max()):.4g} in a row; use log_softmax over the whole vocabulary first"
        )
