"""DPO's loss from hidden states against dense torch in float64, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from bgkernels.integrations.dpo import dpo_loss, linear_sequence_log_probs
from tests.yardstick import assert_close

PAIRS, LENGTH, HIDDEN, VOCAB = 3, 7, 16, 101


def situation(dtype):
    """Hidden states of policy and reference, heads, and labels with prompts and padding."""
    generator = torch.Generator().manual_seed(0)
    x, r = (torch.randn(2 * PAIRS, LENGTH, HIDDEN, generator=generator) for _ in range(2))
    w, v = (torch.randn(VOCAB, HIDDEN, generator=generator) / 4 for _ in range(2))
    y = torch.randint(VOCAB, (2 * PAIRS, LENGTH), generator=generator)
    for i, row in enumerate(y):
        row[: 1 + i % 3] = row[LENGTH - i % 2 :] = -100
    return *(t.to(dtype) for t in (x, w, r, v)), y


def dense(x, w, y, cap=None):
    """Whole log-softmaxes, gathered at the labels and summed."""
    z = x @ w.T
    z = cap * torch.tanh(z / cap) if cap else z
    known = y != -100
    picked = z.log_softmax(-1).gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(known, picked, 0.0).sum(-1)


def dense_loss(x, w, r, v, y, beta, cap=None):
    """The same preference as a cross-entropy of two classes, pair by pair."""
    gain = dense(x, w, y, cap) - dense(r, v, y, cap).detach()
    margins = torch.stack([gain[i] - gain[PAIRS + i] for i in range(PAIRS)])
    return binary_cross_entropy_with_logits(beta * margins, torch.ones_like(margins))


def ours_loss(x, w, r, v, y, beta, cap=None):
    with torch.no_grad():
        reference = linear_sequence_log_probs(r, v, y, logit_softcap=cap)
    return dpo_loss(linear_sequence_log_probs(x, w, y, logit_softcap=cap), reference, beta=beta)


@pytest.mark.parametrize("cap", (None, 3.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_loss_and_gradients_are_those_of_dense_torch(dtype, cap):
    found = {}
    for name, loss, kind in (
        ("ours", ours_loss, dtype), ("yardstick", dense_loss, dtype),
        ("ref", dense_loss, torch.float64),
    ):  # fmt: skip
        x, w, r, v, y = (t.to(kind) if t.is_floating_point() else t for t in situation(dtype))
        x, w = x.requires_grad_(), w.requires_grad_()
        value = loss(x, w, r, v, y, 0.5, cap)
        value.backward()
        found[name] = value.detach()[None], x.grad, w.grad
    for ours, ref, yardstick in zip(*(found[k] for k in ("ours", "ref", "yardstick")), strict=True):
        assert ref.abs().max() > 1e-3
        assert_close(ours, ref, yardstick, torch.finfo(dtype).eps)


def test_a_policy_that_is_its_reference_has_no_preference():
    x, w, *_, y = situation(torch.float32)
    same = linear_sequence_log_probs(x, w, y)
    assert dpo_loss(same, same).item() == pytest.approx(math.log(2), rel=1e-12)


def test_the_gradient_prefers_the_chosen_and_leaves_the_reference_alone():
    policy = torch.tensor([-1.0, -2.0, -1.5, -1.0], requires_grad=True)
    reference = torch.full((4,), -1.0, requires_grad=True)
    dpo_loss(policy, reference, beta=2.0).backward()
    assert reference.grad is None
    assert (policy.grad[:2] < 0).all() and (policy.grad[2:] > 0).all()
    torch.testing.assert_close(policy.grad[:2], -policy.grad[2:])


def test_a_sequence_without_labels_is_refused():
    x, w, *_, y = situation(torch.float32)
    y[2] = -100
    with pytest.raises(ValueError, match=r"`target` must have a label.*sequences \[2\] have -100"):
        linear_sequence_log_probs(x, w, y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "`beta` must be a positive number"),
        ({"beta": math.nan}, "`beta` must be a positive number"),
        ({"log_probs": torch.zeros(3), "reference": torch.zeros(3)}, r"must be \(2·pairs,\)"),
        ({"log_probs": torch.zeros(0), "reference": torch.zeros(0)}, r"must be \(2·pairs,\)"),
        ({"log_probs": torch.zeros(2, 2)}, r"must be \(2·pairs,\)"),
        ({"reference": torch.zeros(2)}, "`reference` must hold the same sequences"),
    ],
)
def test_what_is_no_pair_is_refused(changes, message):
    given = {"log_probs": torch.zeros(4), "reference": torch.zeros(4), "beta": 0.1} | changes
    with pytest.raises(ValueError, match=message):
        dpo_loss(**given)
