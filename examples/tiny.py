"""What the examples run on: a text of Python's own, a token a byte, and Llamas made in seconds.

In earnest these are your data and ``from_pretrained``; nothing here belongs to bgkernels.
"""

import functools
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "".join(topics.values())[:100_000]
"""Of what ``help()`` says of the language."""


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *letters])}
    core = Tokenizer(models.BPE(vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def llama(width: int) -> LlamaForCausalLM:
    """One layer of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=1, num_attention_heads=4, initializer_range=width**-0.5,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches(steps: int, text: str = TEXT, length: int = 65, seed: int = 0) -> Iterator[Tensor]:
    """``(8, length)`` tokens from anywhere in a text, as often as there are steps."""
    tokens = torch.tensor(tokenizer()(text, verbose=False).input_ids)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - length, (8, 1), generator=generator)
        yield tokens[starts + torch.arange(length)]


@functools.cache
def teacher(text: str = TEXT, width: int = 128, steps: int = 60) -> LlamaForCausalLM:
    """A Llama that has read in a text for a moment."""
    model = llama(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for tokens in batches(steps, text):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)
