"""The texts of a batch, as a server reads them: each alone, and no further than is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bgkernels.integrations.probe.reading import PACKING, readable

READ = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Text:
    """A text of a batch, up to the last position whose state is wanted.

    Attributes:
        tokens: of the text.
        chosen: ``(n,)`` positions in the text whose states are wanted.
        places: ``(n,)`` where they are in the flattened batch.
    """

    tokens: tuple[int, ...]
    chosen: Tensor
    places: Tensor


def texts_of(inputs: Mapping[str, Any], rows: Tensor | None) -> list[Text]:
    """The texts that are needed, without padding and without what follows the last label.

    Args:
        inputs: ``input_ids (batch, length)``, and with it ``attention_mask`` of that shape and
            ``position_ids``, which begin again where another text is packed behind one.
        rows: ``(n,)`` positions wanted of the flattened batch; None: all that are no padding.

    Raises:
        ValueError: the batch is not made of tokens alone, or a wanted position is padding.
    """
    if inputs.get("decoder_input_ids") is not None:
        raise ValueError(
            "a served teacher is a decoder, and the batch has `decoder_input_ids`; its positions "
            "would be of other tokens, so choose a student that is a decoder"
        )
    given = readable("behind the server", inputs, READ, others=True)
    tokens, mask, positions = (given.get(name) for name in READ)
    bounds = [name for name in PACKING if name in given]
    if tokens is None or (bounds and positions is None):
        raise ValueError(
            "a served teacher reads `input_ids`, and of packed texts `position_ids` that begin "
            f"again at each; got {', '.join(given) or 'neither'}"
        )
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(tokens.shape)}, for a "
            f"served teacher; got {tuple(mask.shape)}"
        )
    flat, length = tokens.detach().cpu().flatten(), tokens.shape[-1]
    present = torch.ones_like(flat, dtype=torch.bool)
    if mask is not None:
        present = mask.detach().cpu().flatten().bool()
    wanted = present
    if rows is not None:
        wanted = torch.zeros_like(present).index_fill(0, rows.cpu(), True)
    if (wanted & ~present).any():
        place = int((wanted & ~present).nonzero()[0])
        raise ValueError(
            f"position {place % length} of sequence {place // length} has a label, and "
            "`attention_mask` says that it is padding; give the first token of a text no label"
        )
    if positions is not None:
        positions = positions.detach().cpu().expand(tokens.shape).flatten()
    found: list[Text] = []
    for places in _texts(present, positions, length):
        chosen = wanted[places].nonzero().squeeze(1)
        if len(chosen):
            read = flat[places[: int(chosen[-1]) + 1]].tolist()
            found.append(Text(tuple(read), chosen, places[chosen]))
    return found


def _texts(present: Tensor, positions: Tensor | None, length: int) -> Iterator[Tensor]:
    """The places of each text in the flattened batch."""
    for start in range(0, len(present), length):
        places = present[start : start + length].nonzero().squeeze(1) + start
        if positions is None or not len(places):
            yield places
            continue
        begins = (positions[places].diff() != 1).nonzero().squeeze(1) + 1
        yield from places.tensor_split(begins)
