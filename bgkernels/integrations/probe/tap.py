"""The input of a model's head, taken while the model runs its own forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bgkernels.integrations.probe.curve import Curve, grid
from bgkernels.integrations.probe.tokens import LENGTH

NAME = "_bgkernels_tap"
"""Attribute of a head that has a tap; a copy of the head has a copy of it."""


class Tap:
    """A pair of hooks on a head, idle until it is opened.

    Open, it keeps the head's input and passes on no position of it, so that the product with the
    vocabulary costs nothing and the rest of the forward runs on empty logits. With ``measuring`` it
    passes on a few positions and replaces their logits by known ones, so that the model's output
    shows what it does to logits.

    Attributes:
        curve: what the model does to the output of this head; None: not known yet.
        settings: arguments of every forward of the head's model; None: not known yet.
        hidden: the head's input, of the call in progress.
        calls: how often the head was called since the tap was opened.
    """

    def __init__(self) -> None:
        self.curve: Curve | None = None
        self.settings: dict[str, Any] | None = None
        self.handles: list[Any] = []
        self.hidden: Tensor | None = None
        self.calls = 0
        self.opened = self.measuring = False

    def before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """Keep the input; pass on what is needed of it."""
        if not self.opened:
            return None
        self.calls += 1
        self.hidden = inputs[0]
        if inputs[0].ndim != 3:
            return None  # the reader refuses it
        return (inputs[0][:, : LENGTH if self.measuring else 0], *inputs[1:])

    def after(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
        """Replace the logits by known ones."""
        return grid(output) if self.opened and self.measuring else None

    def open(self, measuring: bool = False) -> None:
        """Take the input of the next forward."""
        self.opened, self.measuring, self.calls, self.hidden = True, measuring, 0, None

    def close(self) -> Tensor | None:
        """The input that was taken, if any."""
        hidden, self.hidden, self.opened = self.hidden, None, False
        return hidden

    def remove(self, head: nn.Module) -> None:
        """Leave the head as it was."""
        for handle in self.handles:
            handle.remove()
        head.__dict__.pop(NAME, None)


def on(head: nn.Module) -> Tap:
    """The tap of a head, which is set on its first use and stays."""
    tap: Tap | None = head.__dict__.get(NAME)
    if tap is None:
        tap = Tap()
        tap.handles = [
            head.register_forward_pre_hook(tap.before),
            head.register_forward_hook(tap.after, prepend=True),
        ]
        head.__dict__[NAME] = tap
    return tap
