"""A loss that nobody asks for: found in the first backward, and said aloud."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class NotDistillingError(RuntimeError):
    """A model with an attached loss is trained by another one; says how to ask for it."""


REMEDY = (
    "For TRL's SFTTrainer use bgkernels.integrations.trl.HybridSFTTrainer, for a Trainer with a "
    "loss of its own bgkernels.integrations.transformers.HybridDistillationTrainer; in a loop of "
    "your own call model(input_ids=..., labels=...).loss; to train by another loss on purpose, "
    "call attachment.remove() first"
)


class Watch:
    """A hook on what runs before the head: while nobody asked for the loss, gradients are refused.

    Args:
        attachment: tells whether it is ``active``, and whether it was ``asked``.
    """

    def __init__(self, attachment: Any) -> None:
        self.attachment = attachment

    def __deepcopy__(self, memo: Any) -> Watch:
        return self  # a copy of the model asks the same attachment

    def after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Look at the gradients of the last hidden states."""
        if self.idle or not (module.training and torch.is_grad_enabled()):
            return
        hidden = output if isinstance(output, Tensor) else output[0]
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(self.refuse)

    @property
    def idle(self) -> bool:
        """Whether all is well, or nothing is wanted."""
        return self.attachment.asked or not self.attachment.active

    def refuse(self, gradient: Tensor) -> None:
        """Stop a backward that the attached loss has no part in.

        Raises:
            NotDistillingError: it was never computed.
        """
        if not self.idle:
            raise NotDistillingError(never_asked())


def computes_its_own() -> str:
    """The message where TRL's patched forward is called for its own loss."""
    return (
        "the model has a loss by attach(), and its trainer asks it for another one "
        f"(fused_lm_head=True of TRL): the teacher would not be used. {REMEDY}"
    )


def never_asked() -> str:
    """The message of :class:`NotDistillingError`."""
    return (
        "the loss that attach() gave to this model was never computed, and gradients of another "
        f"loss arrive: the teacher is not used. {REMEDY}"
    )
