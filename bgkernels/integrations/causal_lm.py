"""Give a causal language model the hybrid distillation loss, in whatever loop trains it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.integrations import heads, zero3
from bgkernels.integrations.heads import HeadError
from bgkernels.integrations.measures import Measures
from bgkernels.integrations.probe.install import install, own_forward, watches
from bgkernels.integrations.probe.student import Student, completed
from bgkernels.integrations.probe.tokens import IGNORE, embeddings
from bgkernels.integrations.teachers import ModelTeacher, select, source
from bgkernels.integrations.translated import TranslatedTeacher

UNUSED = ("return_dict", "use_cache", "logits_to_keep", "skip_logits")
"""Arguments of a forward that mean nothing where there are no logits, or are set here."""


def attach(
    student: Any,
    teacher: Any,
    *,
    target: str = "labels",
    tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    **options: Any,
) -> Attachment:
    """Make ``student(input_ids, labels=labels).loss`` the hybrid distillation loss from now on.

    The student's parameters, names and checkpoints do not change. A call without labels works as
    before, and so does generation. A call with labels returns no logits: the body runs, and the
    head is multiplied only for positions with a label, one tile at a time. Wrappers of the model
    (``Trainer``, DDP, FSDP, PEFT, ``torch.compile``) see an ordinary forward.

    Args:
        student: a ``transformers`` causal language model, or a PEFT model of one, before it is
            wrapped for training.
        teacher: a causal language model, a path to load one from, or a
            :class:`~bgkernels.integrations.teachers.TeacherSource`.
        target: the hard label: ``"labels"`` of the batch, or, at the positions which have one,
            ``"teacher_argmax"`` or ``"teacher_sample"``.
        tokenizer, teacher_tokenizer: the tokenizers of student and teacher, if they differ; see
            :class:`~bgkernels.integrations.translated.TranslatedTeacher`.
        **options: options of :class:`bgkernels.LinearHybridDistillationLoss`. Scale and soft-cap
            are measured on the model, and the reduction is the mean.

    Returns:
        An :class:`Attachment`, which can be removed.

    Raises:
        HeadError: see :func:`bgkernels.integrations.heads.read`.
        TypeError, ValueError: an option is unknown or out of range (the message names it), or only
            one of the two tokenizers is passed.
        VocabularyError: the tokenizers cannot be matched.

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
    inner = getattr(teacher, "get_base_model", lambda: teacher)()
    if inner is model or teacher is student:
        raise ValueError("`teacher` is the student itself; pass another model, or a copy")
    for watch in [*watches(model)]:
        watch.attachment.remove(model)
    if (tokenizer is None) != (teacher_tokenizer is None):
        raise TypeError(
            "pass both `tokenizer` and `teacher_tokenizer`, of student and teacher, or neither"
        )
    if tokenizer is not None:
        teacher = TranslatedTeacher(teacher, tokenizer, teacher_tokenizer)
    return Attachment(model, teacher, target, options)


class Attachment:
    """The loss that :func:`attach` gave to a model.

    Attributes:
        teacher: the source of soft labels.
        loss: the loss module.
        measures: averages of the parts of the loss: True → in training, False → in evaluation.
        active: whether a call with labels computes this loss.
        asked: whether the loss was computed since it was attached.
    """

    def __init__(self, model: Any, teacher: Any, target: str, options: Mapping[str, Any]) -> None:
        if target not in ("labels", "teacher_argmax", "teacher_sample"):
            raise ValueError(
                f"`target` must be 'labels', 'teacher_argmax' or 'teacher_sample'; got {target!r}"
            )
        fixed = {"reduction", "ignore_index", "logit_scale", "logit_softcap", "return_stats"}
        if fixed & options.keys():
            names = ", ".join(f"`{name}`" for name in sorted(fixed & options.keys()))
            raise TypeError(f"{names} cannot be passed: each is set by the model or by attach()")
        self.options = options
        self._measured: tuple[float, float | None] = (1.0, None)
        self.loss = bg.LinearHybridDistillationLoss(return_stats=True, **options)
        self.target, self.active, self.asked = target, True, False
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
        original = own_forward(model)
        self.student = Student(model, original)
        self.teacher = source(teacher)
        self._check_kinds(model)
        self._model, self._restore = weakref.ref(model), install(model, self, original)

    def remove(self, model: Any = None) -> None:
        """Make the model compute its own loss again, by its own forward.

        Args:
            model: remove the loss only if it is attached to this model; None: in any case.
        """
        if self.active and model in (None, self._model()):
            self.active = False
            self._restore()

    def ask(self, inputs: Any) -> None:
        """Let a teacher that can work ahead, such as a served one, start on a later batch.

        Nothing happens for other teachers, or for a batch without labels, such as prompts that the
        student has yet to continue.
        """
        if not isinstance(inputs, Mapping) or not hasattr(self.teacher, "ask"):
            return
        labels, target = inputs.get("labels"), inputs.get("shift_labels")
        if self._reads_teacher and (labels is not None or target is not None):
            rows = self._aligned(labels, target, inputs.get("loss_rows"))[1]
            self.teacher.ask(inputs, rows)

    def forward(self, model: Any, inputs: dict[str, Any]) -> Any:
        """The loss of a batch, as a ``transformers`` output.

        Args:
            model: the unwrapped student.
            inputs: what its forward was given: ``labels`` (or ``shift_labels``, aligned with the
                inputs); ``num_items_in_batch``; ``loss_rows``, the positions that have a label
                where it is known without looking at the device; and the inputs of the body.
        """
        if not self.asked and torch.is_grad_enabled():
            self.asked = True
        as_tuple = inputs.get("return_dict") is False
        inputs = {k: v for k, v in inputs.items() if k not in UNUSED}
        target, rows, num_items, extras = (
            inputs.pop(name, default)
            for name, default in (
                ("shift_labels", None), ("loss_rows", None),
                ("num_items_in_batch", None), ("extra_losses", True),
            )
        )  # fmt: skip
        labels = inputs.pop("labels", None)
        inputs = completed(model, inputs, labels)
        columns = getattr(self.teacher, "columns", ())
        body = {k: v for k, v in inputs.items() if k not in columns}
        output, hidden = self.student.run(model, body)
        target, rows = self._aligned(labels, target, rows)
        if target.shape != hidden.shape[:2]:
            raise ValueError(
                f"`labels` must have the shape of the inputs, {tuple(hidden.shape[:2])}; "
                f"got {tuple(target.shape)}"
            )
        teacher = self.teacher(inputs, rows) if self._reads_teacher else None

        def loss_of(states: Tensor, head: heads.Head) -> tuple[Tensor, bg.RowStats]:
            device = head.weight.device
            label = select(target, rows).to(device) if self.target == "labels" else self.target
            made: tuple[Tensor, bg.RowStats] = self._loss_of(head)(
                states.to(device), head.weight, teacher, label, head.bias,
                num_items=_at_least_one(num_items),
            )  # fmt: skip
            return made

        loss, stats = heads.with_head(model, loss_of, select(hidden, rows))
        self.measures[model.training].add(stats)
        if extras:
            own = self.student.own.extras
            loss = loss + sum(f * output[n].to(loss) for n, f in own.items() if n in output)
        rest = {k: v for k, v in dict(output).items() if k not in ("loss", "logits")}
        made = type(output)(loss=loss, **rest)
        return made.to_tuple() if as_tuple else made

    def _aligned(
        self, labels: Tensor | None, target: Tensor | None, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Labels at the positions that predict them, and which of these have one."""
        own = self.student.own
        if target is None:
            assert labels is not None
            target = own.aligned(labels)
            rows = rows if own.shifted else None  # collators shift
        if self.keeps_layout:
            return target, None
        if rows is None:
            rows = (target.flatten() != IGNORE).nonzero().squeeze(1)
        return target, rows

    def _loss_of(self, head: heads.Head) -> bg.LinearHybridDistillationLoss:
        """The loss module with the head's scale and soft-cap."""
        measured = (head.logit_scale, head.logit_softcap)
        if measured != self._measured:
            self._measured = measured
            scale, cap = measured
            self.loss = bg.LinearHybridDistillationLoss(
                return_stats=True, logit_scale=scale, logit_softcap=cap, **self.options
            )
        return self.loss

    def _check_kinds(self, model: Any) -> None:
        """Refuse a pair that reads different sequences."""
        if not isinstance(self.teacher, ModelTeacher):
            return
        teacher = heads.causal_lm(self.teacher.model)
        if isinstance(self.teacher, TranslatedTeacher):
            self._check_translated(model)
        kinds = [getattr(m.config, "is_encoder_decoder", False) for m in (model, teacher)]
        if kinds[0] != kinds[1]:
            names = {True: "an encoder–decoder", False: "a decoder"}
            raise HeadError(
                f"the student {type(model).__name__} is {names[kinds[0]]} and the teacher "
                f"{type(teacher).__name__} {names[kinds[1]]}, so their positions are of different "
                "tokens; choose two of one kind"
            )
        table, known = embeddings(model), self.teacher.reader.tokens
        self.teacher.reader.waits = (
            table is not None and known is not None and known < zero3.shape(table)[0]
        )

    def _check_translated(self, model: Any) -> None:
        """Refuse what two tokenizers leave undefined."""
        if getattr(model.config, "is_encoder_decoder", False):
            raise HeadError("two tokenizers are for decoders; this student is an encoder–decoder")
        if self.target != "labels":
            raise ValueError(
                f"`target` must be 'labels' where the teacher has another tokenizer, whose token "
                f"the student may not have; got {self.target!r}"
            )
        assert isinstance(self.teacher, TranslatedTeacher)
        self.teacher.match.check_heads(student=heads.linear(model).out_features)

    @property
    def _reads_teacher(self) -> bool:
        return self.policy.uses_teacher or self.target != "labels"


def _at_least_one(num_items: Any) -> Any:
    """A divisor: a step may have no valid token at all."""
    return (
        num_items.clamp(min=1) if isinstance(num_items, Tensor) else num_items and max(num_items, 1)
    )
