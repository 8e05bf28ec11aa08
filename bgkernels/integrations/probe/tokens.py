"""Tokens that any language model can read, and the names of what its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bgkernels.integrations.zero3 import shape

LENGTH = 8
IGNORE = -100


def embeddings(model: Any) -> Tensor | None:
    """``(tokens, width)``: the table that a model looks its inputs up in, if it tells."""
    try:
        found = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, Tensor) else None


def probe_tokens(model: Any) -> Tensor:
    """``(2, LENGTH)`` tokens, none of which means something special to the model."""
    table = embeddings(model)
    vocab = int(model.config.get_text_config().vocab_size if table is None else shape(table)[0])
    special = set(_special(model.config)) | set(_special(model.config.get_text_config()))
    plain = [i for i in range(min(vocab, 4096)) if i not in special] or [0]
    chosen = [plain[(7 * i + 3) % len(plain)] for i in range(2 * LENGTH)]
    return torch.tensor(chosen).reshape(2, LENGTH)


def probe_labels(tokens: Tensor) -> Tensor:
    """The same tokens as labels, some of them without one."""
    labels = tokens.clone()
    labels[0, :3] = labels[1, 5:] = IGNORE
    return labels


def decoder_inputs(model: Any, labels: Tensor) -> dict[str, Tensor]:
    """What the decoder of an encoder–decoder reads where only labels are given; else nothing.

    By the model's own rule where it has one, else by that of all others: labels one position later.
    A model that follows another is found when it is tried.
    """
    config = model.config
    if not getattr(config, "is_encoder_decoder", False):
        return {}
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return {"decoder_input_ids": own(labels=labels)}
    first, pad = (getattr(config, f"{x}_token_id", None) for x in ("decoder_start", "pad"))
    first = pad if first is None else first
    if first is None:
        raise ValueError(
            "config.decoder_start_token_id is not set, so the inputs of the decoder are not known; "
            "set it, or put `decoder_input_ids` into the batch"
        )
    later = torch.cat([labels.new_full((len(labels), 1), first), labels[:, :-1]], 1)
    return {"decoder_input_ids": later.masked_fill(later == IGNORE, first if pad is None else pad)}


def _special(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index", "token_ids", "_id")):
            yield from value if isinstance(value, (list, tuple)) else [value]


def arguments(model: Any) -> tuple[tuple[str, ...], bool]:
    """The names that a forward takes, and whether it takes others too."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = tuple(p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD)
    return named, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def settings(model: Any) -> dict[str, Any]:
    """Arguments that make a forward return what is needed and keep nothing."""
    named, others = arguments(model)
    wanted = {"use_cache": False, "return_dict": True}
    return {name: value for name, value in wanted.items() if others or name in named}
