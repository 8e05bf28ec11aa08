"""A model that writes often, and reads each token by a recording of what it did for another.

For a token of a small model most of the time goes into Python and modules, not into products. Where
the shapes are the same each time, the operations are too: recorded once and played back by torch's
interpreter, a token of the demo's student takes 0.4 of the time. ``torch.compile`` gains as much,
but first it needs a C++ compiler and half a minute, which a student of minutes does not pay back.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bgkernels.training.decoding import Decoder
from bgkernels.training.models import CausalLM
from bgkernels.training.sharding import sharded

Shape = tuple[int, int]
"""Rows, and the tokens that each has room for."""


@dataclass(frozen=True)
class TracedLM(CausalLM):
    """A model in the memory of a CPU that is asked for many texts of the same few shapes.

    Weights may change in place between two texts; a model of other parameters is recorded again.
    What cannot be recorded (a model with another kind of cache, one that computes otherwise at
    some positions) is read as any other: a recording is tried on a whole text first.

    Example:
        >>> from bgkernels.training.config import ModelShape
        >>> from bgkernels.training.generation import generate
        >>> from bgkernels.training.models import small_llama
        >>> model = small_llama(ModelShape(32, 1, 1), vocab=512, length=64, seed=0)
        >>> model.freeze()
        >>> prompts, traced = torch.zeros(2, 5, dtype=torch.long), TracedLM.of(model)
        >>> said = (generate(m, prompts, 9, 512, seed=0) for m in (model, traced))
        >>> torch.equal(*said)
        True
    """

    recordings: dict[Shape, Recording | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    recorded: list[nn.Parameter] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @classmethod
    def of(cls, model: CausalLM) -> TracedLM:
        """The same model, without a recording yet."""
        return cls(model.network, model.logit_scale, model.logit_softcap)

    def decoder(self) -> Decoder:
        """One that plays recordings."""
        return TracedDecoder(self)

    def recording(self, tokens: Tensor, width: int) -> Recording | None:
        """Of such a batch, or None where there cannot be one.

        Args:
            tokens: ``(rows, given)`` some text.
            width: tokens that a row will have.
        """
        parameters = list(self.network.parameters())
        if [*map(id, parameters)] != [*map(id, self.recorded)]:
            self.recordings.clear()
            self.recorded[:] = parameters
        shape = len(tokens), width
        if shape not in self.recordings:
            plain = self.device.type == "cpu" and not self.network.training and not sharded(self)
            self.recordings[shape] = _record(self, tokens, width) if plain else None
        return self.recordings[shape]


def _record(model: CausalLM, tokens: Tensor, width: int) -> Recording | None:
    """A recording that was found right at every position, or None."""
    text = tokens[:, torch.arange(width) % tokens.shape[1]]
    try:
        recording = Recording(model, text)
        expected = model.hidden(text)
        found = [recording.begin(text[:, :1], width - 1)]
        found += [recording.go_on(token) for token in text[:, 1:].unbind(1)]
    except Exception:  # whatever a model's code raises
        return None
    error = (torch.stack(found, 1) - expected).abs().max()
    half_of_the_digits = torch.finfo(expected.dtype).eps ** 0.5
    return recording if error <= half_of_the_digits * expected.abs().max() else None


class _Token(nn.Module):
    """One more token of each text; all that changes between two calls is in its buffers.

    Args:
        body: of the model.
        cache: ``StaticCache`` that has read something.
        dtype: of the body.
    """

    body: Any
    columns: Tensor
    keys_0: Tensor
    cumulative_length_0: Tensor

    def __init__(self, body: nn.Module, cache: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.cache, self.lowest = body, cache, torch.finfo(dtype).min
        for number, layer in enumerate(cache.layers):
            for name in ("keys", "values", "cumulative_length"):
                self.register_buffer(f"{name}_{number}", getattr(layer, name))
        self.register_buffer("columns", torch.arange(cache.layers[0].max_cache_len))

    def forward(self, token: Tensor) -> Tensor:
        position = self.cumulative_length_0.clone()
        mask = (self.columns > position).to(self.keys_0.dtype) * self.lowest
        out = self.body(
            input_ids=token[:, None],
            position_ids=position.expand(len(token), 1),
            attention_mask=mask.expand(len(token), 1, 1, -1),
            past_key_values=self.cache,
            use_cache=True,
        )
        state: Tensor = out.last_hidden_state[:, -1]
        return state


class Recording(Decoder):
    """What a model does for one more token of a batch of some shape.

    Args:
        model: the model.
        text: ``(rows, width)`` an example.

    Raises:
        Exception: the model cannot be recorded.
    """

    def __init__(self, model: CausalLM, text: Tensor) -> None:
        super().__init__(model.body)
        from transformers import StaticCache

        self.cache: Any = StaticCache(config=model.network.config, max_cache_len=text.shape[1])
        self.begin(text[:, :-1], 1)
        token = _Token(self.body, self.cache, model.head.weight.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would rather compile; sizes become constants
            self.play: Any = torch.jit.trace(token, (text[:, -1],), check_trace=False)

    def begin(self, tokens: Tensor, room: int) -> Tensor:
        """As of any model, into the memory that the recording reads."""
        self.cache.reset()
        self.past = self.cache
        return self._read(tokens)

    def go_on(self, token: Tensor) -> Tensor:
        """As of any model, by the recording."""
        state: Tensor = self.play(token)
        return state


class TracedDecoder(Decoder):
    """Plays a model's recording, if it has one for the shape of the batch."""

    def __init__(self, model: TracedLM) -> None:
        super().__init__(model.body)
        self.model, self.reader = model, Decoder(model.body)

    def begin(self, tokens: Tensor, room: int) -> Tensor:
        """As of any model."""
        self.reader = self.model.recording(tokens, tokens.shape[1] + room) or Decoder(self.body)
        return self.reader.begin(tokens, room)

    def go_on(self, token: Tensor) -> Tensor:
        """As of any model."""
        return self.reader.go_on(token)
