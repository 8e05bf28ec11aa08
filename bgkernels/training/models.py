"""Causal language models, cut where the loss needs it: between body and head."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

import bgkernels as bg
from bgkernels.integrations import heads
from bgkernels.integrations.probe.reading import positions
from bgkernels.training import ranks
from bgkernels.training.checkpoint import WHOLE
from bgkernels.training.config import ModelShape
from bgkernels.training.decoding import Decoder
from bgkernels.training.errors import ModelError, TrainingError, extra
from bgkernels.training.files import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CausalLM:
    """A causal language model whose head is read by the loss, and called only to sample.

    Args:
        network: a ``transformers`` model with a plain linear head.
        logit_scale, logit_softcap: what the model does to the output of its head.

    Example:
        >>> model = small_llama(ModelShape(32, 1, 1), vocab=512, length=64, seed=0)
        >>> model.hidden(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 32])
    """

    network: Any
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def here(self) -> bool:
        """Whether its weights are in this process, and not behind a server."""
        return True

    @property
    def body(self) -> nn.Module:
        """Tokens to hidden states: everything but the head."""
        body: nn.Module = self.network.base_model
        return body

    @property
    def head(self) -> nn.Linear:
        """Hidden states to raw logits."""
        head = self.network.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.head.weight.device

    @property
    def vocab(self) -> int:
        """Columns of the head; at least the tokenizer's size."""
        return self.head.out_features

    @property
    def limit(self) -> int | None:
        """The longest text, if positions are looked up; None: any length."""
        return positions(self.network)

    @property
    def parameters(self) -> int:
        """How many there are; tied ones count once."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def digest(self) -> str:
        """Identifies the weights; of a sharded model, every process must ask."""
        tensors = map(_gathered, self.network.state_dict().values())
        flat = (x.detach().cpu().contiguous().flatten().view(torch.uint8) for x in tensors)
        return digest(x.numpy().tobytes() for x in flat)

    def hidden(self, tokens: Tensor) -> Tensor:
        """``(batch, length, hidden)`` last hidden states of ``(batch, length)`` tokens."""
        return heads.hidden_states(self.network, input_ids=tokens)

    def ask(self, tokens: Tensor) -> None:
        """Begin to read tokens that come later, as only a model that is elsewhere can."""

    @torch.no_grad()
    def as_teacher(self, tokens: Tensor) -> bg.LinearTeacher:
        """This model as the teacher of ``(batch, length)`` tokens."""
        hidden, head = self.hidden(tokens), self.head
        bias = None if head.bias is None else head.bias.detach().to(hidden.dtype)
        weight = head.weight.detach().to(hidden.dtype)  # another one under autocast
        return bg.LinearTeacher(hidden, weight, bias, self.logit_scale, self.logit_softcap)

    def leading(self, vocab: int) -> heads.Head:
        """Hidden states to real logits of so many leading columns: a few states, to sample from."""
        head = self.head
        bias = None if head.bias is None else head.bias[:vocab]
        return heads.Head(head.weight[:vocab], bias, self.logit_scale, self.logit_softcap)

    def decoder(self) -> Decoder:
        """Reads texts that grow."""
        return Decoder(self.body)

    def freeze(self) -> None:
        """Make a teacher of it: no dropout, no gradients."""
        self.network.eval().requires_grad_(False)

    def clone(self) -> CausalLM:
        """A model of the same weights that shares none of them."""
        return CausalLM(copy.deepcopy(self.network), self.logit_scale, self.logit_softcap)


def _gathered(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def small_llama(shape: ModelShape, vocab: int, length: int, seed: int) -> CausalLM:
    """A Llama of random weights with tied embeddings.

    Args:
        shape: its size.
        vocab: tokens.
        length: longest sequence.
        seed: of the weights; torch's global generator is left as it was.
    """
    with extra():
        from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=shape.hidden,
        intermediate_size=max(32, shape.hidden * 8 // 3 // 32 * 32),
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        initializer_range=shape.hidden**-0.5,  # the usual 0.02 starts so narrow a model too small
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CausalLM(LlamaForCausalLM(config))


def load_pretrained(
    name: str, option: str, length: int
) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """A Hugging Face model and its tokenizer, in fp32.

    Args:
        name: a path or a name.
        option: the command-line option that named it, for messages.
        length: the longest sequence it will see.

    Raises:
        ModelError: it cannot be loaded, its head cannot be read, or ``length`` is too long for it.
    """
    with extra():
        from transformers import AutoModelForCausalLM, AutoTokenizer
    try:
        with _no_bars():
            network = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(name)
    except ImportError as error:  # of quantised weights
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{option} {name} needs a package that is not installed: {reason}"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{option} must be the path or the name of a Hugging Face causal language model with "
            f"its tokenizer; {name!r} could not be loaded: {error}"
        ) from error
    limit = getattr(network.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ModelError(
            f"{option} {name} takes at most {limit} tokens; lower --sequence-length, now {length}"
        )
    return read_head(network, option), tokenizer


def read_head(network: Any, option: str) -> CausalLM:
    """Find the head of a model, and check on four tokens that it is the whole of it.

    Raises:
        ModelError: there is no head, or it is more than one matrix and a bias.
    """
    if hasattr(network, "peft_config"):
        raise ModelError(
            f"{option} is wrapped by PEFT, so its weights are not all in the head that the loss "
            "reads; merge the adapter first: model.merge_and_unload()"
        )
    try:
        heads.verify(network)
        head = heads.read(network)
    except heads.HeadError as error:
        raise ModelError(f"{option}: {error}") from error
    network.eval()
    return CausalLM(network, head.logit_scale, head.logit_softcap)


def check_same_tokenizer(
    one: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    sample: str,
    pair: str,
) -> None:
    """Refuse two teachers, or a teacher and its student, whose tokens differ.

    Args:
        one, other: the two tokenizers.
        sample: some text that both must encode alike.
        pair: the options that named their models, for the message.

    Raises:
        ModelError: they differ; the message shows where.
    """
    detail = difference(one, other, sample)
    if detail:
        raise ModelError(f"{pair} must share one tokenizer, and these differ: {detail}")


def difference(
    one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, sample: str
) -> str | None:
    """In what two tokenizers differ on their tokens or on some text; None: in nothing."""
    left, right = one.get_vocab(), other.get_vocab()
    odd = next((t for t in sorted(left.keys() | right.keys()) if left.get(t) != right.get(t)), None)
    if odd is not None:
        return f"token {odd!r} is number {left.get(odd)} in one and {right.get(odd)} in the other"
    if one.encode(sample) != other.encode(sample):
        return "they have the same tokens but cut text differently"
    return None


def export(model: CausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save model and tokenizer so that ``from_pretrained(folder)`` loads them.

    Every process must come here, and the first one writes.

    Raises:
        TrainingError: the disk is full or the folder is not writable.
    """
    save(model, folder)
    if ranks.first():
        with writing(folder):
            tokenizer.save_pretrained(folder)


def save(model: CausalLM, folder: Path) -> None:
    """Save a model alone, as :func:`export` does."""
    state = get_model_state_dict(model.network, options=WHOLE)
    if ranks.first():
        with writing(folder), _no_bars():
            model.network.save_pretrained(folder, state_dict=state)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failed write of a model inside the block into a message that names its folder."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"could not write {folder}: {error}") from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the bars of ``transformers`` out of ours."""
    import transformers

    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
