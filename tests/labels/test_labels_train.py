"""Labels from disk train a student as the teacher does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.labels import CaptureConfig, LabelDataset, generate
from tests.labels.documents import DOCUMENTS, VOCAB, make_teacher


@pytest.mark.parametrize("routing", ["soft", "entropy"])
def test_a_student_learns_the_same_from_disk(routing: str, tmp_path: Path) -> None:
    teacher = make_teacher()
    generate(teacher, DOCUMENTS, tmp_path, CaptureConfig(k=VOCAB, batch_size=3))
    dataset = LabelDataset(tmp_path)
    batch = dataset.collate([dataset[i] for i in range(len(dataset))])
    assert batch.indices.shape[-1] == VOCAB
    loss = bg.LinearHybridDistillationLoss(routing=routing)

    def step(source: Any) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(0)
        hidden = torch.randn(*batch.tokens.shape, 12, generator=random).requires_grad_()
        weight = torch.randn(VOCAB, 12, generator=random).requires_grad_()
        value = loss(hidden, weight, source, batch.target)
        return value.detach(), *torch.autograd.grad(value, (hidden, weight))

    cached, live = step(batch.teacher()), step(teacher.as_teacher(batch.tokens))
    for ours, reference in zip(cached, live, strict=True):
        assert (ours - reference).abs().max() < 2e-3 * reference.abs().max()
