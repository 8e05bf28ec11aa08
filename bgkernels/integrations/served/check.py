"""Whether a server is the teacher whose head is here: asked once, on a few words."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

from bgkernels.integrations.served.head import CheckpointHead
from bgkernels.labels.errors import ServerError
from bgkernels.labels.served.api import (
    POOLING,
    HiddenStates,
    LogProbabilities,
    ServedModel,
    tokenized,
)
from bgkernels.labels.served.client import Client

PROBE = "The capital of France is Paris, and 2 + 2 = 4; def area(r): return 3.14159 * r**2\n"
NUMBERS = tuple(range(3, 35))
"""Tokens of the text whose states are looked at."""
NATS = 0.1
"""Mean difference of log-probabilities above which two models are not the same in any dtype."""
SHARE = 0.02
"""Of the mean square after a norm, by which it may differ from 1."""
K = 5


def examine(
    states: HiddenStates,
    served: ServedModel,
    head: CheckpointHead,
    tokenizer: Any = None,
    reference: LogProbabilities | None = None,
) -> None:
    """Refuse a server that is not the teacher, as far as it can be seen.

    The head's log-probabilities must be those of the server, where it sends them beside hidden
    states, or of another server of the same model. Otherwise the states must be the output of the
    checkpoint's last norm: divided by its gains, they have a mean square of 1. That tells apart
    models whose norms differ; another training of the same base may pass, so the name of the served
    model must be the head's, too, unless it was chosen by its name.

    Args:
        states: of the server.
        served: what the server says of its model; without ``root`` where the user chose it.
        head: of the teacher.
        tokenizer: of the student; None: not compared.
        reference: of another server of the same model.

    Raises:
        ServerError: it is another model, by the first difference that is found.
    """
    where, name = states.client.name, head.name
    if tokenizer is not None:
        compare_tokens(states.client, served, tokenizer)
    vocab, width = head.head.weight.shape
    tokens = [token % vocab for token in NUMBERS[: served.limit]]
    hidden = states(tokens)
    if hidden.shape[1] != width:
        raise ServerError(
            f"{where} sends states of {hidden.shape[1]} numbers, and the head of {name} takes "
            f"{width}; name the checkpoint that is served"
        )
    hidden = hidden.float()
    if torch.allclose(hidden.norm(dim=1), torch.ones(len(hidden)), atol=5e-3):
        raise ServerError(
            f"{where} normalises its embeddings: each has the length 1, and the head of {name} "
            f"needs hidden states; {POOLING}"
        )
    logprobs = head.head(hidden.to(head.head.weight.dtype)).float().log_softmax(-1)
    try:
        difference = distance(logprobs, tokens, reference or _beside(states))
    except ServerError:
        difference = None  # it sends none
    if difference is not None:
        if difference > NATS:
            raise ServerError(
                f"the head of {name} on the states of {where} is {difference:.2f} nats a token "
                "away from the server's own log-probabilities, so it serves another model, or at "
                "another temperature; name the checkpoint that is served"
            )
        return
    _compare_norm(hidden, head, where)
    compare_names(states.client, served, name)


def compare_tokens(client: Client, served: ServedModel, tokenizer: Any) -> None:
    """Refuse a server that cuts a few words into other tokens, where it tells.

    Raises:
        ServerError: it does.
    """
    tokens = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    read = tokenized(client, served.name, PROBE)
    if read is not None and read != tokens:
        raise ServerError(
            f"{client.name} has another tokenizer than the student: a text of {len(PROBE)} letters "
            f"is {len(read)} tokens there and {len(tokens)} here, or other ones; tokens are "
            "compared by number, so serve a model that shares the student's tokenizer"
        )


def compare_names(client: Client, served: ServedModel, name: str) -> None:
    """Refuse a server whose model has another path or name than a checkpoint.

    Raises:
        ServerError: neither holds the last part of the other.
    """
    if served.root and not alike(served.root, name):
        raise ServerError(
            f"{client.name} serves {served.root}, and the head is that of {name}; name the "
            f"checkpoint that is served, or if the weights are the same, pass model={served.name!r}"
        )


def distance(logprobs: Tensor, tokens: list[int], source: LogProbabilities) -> float:
    """Mean distance of a model's log-probabilities from those of a server, in nats.

    Args:
        logprobs: ``(length, vocab)`` of the model.
        tokens: ``(length,)`` of the text.
        source: of the server's most probable tokens.

    Raises:
        ServerError: the server sends none.
    """
    labels = source(tokens).labels
    known = labels.indices >= 0
    found = logprobs.cpu().gather(1, labels.indices.clamp_min(0)) - labels.logprobs
    return float(found[known].abs().mean())


def _beside(states: HiddenStates) -> LogProbabilities:
    return LogProbabilities(states.client, states.model, K)


def _compare_norm(hidden: Tensor, head: CheckpointHead, where: str) -> None:
    """Refuse states that are no output of the checkpoint's last norm."""
    layer = None if head.norm is None else _gains(head.norm, hidden.shape[1])
    if layer is None:
        raise ServerError(
            f"{where} sends no log-probabilities, and the last norm of {head.name} is not of a "
            "known kind, so nothing tells whether it is the same model; pass as `reference` the "
            "URL of a server of it that generates, or check=False"
        )
    gain, bias = layer
    used = gain.abs() > 1e-3 * gain.abs().max()
    square = ((hidden - bias) / gain)[:, used].square().mean(1)
    if (square - 1).abs().max() > SHARE:
        raise ServerError(
            f"{where} sends states that the last norm of {head.name} did not make (their mean "
            f"square after its gains is {float(square.mean()):.2f}, not 1), so it serves another "
            f"model, or an activation is applied; name the checkpoint that is served, and {POOLING}"
        )


def _gains(norm: nn.Module, width: int) -> tuple[Tensor, Tensor] | None:
    """Gain and bias of an RMS or layer norm, found by trying it; None for another function."""
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    ahead, back = norm(x), norm(-x)
    bias = (ahead + back).mean(0) / 2
    for centred in (x, x - x.mean(1, keepdim=True)):
        unit = centred / centred.square().mean(1, keepdim=True).sqrt()
        gain = ((ahead - bias) * unit).sum(0) / unit.square().sum(0)
        if torch.allclose(unit * gain + bias, ahead, rtol=1e-3, atol=1e-3):
            return gain, bias
    return None


def alike(root: str, name: str) -> bool:
    """Whether one of two paths or names of models holds the last part of the other."""
    one, other = (x.lower().replace("--", "/") for x in (root, name))
    return PurePath(one).name in PurePath(other).parts or (
        PurePath(other).name in PurePath(one).parts
    )
