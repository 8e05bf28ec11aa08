"""Where a trainer's soft labels come from: a model, a path, or any callable."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, Protocol

import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.integrations import heads
from bgkernels.integrations.heads import HeadError
from bgkernels.integrations.probe.reading import Reader
from bgkernels.integrations.zero3 import partitioned

Teacher = (
    bg.LinearTeacher | bg.LogitsTeacher | bg.TopKTeacher | bg.MatchedTeacher | bg.MixtureTeacher
)


class TeacherSource(Protocol):
    """Makes the teacher of a batch.

    A source that reads columns of the batch which no model knows (stored labels) lists their names
    in an attribute ``columns``. One that takes its time has a method ``ask``, which is called with
    the arguments of a later call, and an attribute ``ahead``: how many batches before.
    """

    def __call__(self, inputs: Mapping[str, Any], rows: Tensor | None) -> Teacher:
        """The teacher of the positions ``rows`` of the flattened batch; of all of them for None.

        Args:
            inputs: the batch as the student's forward gets it, without labels.
            rows: ``(n,)`` int64 positions in ``batch·length``, or None for ``(batch, length)``.
        """


class ModelTeacher:
    """A causal language model as teacher: evaluated without gradient, its logits never whole.

    Args:
        model: a ``transformers`` model, wrapped by FSDP or DeepSpeed or not, or a path to load one
            from.

    Raises:
        HeadError: see :func:`bgkernels.integrations.heads.verify`; or it cannot be loaded.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=32)
        >>> teacher = ModelTeacher(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **size)))
        >>> teacher({"input_ids": torch.arange(6)[None]}, torch.tensor([2, 3])).hidden.shape
        torch.Size([2, 8])
    """

    columns: tuple[str, ...] = ()

    def __init__(self, model: Any) -> None:
        if isinstance(model, (str, PathLike)):
            model = _load(model)
        heads.verify(model)
        self.model = model
        self.reader = Reader(heads.causal_lm(model))

    def to(self, device: torch.device) -> None:
        """Move the model, unless it is sharded or placed already."""
        placed = hasattr(self.model, "hf_device_map")
        parts = any(hasattr(p, "device_mesh") or partitioned(p) for p in self.model.parameters())
        if not placed and not parts:
            self.model.to(device)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], rows: Tensor | None) -> bg.LinearTeacher:
        """Hidden states at ``rows``, and the head."""
        self.model.eval()
        hidden = heads.through(self.model, heads.hidden_states, **self.reader(inputs))
        # Read after the forward, which may free what it gathers.
        _, head = heads.with_head(self.model, _detached, hidden)
        return bg.LinearTeacher(
            select(hidden, rows).to(head.weight.device),
            head.weight, head.bias, head.logit_scale, head.logit_softcap,
        )  # fmt: skip


def _detached(hidden: Tensor, head: heads.Head) -> tuple[Tensor, heads.Head]:
    return hidden, head.detached(hidden.dtype)


def _load(name: str | PathLike[str]) -> Any:
    """A causal language model, by its path or name.

    Raises:
        HeadError: it cannot be loaded, or needs a package that is not installed.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except ImportError as error:  # of quantised weights
        reason = " ".join(str(error).split())
        raise HeadError(
            f"`teacher` {str(name)!r} needs a package that is not installed: {reason}"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise HeadError(
            f"`teacher` {str(name)!r} could not be loaded: {reason}. Pass the path or name of a "
            "causal language model, or a model that is loaded"
        ) from error


def select(x: Tensor, rows: Tensor | None) -> Tensor:
    """``(n, ...)`` entries of ``(batch, length, ...)``; all of it, in its shape, for None."""
    return x if rows is None else x.flatten(0, 1)[rows]


def source(teacher: Any) -> TeacherSource:
    """What ``teacher`` (a model, a path, a source) gives labels by."""
    if isinstance(teacher, (str, PathLike)) or hasattr(teacher, "parameters"):
        return ModelTeacher(teacher)
    if not callable(teacher):
        raise TypeError(
            "`teacher` must be a causal language model, a path, or a callable "
            f"(inputs, rows) -> bg.LinearTeacher; got {type(teacher).__name__}"
        )
    made: TeacherSource = teacher
    return made
