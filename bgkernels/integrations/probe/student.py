"""A student whose loss is ours: what it does beside, watched from call to call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bgkernels.integrations import heads, zero3
from bgkernels.integrations.heads import HeadError
from bgkernels.integrations.probe.loss import OwnLoss, examine, extra_losses
from bgkernels.integrations.probe.tokens import decoder_inputs

NEUTRAL = {"use_cache", "return_dict", "output_hidden_states", "output_attentions", "dtype"}
"""Settings of a configuration that no loss depends on."""


class Student:
    """A model with its own forward, and what its own loss is made of.

    Args:
        model: unwrapped.
        original: its forward, as a function of the model and its arguments.

    Raises:
        HeadError: see :func:`bgkernels.integrations.probe.loss.examine`.
    """

    def __init__(self, model: Any, original: Callable[..., Any]) -> None:
        self.original = original
        self.own = OwnLoss(shifted=not getattr(model.config, "is_encoder_decoder", False))
        heads.linear(model)
        self.examined = heads.runs_here(model)
        if self.examined:
            self.own = examine(model, partial(original, model))
        self.settings = dict(_settings(model))

    def run(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """A forward up to the head, and its hidden states.

        Raises:
            HeadError: it adds a loss that cannot be kept, or was changed so that it does.
        """
        forward = partial(self.original, model)
        settings = self.settings if torch.compiler.is_compiling() else dict(_settings(model))
        if settings != self.settings:
            self.settings = settings
            if _runs(model):
                self.own = examine(model, forward)
        if not self.examined and zero3.gathers(heads.linear(model)):  # it came in parts
            self.own, self.examined = examine(model, forward), True
        output, hidden = heads.until_head(model, forward, inputs)
        new = [name for name, _ in extra_losses(output) if name not in self.own.extras]
        if new:
            self._examine_again(model, new, inputs)
        return output, hidden

    def _examine_again(self, model: Any, new: list[str], inputs: Mapping[str, Any]) -> None:
        """Measure the factors of losses that appear for the first time."""
        flags = {name: x for name, x in inputs.items() if isinstance(x, bool)}
        if _runs(model) and not torch.compiler.is_compiling():
            self.own = examine(model, partial(self.original, model), **flags)
        missing = [name for name in new if name not in self.own.extras]
        if missing:
            asked = ", ".join(f"{name}=True" for name, x in flags.items() if x) or "its settings"
            raise HeadError(
                f"{type(model).__name__} returns {', '.join(missing)} by {asked}, and the factor "
                "in its loss could not be measured here; set it in the configuration before "
                "attach(), while the model is whole, or leave it out of the call"
            )


def _runs(model: Any) -> bool:
    """Whether a model that is being called can be called on other tokens too, on every rank."""
    return heads.runs_here(model) or zero3.gathers(heads.linear(model))


def completed(model: Any, inputs: dict[str, Any], labels: Tensor | None) -> dict[str, Any]:
    """The inputs of a forward without labels that is to run as one with labels would."""
    given = ("decoder_input_ids", "decoder_inputs_embeds")
    if labels is None or any(inputs.get(name) is not None for name in given):
        return inputs
    return {**inputs, **decoder_inputs(model, labels)}


def _settings(model: Any) -> Iterator[tuple[str, Any]]:
    """Plain values of a model's configuration."""
    for config in (model.config, model.config.get_text_config()):
        for name, x in vars(config).items():
            plain = isinstance(x, (bool, int, float, str))
            if plain and name not in NEUTRAL and not name.startswith("_") and "token" not in name:
                yield name, x
