"""A teacher with another tokenizer: tokens matched by bytes, positions by what has been read.

python examples/two_tokenizers.py --steps 60
"""

import argparse
from collections.abc import Iterator

import tiny
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.integrations.causal_lm import attach

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
args, text = parser.parse_args(), tiny.TEXT[:50_000]
tokenizer, teacher_tokenizer = (
    tiny.tokenizer().train_new_from_iterator([text], size) for size in (500, 600)
)


def llama(width: int, vocab: int) -> torch.nn.Module:
    """One layer of random weights."""
    model = tiny.llama(width)
    model.resize_token_embeddings(vocab, mean_resizing=False)
    return model


def batches(ids: list[int], length: int = 33) -> Iterator[Tensor]:
    """Windows from anywhere in the text."""
    tokens, generator = torch.tensor(ids), torch.Generator().manual_seed(0)
    for _ in range(args.steps):
        starts = torch.randint(len(tokens) - length, (8, 1), generator=generator)
        yield tokens[starts + torch.arange(length)]


def train(model: torch.nn.Module, ids: list[int]) -> list[float]:
    """The losses of a few steps."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for tokens in batches(ids):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


ids, teacher_ids = (t(text, verbose=False).input_ids for t in (tokenizer, teacher_tokenizer))
teacher, student = llama(64, len(teacher_tokenizer)), llama(32, len(tokenizer))
train(teacher, teacher_ids)

match = bg.vocabularies.match(tokenizer, teacher_tokenizer)
match = bg.vocabularies.agreeing(match, [ids], [teacher_ids])  # used alike by both
shared = bg.vocabularies.coverage(match, tokenizer, teacher_tokenizer, [text])
attachment = attach(student, teacher, tokenizer=match, teacher_tokenizer=teacher_tokenizer)
losses = train(student, ids)
print(f"{shared.aligned:.0%} of the positions have soft labels; loss {losses[-1]:.3f}")
