"""Text that a model says next: a prompt is read once, and what follows token by token.

The sample of a row depends on the model, the prompt, and random numbers of the row's own. So a text
does not depend on the texts that are written at the same time, except for rounding: a product of
more rows may be summed up in another order.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from bgkernels.training.models import CausalLM
from bgkernels.training.sampling import Sampler, row_seeds
from bgkernels.training.sharding import sharded, whole
from bgkernels.training.translated import TranslatedLM

ROWS = 64
"""Prompts that are continued at once: a token of many takes little longer than a token of one."""


class Speaker(Protocol):
    """Says what a model says after each prompt; :func:`generate` is one."""

    def __call__(
        self,
        model: CausalLM,
        prompts: Tensor,
        length: int,
        vocab: int,
        seed: int | list[int],
        *,
        lengths: Tensor | None = None,
        temperature: float = 1.0,
        stop: int | None = None,
    ) -> Tensor:
        """``(rows, length)`` tokens, of arguments as :func:`generate` has them."""


@torch.no_grad()
def generate(
    model: CausalLM,
    prompts: Tensor,
    length: int,
    vocab: int,
    seed: int | list[int],
    *,
    lengths: Tensor | None = None,
    temperature: float = 1.0,
    stop: int | None = None,
) -> Tensor:
    """What a model says after each prompt.

    Two models that are given the same seed share their random numbers, so that they part only where
    their distributions do.

    Args:
        model: the speaker.
        prompts: ``(rows, longest)`` tokens; shorter ones are filled up at their end with anything.
        length: tokens to say.
        vocab: sample from so many leading columns, those that all models have.
        seed: of the samples; a list gives each row its own, as
            :func:`~bgkernels.training.sampling.row_seeds` makes them.
        lengths: ``(rows,)`` tokens of each prompt; None: all of them.
        temperature: of the samples; 0 takes the most probable token.
        stop: a token that ends a row, which is filled up with it; None: no row ends.

    Returns:
        ``(rows, length)`` int64, where the model is: the new tokens alone. Of a sharded model,
        every process must ask for as many prompts, of the same lengths.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from bgkernels.training.models import small_llama
        >>> from bgkernels.training.config import ModelShape
        >>> model = small_llama(ModelShape(32, 1, 1), vocab=512, length=64, seed=0)
        >>> generate(model, torch.zeros(2, 5, dtype=torch.long), 3, 512, seed=0).shape
        torch.Size([2, 3])
    """
    rows, longest = prompts.shape
    seeds = row_seeds(seed, rows) if isinstance(seed, int) else seed
    given = [longest] * rows if lengths is None else lengths.tolist()
    _check(prompts, given, seeds, temperature)
    order = sorted(range(rows), key=lambda row: given[row])  # alike ones wait least for each other
    said = prompts.new_empty(rows, length, device=model.device)

    def speak() -> Tensor:
        for first in range(0, rows, ROWS):
            chosen = order[first : first + ROWS]
            batch = prompts[chosen].to(model.device), [given[row] for row in chosen]
            draw = Sampler([seeds[row] for row in chosen], vocab, temperature, model.device)
            said[chosen] = _continue(model, *batch, length, draw, stop)
        return said

    with torch.inference_mode(not sharded(model)):
        return whole([model], speak)


def continue_text(
    model: CausalLM,
    prompts: Tensor,
    length: int,
    vocab: int,
    seed: int | list[int],
    *,
    temperature: float = 1.0,
    stop: int | None = None,
    speak: Speaker = generate,
) -> Tensor:
    """Prompts of equal length, and what the model says next; see :func:`generate`.

    Args:
        speak: says it; any but :func:`generate` is a server of the model.

    Returns:
        ``(rows, given + length)``, where the model is.
    """
    prompts = prompts.to(model.device)
    if isinstance(model, TranslatedLM):
        say = partial(speak, seed=seed, temperature=temperature)
        said = model.answers(prompts, length, say, stop)
    else:
        said = speak(model, prompts, length, vocab, seed, temperature=temperature, stop=stop)
    return torch.cat([prompts, said], dim=1)


def _check(prompts: Tensor, given: list[int], seeds: list[int], temperature: float) -> None:
    rows, longest = prompts.shape
    if len(given) != rows or any(not 1 <= n <= longest for n in given):
        raise ValueError(
            f"`lengths` must be {rows} numbers from 1 to {longest}, as `prompts` has shape "
            f"{tuple(prompts.shape)}; got {given}"
        )
    if len(seeds) != rows:
        raise ValueError(f"`seed` must be one number or one for each of {rows} rows; got {seeds}")
    if not temperature >= 0:
        raise ValueError(f"`temperature` must be 0 or positive; got {temperature}")


def _continue(
    model: CausalLM, prompts: Tensor, given: list[int], length: int, draw: Sampler, stop: int | None
) -> Tensor:
    """``(rows, length)`` what is said after prompts of about the same length.

    All are read up to the end of the shortest; then, at each step, a row reads the next token of
    its prompt, or the one that it has just said. So no row is padded, and positions are true.
    """
    shortest, longest = min(given), max(given)
    text = torch.cat([prompts[:, :longest], prompts.new_zeros(len(given), length)], dim=1)
    ends = torch.tensor(given, device=text.device)
    ended = torch.zeros_like(ends, dtype=torch.bool)
    decoder, head, end = model.decoder(), model.leading(draw.vocab), longest + length
    state = decoder.begin(text[:, :shortest], end - shortest - 1)
    for position in range(shortest, end):
        token = draw(head(state).float(), position)
        if stop is not None:
            token = token.masked_fill(ended, stop)
            ended |= (token == stop) & (position >= ends) | (position + 1 >= ends + length)
        if position < longest:
            token = torch.where(position < ends, text[:, position], token)
        text[:, position] = token
        if stop is not None and not sharded(model) and bool(ended.all()):
            text[:, position + 1 :] = stop
            break
        if position + 1 < end:
            state = decoder.go_on(token)
    return text.gather(1, ends[:, None] + torch.arange(length, device=text.device))
