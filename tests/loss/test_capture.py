"""Capture: the head of a teacher's distribution, and statistics taken before it was cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bgkernels as bg
from tests import oracle
from tests.yardstick import assert_close

EPS = torch.finfo(torch.float32).eps


def make(rows=7, hidden=12, vocab=50, dtype=torch.float32, **cap):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, rows, hidden, generator=generator, dtype=dtype)
    w = torch.randn(vocab, hidden, generator=generator, dtype=dtype)
    b = torch.randn(vocab, generator=generator, dtype=dtype)
    return bg.LinearTeacher(x, w, b, **cap)


def dense(teacher, temperature, dtype=torch.float64):
    """Log-probabilities ``(..., vocab)`` from the oracle's logits."""
    tensors = (x.to(dtype) for x in teacher.tensors)
    z = oracle.real_logits(
        *tensors, logit_scale=teacher.logit_scale, logit_softcap=teacher.logit_softcap
    )
    return (z / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("cap", [{}, {"logit_scale": -0.5, "logit_softcap": 3.0}], ids=str)
def test_against_dense(backend, tiling, temperature, cap):
    tiling(chunk=5, width=16)
    teacher = make(**cap)
    labels = bg.capture(teacher, 8, temperature=temperature, gamma=0.3, seed=1, backend=backend)
    ref, yard = dense(teacher, temperature), dense(teacher, temperature, torch.float32)
    assert torch.equal(labels.indices, ref.topk(8).indices)
    assert_close(labels.logprobs, ref.topk(8).values, yard.topk(8).values, EPS)
    for ours, reduce in (
        (labels.entropy, lambda lp: -(lp.exp() * lp).sum(-1)),
        (labels.power_sum, lambda lp: (0.3 * lp).logsumexp(-1)),
    ):
        assert_close(ours, reduce(ref), reduce(yard), EPS)


def test_all_columns_are_the_distribution(backend, tiling):
    tiling(chunk=3, width=7)
    labels = bg.capture(make(), 50, backend=backend)
    assert torch.equal(labels.indices.sort(-1).values, torch.arange(50).expand(2, 7, 50))
    assert labels.logprobs.double().exp().sum(-1).sub(1).abs().max() < 50 * EPS


def test_sample_is_the_pass_s_own(backend, tiling):
    teacher = make(rows=40)
    student = torch.zeros(2, 40, 3), torch.zeros(50, 3)
    expected = bg.linear_row_stats(*student, teacher, "teacher_sample", seed=11).label
    tiling(chunk=9, width=16)
    assert torch.equal(bg.capture(teacher, 2, seed=11, backend=backend).sample, expected)
    later = bg.LinearTeacher(teacher.hidden[1], teacher.weight, teacher.bias)
    again = bg.capture(later, 2, seed=11, first_row=40, temperature=2.0, backend=backend)
    assert torch.equal(again.sample, expected[1])
    assert not torch.equal(bg.capture(teacher, 2, seed=12).sample, expected)


def test_masked_columns_are_left_out(backend):
    logits = torch.randn(4, 20)
    logits[:, 3:] = -math.inf
    labels = bg.capture(bg.LogitsTeacher(logits), 5, backend=backend)
    assert (labels.indices[:, 3:] == -1).all() and (labels.logprobs[:, 3:] == -math.inf).all()
    assert torch.equal(labels.indices[:, :3], logits.topk(3).indices)
    assert (labels.sample < 3).all() and labels.entropy.isfinite().all()


def test_bf16_and_leading_columns(backend):
    teacher = make(dtype=torch.bfloat16)
    labels = bg.capture(teacher, 4, vocab_size=30, backend=backend)
    lp = (teacher.hidden.double() @ teacher.weight.double().T + teacher.bias)[..., :30]
    assert labels.indices.max() < 30
    found = lp.log_softmax(-1).gather(-1, labels.indices)
    assert (labels.logprobs - found).abs().max() < 8 * torch.finfo(torch.bfloat16).eps


class Largest(TorchDispatchMode):
    """The largest tensor, in elements, that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_no_tensor_of_tokens_by_vocabulary(backend):
    rows, vocab = 256, 4096
    teacher = bg.LinearTeacher(torch.randn(rows, 4), torch.randn(vocab, 4))
    with Largest() as largest:
        bg.capture(teacher, 16, memory_budget=2**19, backend=backend)
    assert rows < largest.elements <= 2**19 / 4 == rows * vocab / 8


def test_shapes():
    teacher = make()
    one = bg.capture(bg.LinearTeacher(teacher.hidden[0, 0], teacher.weight), 3)
    assert one.indices.shape == (3,) and one.entropy.shape == ()
    none = bg.capture(bg.LinearTeacher(teacher.hidden[:0], teacher.weight), 3)
    assert none.indices.shape == (0, 7, 3) and none.sample.shape == (0, 7)
    assert bg.capture(make(dtype=torch.float64), 3).logprobs.dtype == torch.float64


def test_a_nan_is_not_hidden(backend):
    logits = torch.randn(3, 20)
    logits[1, 4] = math.nan
    labels = bg.capture(bg.LogitsTeacher(logits), 5, backend=backend)
    assert labels.entropy.isnan().tolist() == [False, True, False]
    assert labels.logprobs[1].isnan().all() and labels.logprobs[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 51}, ValueError, "`k` must be at most the vocabulary, 50 columns; got 51"),
        ({"k": 31, "vocab_size": 30}, ValueError, "`k` must be at most the vocabulary, 30"),
        ({"k": 0}, ValueError, "`k` must be at least 1"),
        ({"gamma": 0.0}, ValueError, "`gamma` must be finite"),
        ({"temperature": 0.0}, ValueError, "`temperature`"),
        ({"first_row": -1}, ValueError, "`first_row`"),
        (
            {"teacher": bg.LinearTeacher(torch.zeros(3, 4), torch.zeros(9, 5))},
            ValueError,
            r"teacher: the weight must be \(vocab, hidden\) = \(9, 4\)",
        ),
        (
            {"teacher": bg.LogitsTeacher(torch.zeros(3, 9, requires_grad=True))},
            ValueError,
            "`teacher.logits` requires grad",
        ),
        ({"teacher": torch.zeros(3, 4)}, TypeError, "`teacher` must be a LinearTeacher"),
    ],
    ids=str,
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        bg.capture(**{"teacher": make(), "k": 4, **change})
