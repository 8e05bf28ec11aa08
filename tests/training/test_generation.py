"""What a model says next: the same as without a cache, in whatever company a row is."""

from __future__ import annotations

import math

import pytest
import torch

from bgkernels.training import models
from bgkernels.training.config import ModelShape
from bgkernels.training.decoding import Decoder
from bgkernels.training.generation import continue_text, generate
from bgkernels.training.sampling import row_seeds

VOCAB, GIVEN, LENGTH = 50, 7, 12


@pytest.fixture(scope="module")
def model():
    speaker = models.small_llama(ModelShape(32, 2, 2), VOCAB, 64, seed=3)
    speaker.network.lm_head.weight.data.mul_(3)  # sure enough to be followed
    speaker.freeze()
    return speaker


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(VOCAB, (70, GIVEN), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def slowly(model, prompt, length, vocab, seed, temperature=1.0):
    """One row, read anew for each token; ``seed`` is the row's own."""
    text, blocks = prompt.tolist(), torch.arange(vocab).split(math.ceil(vocab**0.5))
    numbers = torch.Generator().manual_seed(seed * 1_000_003)
    race = -torch.rand(64, len(blocks) + len(blocks[0]), generator=numbers).log()
    for position in range(len(text), len(text) + length):
        logits = model.network(torch.tensor([text])).logits[0, -1, :vocab]
        p = (logits / (temperature or 1e-4)).softmax(-1)
        of_block, of_column = race[position].split([len(blocks), len(blocks[0])])
        block = blocks[(torch.stack([p[b].sum() for b in blocks]) / of_block).argmax()]
        text.append(int(block[(p[block] / of_column[: len(block)]).argmax()]))
    return text[len(prompt) :]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("vocab", [VOCAB, 20])
def test_a_cache_changes_nothing(model, prompts, temperature, vocab):
    said = generate(model, prompts[:3], LENGTH, vocab, seed=5, temperature=temperature)
    expected = [
        slowly(model, prompt, LENGTH, vocab, seed, temperature)
        for prompt, seed in zip(prompts[:3], row_seeds(5, 3), strict=True)
    ]
    assert said.tolist() == expected and said.max() < vocab


def test_a_row_does_not_see_its_neighbours(model, prompts):
    together = generate(model, prompts, LENGTH, VOCAB, seed=1)
    for rows in (slice(0, 1), slice(5, 9), slice(60, 70)):
        seeds = row_seeds(1, 70)[rows]
        assert torch.equal(generate(model, prompts[rows], LENGTH, VOCAB, seeds), together[rows])


def test_a_longer_text_begins_as_a_shorter_one(model, prompts):
    long, short = (generate(model, prompts, n, VOCAB, seed=1) for n in (LENGTH, LENGTH // 2))
    assert torch.equal(long[:, : LENGTH // 2], short)


def test_a_text_that_is_continued_twice(model, prompts):
    whole = continue_text(model, prompts, LENGTH, VOCAB, seed=1)
    part = continue_text(model, prompts, 5, VOCAB, seed=1)
    assert torch.equal(continue_text(model, part, LENGTH - 5, VOCAB, seed=1), whole)


@pytest.mark.parametrize("stop", [None, 3])
def test_prompts_of_many_lengths(model, prompts, stop):
    lengths = torch.arange(len(prompts)) % GIVEN + 1
    text = prompts.where(torch.arange(GIVEN) < lengths[:, None], 17)  # what is not read is anything
    said = generate(model, text, LENGTH, VOCAB, seed=2, lengths=lengths, stop=stop)
    alone = [
        generate(model, row[None, :n], LENGTH, VOCAB, [seed], stop=stop)
        for row, n, seed in zip(prompts, lengths, row_seeds(2, len(prompts)), strict=True)
    ]
    assert torch.equal(said, torch.cat(alone))


def test_a_row_ends_where_it_says_so(model, prompts):
    free = generate(model, prompts, LENGTH, VOCAB, seed=4)
    stop = int(free.flatten().mode().values)
    said = generate(model, prompts, LENGTH, VOCAB, seed=4, stop=stop)
    ended = (free == stop).cumsum(-1) > 0
    assert ended.any() and not ended[:, -1].all()
    assert torch.equal(said, free.where(~ended, stop))


def test_nothing_is_read_after_the_last_row_ended(model, prompts, monkeypatch):
    free = generate(model, prompts[:1], LENGTH, VOCAB, seed=4)
    read, calls = Decoder._read, []
    monkeypatch.setattr(Decoder, "_read", lambda *x: calls.append(x) or read(*x))
    generate(model, prompts[:1], LENGTH, VOCAB, seed=4, stop=int(free[0, 3]))
    assert len(calls) == 1 + free[0].tolist().index(free[0, 3])


def test_samples_have_the_frequencies_of_the_model(model, prompts):
    rows = 4096
    said = generate(model, prompts[:1].expand(rows, -1), 1, VOCAB, seed=0)[:, 0]
    with torch.no_grad():
        expected = model.network(prompts[:1]).logits[0, -1].softmax(-1) * rows
    found = said.bincount(minlength=VOCAB)
    assert ((found - expected) ** 2 / expected).sum() < VOCAB + 5 * (2 * VOCAB) ** 0.5


def test_the_prompt_comes_first(model, prompts):
    text = continue_text(model, prompts, LENGTH, VOCAB, seed=0, temperature=0.0)
    assert torch.equal(text[:, :GIVEN], prompts)
    expected = generate(model, prompts, LENGTH, VOCAB, seed=9, temperature=0.0)
    assert torch.equal(text[:, GIVEN:], expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lengths": torch.tensor([1, GIVEN + 1])}, r"`lengths` must be 2 numbers from 1 to 7"),
        ({"lengths": torch.tensor([0, 1])}, r"`lengths` must .* got \[0, 1\]"),
        ({"lengths": torch.tensor([1])}, r"`lengths` must be 2 numbers"),
        ({"temperature": -1.0}, r"`temperature` must be 0 or positive; got -1.0"),
        ({"temperature": float("nan")}, r"`temperature` must .* got nan"),
        ({"seed": [1]}, r"`seed` must be one number or one for each of 2 rows; got \[1\]"),
    ],
)
def test_bad_input_is_named(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts[:2], 3, VOCAB, **{"seed": 0, **options})
