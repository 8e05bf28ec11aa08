"""A passage token by token: what is known of each, and what models would have said there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bgkernels.training.generation import generate
from bgkernels.training.models import CausalLM
from bgkernels.training.sharding import whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAVOURITES, AHEAD = 5, 10
"""Most probable tokens that are shown, and tokens of a continuation."""
STATES = 32
"""Positions whose logits exist at once."""


@dataclass(frozen=True)
class Layer:
    """How one map is shown.

    Args:
        title, text: what it is, and how to read it.
        scale: ``"kind"``: purple for bridges at 0, green for gardens at the most; ``"amount"``:
            nothing at 0, orange at the most; ``"sign"``: purple below 0, green above.
    """

    title: str
    text: str
    scale: str = "kind"


LAYERS = {
    "ambiguity": Layer("Entropy", "teacher's entropy / log V: near 0 at bridges, high in gardens"),
    "soft_weight": Layer("Soft weight", "share of the soft label by the routing policy"),
    "kl": Layer("Divergence", "KL(teacher‖student), nats", "amount"),
    "risk": Layer(
        "Risk",
        "κ-proxy: nats that the student's choice of this token adds later, estimated",
        "sign",
    ),
}
"""The maps, by field of :class:`TokenMap`."""


@dataclass(frozen=True)
class Voice:
    """What a model would have said in place of each token of a passage.

    Args:
        best: its five most probable tokens there, as text, each with its probability.
        ahead: what it would have gone on to say, token by token the most probable; None near the
            end of the text, beyond which models may not be able to read.
    """

    best: tuple[tuple[tuple[str, float], ...], ...]
    ahead: tuple[str | None, ...]


@dataclass(frozen=True)
class TokenMap:
    """A passage, token by token.

    Args:
        tokens: as text.
        ambiguity: the teacher's ``H / log V`` where it predicts each token.
        soft_weight: a policy's soft weight, as a share of both weights; empty where not asked for,
            as are the next two.
        kl: KL(teacher‖student), nats.
        risk: estimated risk of the student's choice, nats.
        given: the text before, which nobody is asked about.
        voices: by name, the models that can be asked.
    """

    tokens: tuple[str, ...]
    ambiguity: tuple[float, ...]
    soft_weight: tuple[float, ...] = ()
    kl: tuple[float, ...] = ()
    risk: tuple[float, ...] = ()
    given: str = ""
    voices: dict[str, Voice] = field(default_factory=dict)

    def layers(self) -> dict[str, tuple[float, ...]]:
        """The maps that there are."""
        found = {name: getattr(self, name) for name in LAYERS}
        return {name: values for name, values in found.items() if values}


@torch.no_grad()
def hear(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: Tensor,
    places: range,
    stop: int | None = None,
) -> Voice:
    """Ask a model what it would have said in some places of a text.

    Args:
        model: that reads the tokens of the text.
        tokenizer: to show tokens as text.
        text: ``(length + 1,)`` tokens.
        places: of the tokens that are asked about, at least 1: the first token is given.
        stop: the token that ends a text; None: texts go on.

    Example:
        >>> from bgkernels.training.config import ModelShape
        >>> from bgkernels.training.models import small_llama
        >>> from bgkernels.training.tasks import find
        >>> words = find("arithmetic").tokenizer
        >>> model = small_llama(ModelShape(32, 1, 1), len(words), 16, seed=0)
        >>> voice = hear(model, words, torch.arange(2, 10), range(3, 8))
        >>> [text is None for text in voice.ahead], [len(best) for best in voice.best]
        ([False, False, False, False, True], [5, 5, 5, 5, 5])
    """
    vocab, text = min(model.vocab, len(tokenizer)), text.to(model.device)
    best = _favourites(model, text[: places[-1]], places[0] - 1, vocab)
    length = max(1, min(AHEAD, (len(text) - places[0]) // 2))
    roomy = [place for place in places if place + length <= len(text)]
    said = generate(
        model, text[None].expand(len(roomy), -1), length, vocab, 0,
        lengths=torch.tensor(roomy), temperature=0.0, stop=stop,
    ).tolist()  # fmt: skip
    ends = (row.index(stop) if stop in row else length for row in said)
    ahead = [str(tokenizer.decode(row[:end])) for row, end in zip(said, ends, strict=True)]
    return Voice(
        tuple(
            tuple((str(tokenizer.decode([token])), round(share, 4)) for share, token in tokens)
            for tokens in best
        ),
        (*ahead, *[None] * (len(places) - len(roomy))),
    )


def _favourites(
    model: CausalLM, text: Tensor, first: int, vocab: int
) -> list[list[tuple[float, int]]]:
    """Probabilities and tokens after each token of a text, from the first on that is asked for."""

    def find() -> list[list[tuple[float, int]]]:
        head, hidden = model.leading(vocab), model.hidden(text[None])[0, first:]
        found: list[list[tuple[float, int]]] = []
        for states in hidden.split(STATES):
            shares, tokens = head(states).float().softmax(-1).topk(min(FAVOURITES, vocab))
            pairs = zip(shares.tolist(), tokens.tolist(), strict=True)
            found += [list(zip(*pair, strict=True)) for pair in pairs]
        return found

    return whole([model], find)
