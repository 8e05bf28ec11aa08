"""A teacher behind a server, where a model is expected: its head is here, its body there."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import bgkernels as bg
from bgkernels.integrations.heads import HeadError
from bgkernels.integrations.served import CheckpointHead, ServedTeacher, read_head
from bgkernels.integrations.served.check import compare_names, compare_tokens
from bgkernels.labels.errors import NoStates
from bgkernels.labels.served.api import LogProbabilities, find_model
from bgkernels.labels.served.client import Client
from bgkernels.labels.served.source import ServedLogProbabilities, ServedStates
from bgkernels.labels.sources import LabelSource
from bgkernels.training.errors import ModelError, extra
from bgkernels.training.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ServedLM(CausalLM):
    """A frozen model whose hidden states come from a server.

    Args:
        served: the source of its hidden states; ``network`` is only the head.
        count: parameters of the whole model.
    """

    served: Any = None
    count: int = 0

    @classmethod
    def of(cls, served: ServedTeacher, count: int = 0) -> ServedLM:
        """The model behind a source."""
        head = served.head
        network = _HeadAlone(served).eval().requires_grad_(False)
        return cls(network, head.logit_scale, head.logit_softcap, served, count)

    @property
    def here(self) -> bool:
        """No: only the head is."""
        return False

    @property
    def limit(self) -> int | None:
        """The longest text that the server takes, where it says so."""
        limit: int | None = self.served.limit
        return limit

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.count

    def hidden(self, tokens: Tensor) -> Tensor:
        """As of any model, in the memory of ``tokens``."""
        hidden: Tensor = self.as_teacher(tokens).hidden
        return hidden

    def as_teacher(self, tokens: Tensor) -> bg.LinearTeacher:
        """As any model; what was asked before is there sooner."""
        teacher: bg.LinearTeacher = self.served({"input_ids": tokens}, None)
        return teacher

    def ask(self, tokens: Tensor) -> None:
        """Let the server read ``(batch, length)`` tokens that will be needed later."""
        self.served.ask({"input_ids": tokens}, None)

    def as_source(self) -> ServedStates:
        """This model as a source of labels for files."""
        head = self.served.head
        nothing = torch.empty(0, self.head.in_features, dtype=self.served.states.dtype)
        teacher = bg.LinearTeacher(
            nothing, head.weight, head.bias, head.logit_scale, head.logit_softcap
        )  # fmt: skip
        return ServedStates(self.served.states, teacher, self.served.name, self.digest)


class _HeadAlone(nn.Module):
    """As much of a network as is here."""

    def __init__(self, served: ServedTeacher) -> None:
        super().__init__()
        weight, bias = served.head.weight, served.head.bias
        vocab, width = weight.shape
        self.lm_head = nn.Linear(width, vocab, bias is not None, device="meta")
        self.lm_head.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.lm_head.bias = nn.Parameter(bias, requires_grad=False)
        self.base_model = _Remote(served)

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head


class _Remote(nn.Module):
    """A body that is asked for whole texts: what it remembers of a text is the text."""

    def __init__(self, served: ServedTeacher) -> None:
        super().__init__()
        self.served = served

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **options: Any) -> Any:
        """``last_hidden_state (batch, 1, hidden)`` of the last position, as in generation."""
        text = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        count, length = text.shape
        last = torch.arange(1, count + 1) * length - 1
        hidden = self.served({"input_ids": text}, last).hidden[:, None]
        return SimpleNamespace(last_hidden_state=hidden, past_key_values=text)


def load_served(
    url: str | Client, name: str, option: str, length: int
) -> tuple[ServedLM, PreTrainedTokenizerBase]:
    """A served model and its tokenizer.

    Args:
        url: of its servers, separated by commas.
        name: path or name of its checkpoint; only the head and the tokenizer are read.
        option: the command-line option that named it, for messages.
        length: the longest sequence it will see.

    Raises:
        ModelError: head or tokenizer cannot be read, or ``length`` is too long for the server.
        ServerError: the server cannot be asked, or serves another model.
    """
    head, tokenizer = _read(name, option)
    served = ServedTeacher(url, head, tokenizer=tokenizer)
    if served.limit is not None and length > served.limit:
        raise ModelError(
            f"{served.states.client.name} takes at most {served.limit} tokens of a text; lower the "
            f"length, now {length}, or start it with a larger --max-model-len"
        )
    return ServedLM.of(served, head.parameters), tokenizer


def served_source(
    client: Client, name: str, length: int, k: int
) -> tuple[LabelSource, PreTrainedTokenizerBase]:
    """What a server can say of texts, and the tokenizer of its model.

    Args:
        client: of the servers.
        name: path or name of the checkpoint that is served.
        length: the longest text.
        k: log-probabilities of a token, where the server sends those alone.

    Raises:
        ModelError, ServerError: as of :func:`load_served`.
    """
    try:
        model, tokenizer = load_served(client, name, "--teacher", length)
    except NoStates:
        head, tokenizer = _read(name, "--teacher")
        served = find_model(client)
        compare_tokens(client, served, tokenizer)
        compare_names(client, served, name)
        source = LogProbabilities(client, served.name, k, served.sglang)
        vocab = head.head.weight.shape[0]
        return ServedLogProbabilities(source, name, vocab), tokenizer
    return model.as_source(), tokenizer


def _read(name: str, option: str) -> tuple[CheckpointHead, PreTrainedTokenizerBase]:
    """Head and tokenizer of a checkpoint."""
    with extra():
        from transformers import AutoTokenizer
    try:
        return read_head(name), AutoTokenizer.from_pretrained(name)
    except (HeadError, OSError, ValueError) as error:
        raise ModelError(
            f"{option} must be the path or the name of the checkpoint that is served, with its "
            f"tokenizer; of {name!r} they could not be read: {error}"
        ) from error
