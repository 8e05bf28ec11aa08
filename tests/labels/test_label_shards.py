"""The arrays of a shard: every shape comes back, and rounding costs what is said."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bgkernels as bg
from bgkernels.labels import Document, LabelError, collate
from bgkernels.labels.shard import ShardBuilder, decode


@pytest.mark.parametrize("vocab", [40_000, 200_000])
def test_what_rounding_costs(vocab):
    """Nothing of the kept mass, a thousandth of log p, and below 1e-6 nats of divergence."""
    z = 3 * torch.randn(200, vocab)
    k, tokens = 64, torch.zeros(200, dtype=torch.int64)
    labels = bg.capture(bg.LogitsTeacher(z), k)
    builder = ShardBuilder(vocab)
    builder.add([tokens], labels)
    arrays = builder.tensors()
    got = decode(arrays, 0).labels
    assert torch.equal(got.indices, labels.indices)
    before, after = labels.logprobs.double(), got.logprobs.double()
    assert ((after - before).abs() <= 2**-10 * before.abs() + 1e-6).all()
    assert (after.logsumexp(-1) - before.logsumexp(-1)).abs().max() < 1e-6
    kl = (before.exp() * (before - after)).sum(-1)
    assert kl.max() < 1e-6 and kl.min() > -1e-7
    size = sum(x.numel() * x.element_size() for x in arrays.values())
    assert size <= 6 * got.indices.numel()


def test_ragged_rows_and_missing_statistics():
    indices = torch.tensor([[3, 1, -1], [70_000, 2, 9], [-1, -1, -1]])
    logprobs = torch.tensor([[0.7, 0.3, 0.0], [0.5, 0.2, 0.1], [0.0, 0.0, 0.0]]).log()
    builder = ShardBuilder(vocab=80_000)
    builder.add([torch.tensor([1, 2]), torch.tensor([3])], bg.SoftLabels(indices, logprobs))
    arrays = builder.tensors()
    first, second = decode(arrays, 0).labels, decode(arrays, 1).labels
    assert first.indices.tolist() == indices[:2].tolist() and second.indices.shape == (1, 0)
    assert first.sample is None and first.entropy is None and first.power_sum is None
    torch.testing.assert_close(first.logprobs[:, :2], logprobs[:2, :2], atol=0, rtol=2**-10)
    batch = collate([decode(arrays, 1), decode(arrays, 0)])
    assert batch.indices.shape == (2, 2, 3) and batch.entropy is None
    assert batch.target.tolist() == [[-100, -100], [2, -100]]
    unlabelled = bg.SoftLabels(indices.roll(1, 0)[:2], logprobs.roll(1, 0)[:2])
    assert collate([Document(torch.tensor([1, 2]), unlabelled)]).target.tolist() == [[-100, -100]]
    assert batch.indices[0].eq(-1).all() and batch.mask.tolist() == [[True, False], [True, True]]


@given(
    st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=5),
    st.sampled_from([7, 2**16, 2**16 + 1, 2**24]),
    st.integers(0, 2**32),
)
def test_any_shape_comes_back(counts, vocab, seed):
    """``counts`` are the kept entries of each token of each document."""
    chance, builder, made = random.Random(seed), ShardBuilder(vocab), []
    for document in counts:
        rows = [chance.sample(range(vocab), n) for n in document]
        rows = [[vocab - 1, *(x for x in row if x != vocab - 1)][:6] if row else [] for row in rows]
        indices = torch.tensor([row + [-1] * (6 - len(row)) for row in rows]).reshape(-1, 6).long()
        logits = torch.tensor([[chance.gauss(0, 4) for _ in range(7)] for _ in rows])
        labels = bg.SoftLabels(indices, logits.reshape(-1, 7).log_softmax(-1)[:, :6])
        tokens = torch.tensor([chance.randrange(vocab) for _ in rows]).long()
        builder.add([tokens], labels)
        made.append(Document(tokens, labels))
    arrays = builder.tensors()
    for i, expected in enumerate(made):
        found = decode(arrays, i)
        assert torch.equal(found.tokens, expected.tokens)
        k, present = found.labels.indices.shape[1], expected.labels.indices >= 0
        assert torch.equal(found.labels.indices, expected.labels.indices[:, :k])
        assert not present[:, k:].any()
        before, after = expected.labels.logprobs[present], found.labels.logprobs[present[:, :k]]
        torch.testing.assert_close(after, before, atol=1e-6, rtol=2**-10)
        assert found.labels.logprobs[~present[:, :k]].eq(-math.inf).all()


@pytest.mark.parametrize(
    ("column", "logprob", "message"),
    [
        (5, -1.0, "a column is 5, which cannot be"),
        (1, math.nan, "a log-probability is nan"),
        (1, 0.5, "a log-probability is 0.5"),
        (1, -math.inf, "a log-probability is -inf"),
    ],
)
def test_what_cannot_be_is_refused(column, logprob, message):
    labels = bg.SoftLabels(torch.tensor([[0, column]]), torch.tensor([[-0.5, logprob]]))
    with pytest.raises(LabelError, match=message):
        ShardBuilder(5).add([torch.tensor([0])], labels)
    twice = bg.SoftLabels(torch.tensor([[0, 0]]), torch.tensor([[-0.5, -0.5]]))
    with pytest.raises(LabelError, match=r"log of a row's probabilities is 0\.19"):
        ShardBuilder(5).add([torch.tensor([0])], twice)
    with pytest.raises(LabelError, match=r"1 to 2\*\*24 columns"):
        ShardBuilder(2**24 + 1)
