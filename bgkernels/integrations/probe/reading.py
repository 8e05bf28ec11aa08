"""What of a student's batch its teacher can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bgkernels.integrations.probe.tokens import arguments, embeddings
from bgkernels.integrations.zero3 import shape

OF_THE_CALL = {
    "labels", "shift_labels", "num_items_in_batch", "loss_rows", "extra_losses", "return_dict",
    "use_cache", "past_key_values", "cache_position", "logits_to_keep", "output_hidden_states",
    "output_attentions", "output_router_logits", "skip_logits",
}  # fmt: skip
"""What a call asks of the student, which is no input."""
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Bounds of packed documents, which attention takes without the model's signature naming them."""


class Reader:
    """Chooses the inputs of a teacher, and refuses those that it cannot have read.

    Args:
        model: the teacher, unwrapped.

    Attributes:
        waits: look at tokens on a GPU too, for which a step waits; a student may have more of them.
    """

    def __init__(self, model: Any) -> None:
        self.name = type(model).__name__
        self.arguments = arguments(model)
        self.limit = positions(model)
        table = embeddings(model)
        self.tokens = None if table is None else shape(table)[0]
        self.waits = False

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs that the teacher takes.

        Raises:
            ValueError: it would read other text than the student (an image or a sound that it does
                not take, embeddings of the student, positions that it ignores), or has no embedding
                of a token or a position.
        """
        chosen = readable(self.name, inputs, *self.arguments)
        self.check(chosen.get("input_ids"))
        return chosen

    def check(self, tokens: Any) -> None:
        """Refuse tokens and lengths for which there is no embedding.

        Raises:
            ValueError: there are such; by name.
        """
        if not isinstance(tokens, Tensor) or torch.compiler.is_compiling() or not tokens.numel():
            return
        if self.tokens and (self.waits or tokens.device.type == "cpu"):
            largest = int(tokens.max())
            if largest >= self.tokens:
                raise ValueError(
                    f"the teacher {self.name} has embeddings of {self.tokens} tokens, and "
                    f"`input_ids` has the token {largest}; choose a teacher with the student's "
                    "tokenizer, or give it the added tokens: teacher.resize_token_embeddings(n)"
                )
        if self.limit is not None and tokens.shape[-1] > self.limit:
            raise ValueError(
                f"the teacher {self.name} takes at most {self.limit} tokens, and `input_ids` has "
                f"{tokens.shape[-1]}; cut the sequences, or choose a teacher of longer texts"
            )


def readable(
    teacher: str, inputs: Mapping[str, Any], named: tuple[str, ...], others: bool
) -> dict[str, Any]:
    """The inputs that a forward takes.

    Args:
        teacher: name of its class.
        inputs: of the student.
        named, others: the names that it takes, and whether it takes others too.

    Raises:
        ValueError: it would read other text than the student.
    """
    found: dict[str, Any] = {}
    for name, x in inputs.items():
        if x is None or name in OF_THE_CALL:
            continue
        if name in ("inputs_embeds", "decoder_inputs_embeds"):
            if name.replace("inputs_embeds", "input_ids") in inputs:
                continue
            raise ValueError(
                f"`{name}` are embeddings of the student, which the teacher {teacher} "
                "cannot read; pass `input_ids`, or as `teacher` a callable (inputs, rows)"
            )
        if name in named or (others and name in PACKING):
            found[name] = x
        elif name == "position_ids" or (isinstance(x, Tensor) and x.is_floating_point()):
            raise ValueError(
                f"the teacher {teacher} does not take `{name}`, so it would read "
                "other text than the student; choose a teacher that does, or leave it out of the "
                "batch"
            )
    return found


def positions(model: Any) -> int | None:
    """The longest sequence of a model that looks its positions up; None: of any other."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    table = embeddings(model)
    sizes = [
        m.num_embeddings
        for m in model.modules()
        if isinstance(m, nn.Embedding) and m.weight is not table
    ]
    return limit if any(0 <= size - limit <= 8 for size in sizes) else None
