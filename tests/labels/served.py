"""A served teacher as a source of labels, and labels that are the same."""

from __future__ import annotations

from pathlib import Path

import torch

import bgkernels as bg
from bgkernels.labels import LabelDataset
from bgkernels.labels.served.api import HiddenStates
from bgkernels.labels.served.client import Client
from bgkernels.labels.served.source import ServedStates
from bgkernels.training.models import CausalLM


def states(client: Client, teacher: CausalLM) -> ServedStates:
    """The hidden states that a server sends, and the teacher's head."""
    weight = teacher.head.weight.detach()
    head = bg.LinearTeacher(weight.new_empty(0, weight.shape[1]), weight)
    return ServedStates(HiddenStates(client, "teacher", torch.float32), head, "teacher", "digest")


def same(one: Path, other: Path) -> None:
    """Labels of equal columns and samples, but for ties, and numbers equal to rounding."""
    left, right = LabelDataset(one), LabelDataset(other)
    tokens = changed = 0
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        for name in ("logprobs", "entropy", "power_sum"):
            x, y = getattr(a.labels, name), getattr(b.labels, name)
            torch.testing.assert_close(x, y, rtol=2e-3, atol=1e-5)  # stored in fp16
        tokens += len(a.tokens)
        changed += int((a.labels.sample != b.labels.sample).sum())
        changed += int((a.labels.indices != b.labels.indices).any(-1).sum())
    assert changed <= tokens / 500
