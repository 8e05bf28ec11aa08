"""Give a causal language model the hybrid distillation loss, in whatever loop trains it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.integrations import heads
from bgkernels.integrations.measures import Measures
from bgkernels.integrations.teachers import select, source

IGNORE = -100
UNUSED = ("return_dict", "use_cache", "logits_to_keep", "skip_logits")
"""Arguments of a forward that mean nothing where there are no logits."""


def attach(student: Any, teacher: Any, *, target: str = "labels", **options: Any) -> Attachment:
    """From here on, ``student(input_ids, labels=labels).loss`` is the hybrid distillation loss.

    The student's own parameters, name and checkpoints do not change; a call without labels does
    what it did before, so that generation works. With labels there are no logits: the body runs,
    and the head is multiplied for the positions that have a label, a tile at a time. What wraps
    the model (``Trainer``, DDP, FSDP, PEFT, ``torch.compile``) sees an ordinary forward.

    Args:
        student: a ``transformers`` causal language model, or a PEFT model of one, before it is
            wrapped for training.
        teacher: a causal language model, a path to load one from, or a
            :class:`~bgkernels.integrations.teachers.TeacherSource`.
        target: the hard label: ``"labels"`` of the batch, or, at the positions which have one,
            ``"teacher_argmax"`` or ``"teacher_sample"``.
        **options: of :class:`bgkernels.LinearHybridDistillationLoss`; scale and soft-cap are the
            model's own, and the reduction is the mean.

    Returns:
        An :class:`Attachment`, which can be removed.

    Raises:
        HeadError: see :func:`bgkernels.integrations.heads.read`.
        TypeError, ValueError: an option that is unknown or out of range, by name.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=32)
        >>> config = LlamaConfig(num_hidden_layers=1, **size)
        >>> student, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
        >>> attachment = attach(student, teacher, temperature=2.0)
        >>> tokens = torch.arange(6)[None]
        >>> student(input_ids=tokens, labels=tokens).loss.backward()
        >>> attachment.remove()
    """
    model = heads.causal_lm(student)
    if teacher is student or teacher is model:
        raise ValueError("`teacher` is the student itself; pass another model, or a copy")
    heads.verify(model)
    attachment = Attachment(model, teacher, target, options)
    bound = model.forward
    original = getattr(bound, "__func__", lambda self, *args, **kwargs: bound(*args, **kwargs))

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labelled = kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None
        if not (attachment.active and labelled):
            return original(self, *args, **kwargs)
        names = attachment.arguments
        return attachment.forward(self, dict(zip(names, args, strict=False)) | kwargs)

    forward.__signature__ = _with_self(inspect.signature(bound))  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)  # a method, so that a copy of the model has its own
    return attachment


class Attachment:
    """The loss that :func:`attach` gave to a model.

    Attributes:
        teacher: the source of soft labels.
        loss: the loss module.
        measures: what was seen, by whether the student was training.
        active: whether a call with labels computes this loss.
    """

    def __init__(self, model: Any, teacher: Any, target: str, options: Mapping[str, Any]) -> None:
        if target not in ("labels", "teacher_argmax", "teacher_sample"):
            raise ValueError(
                f"`target` must be 'labels', 'teacher_argmax' or 'teacher_sample'; got {target!r}"
            )
        fixed = {"reduction", "ignore_index", "logit_scale", "logit_softcap", "return_stats"}
        if fixed & options.keys():
            raise TypeError(f"{', '.join(sorted(fixed & options.keys()))}: set by the model")
        head = heads.read(model)
        self.loss = bg.LinearHybridDistillationLoss(
            logit_scale=head.logit_scale,
            logit_softcap=head.logit_softcap,
            return_stats=True,
            **options,
        )
        self.target, self.active = target, True
        self.teacher = source(teacher)
        self.arguments = tuple(inspect.signature(model.forward).parameters)
        parts = (
            options.get("divergence", "forward_kl"),
            options.get("routing", "entropy"),
            options.get("temperature", 1.0),
        )
        self.measures = {training: Measures(*parts) for training in (True, False)}
        self.policy = self.measures[True].policy
        self.keeps_layout = self.policy.hard_term is not None  # it couples neighbouring positions
        if self.keeps_layout and target != "labels":
            raise ValueError(f"routing={self.policy.name!r} needs target='labels'; got {target!r}")

    def remove(self) -> None:
        """Make the model compute its own loss again."""
        self.active = False

    def forward(self, model: Any, inputs: dict[str, Any]) -> Any:
        """The loss of a batch, as a ``transformers`` output.

        Args:
            model: the unwrapped student.
            inputs: what its forward was given: ``labels`` (or ``shift_labels``, aligned with the
                inputs); ``num_items_in_batch``; ``loss_rows``, the positions that have a label
                where it is known without looking at the device; and the inputs of the body.
        """
        from transformers.modeling_outputs import CausalLMOutputWithPast

        for name in UNUSED:
            inputs.pop(name, None)
        target = _aligned(inputs.pop("labels", None), inputs.pop("shift_labels", None))
        rows, num_items = inputs.pop("loss_rows", None), inputs.pop("num_items_in_batch", None)
        if self.keeps_layout:
            rows = None
        elif rows is None:
            rows = (target.flatten() != IGNORE).nonzero().squeeze(1)
        columns = getattr(self.teacher, "columns", ())
        body = {k: v for k, v in inputs.items() if k not in columns}
        hidden = heads.hidden_states(model, **body)
        head = heads.read(model)
        device = head.weight.device
        loss, stats = self.loss(
            select(hidden, rows).to(device),
            head.weight,
            self.teacher(inputs, rows) if self._reads_teacher else None,
            select(target, rows).to(device) if self.target == "labels" else self.target,
            head.bias,
            num_items=_at_least_one(num_items),
        )
        self.measures[model.training].add(stats)
        return CausalLMOutputWithPast(loss=loss)

    @property
    def _reads_teacher(self) -> bool:
        return self.policy.uses_teacher or self.target != "labels"


def _aligned(labels: Tensor | None, shifted: Tensor | None) -> Tensor:
    """``(batch, length)`` labels of the next token, at the position that predicts it."""
    if shifted is not None:
        return shifted
    assert labels is not None
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE)


def _at_least_one(num_items: Any) -> Any:
    """A divisor: a step may have no valid token at all."""
    return (
        num_items.clamp(min=1) if isinstance(num_items, Tensor) else num_items and max(num_items, 1)
    )


def _with_self(signature: inspect.Signature) -> inspect.Signature:
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return signature.replace(parameters=[own, *signature.parameters.values()])
