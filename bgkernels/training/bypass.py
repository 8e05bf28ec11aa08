"""A pruned model held against the whole one, whose dropped parts are passed by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bgkernels.training.errors import ModelError
from bgkernels.training.models import CausalLM

TOLERANCE = 1e-3
"""Relative to the largest logit; both compute the same, in another order."""


@torch.no_grad()
def check_equal(
    whole: CausalLM,
    small: CausalLM,
    blocks: Sequence[Any],
    kept: Tensor,
    silent: Callable[[int], dict[nn.Module, Tensor]],
) -> None:
    """Refuse a pruned model that is not what is left of the whole one.

    Args:
        whole, small: both models.
        blocks: of the whole one.
        kept: which of them are left.
        silent: for the number of a block, the columns that were dropped from its projections.

    Raises:
        ModelError: their logits differ on a few tokens.
    """
    tokens = torch.arange(12).remainder(min(whole.vocab, small.vocab)).reshape(2, 6)
    with _bypassed(blocks, set(kept.tolist()), silent):
        expected = whole.network(tokens.to(whole.device), use_cache=False).logits.float().cpu()
    found = small.network(tokens.to(small.device), use_cache=False).logits.float().cpu()
    error = (found - expected).abs().max()
    if not error <= TOLERANCE * expected.abs().max():
        raise ModelError(
            "--model cannot be pruned so: what is left of it computes something else than the same "
            f"parts of the whole model (logits differ by {float(error):.2g}), since its blocks "
            "depend on each other or on their numbers; keep all --layers and --heads, or choose "
            "another model"
        )


@contextmanager
def _bypassed(
    blocks: Sequence[Any], kept: set[int], silent: Callable[[int], dict[nn.Module, Tensor]]
) -> Iterator[None]:
    """Inside, dropped blocks pass on what they get, and dropped columns are zero."""

    def passed(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]

    def without(columns: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
            return (inputs[0].index_fill(-1, columns.to(inputs[0].device), 0), *inputs[1:])

        return hook

    handles = []
    for i, block in enumerate(blocks):
        if i not in kept:
            handles.append(block.register_forward_hook(passed))
            continue
        for module, columns in silent(i).items():
            handles.append(module.register_forward_pre_hook(without(columns)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
