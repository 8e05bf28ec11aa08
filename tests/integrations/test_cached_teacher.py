"""Cached labels in a trainer: with every column kept, they are the teacher."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra `integrations`: transformers")
pytest.importorskip("accelerate", reason="needs the extra `integrations`: accelerate")

import bgkernels as bg
from bgkernels import labels
from bgkernels.integrations.causal_lm import attach
from bgkernels.integrations.labels import CachedTeacher
from bgkernels.integrations.transformers import HybridDistillationTrainer
from tests.integrations.steps import arguments
from tests.models import VOCAB, batch, tiny


def documents(teacher: Any) -> list[labels.Document]:
    """Three texts of unequal length, with the teacher's whole distribution."""
    data = batch()
    with torch.no_grad():
        logprobs = teacher(data["input_ids"]).logits.log_softmax(-1)
    kept = logprobs.topk(VOCAB)
    lengths = (9, 7, 5)
    return [
        labels.Document(ids[:n], bg.SoftLabels(i[:n], p[:n]))
        for n, ids, i, p in zip(lengths, data["input_ids"], kept.indices, kept.values, strict=True)
    ]


def cached(teacher: Any) -> tuple[CachedTeacher, list[labels.Document]]:
    texts = documents(teacher)
    return CachedTeacher(SimpleNamespace(info=None, match=None, collate=labels.collate)), texts


def test_all_columns_are_the_teacher() -> None:
    student, teacher = tiny(), tiny(seed=1)
    stored, texts = cached(teacher)
    data = stored.collate(texts)
    plain = {k: v for k, v in data.items() if k not in stored.columns}
    attach(student, teacher, routing="confidence")
    expected = student(**plain).loss
    attach(student, stored, routing="confidence")
    torch.testing.assert_close(student(**data).loss, expected, rtol=1e-5, atol=1e-6)


def test_in_the_trainer(tmp_path: Path) -> None:
    stored, texts = cached(tiny(seed=1))
    student = tiny()
    trainer = HybridDistillationTrainer(
        student,
        arguments(tmp_path, max_steps=20, learning_rate=3e-3, optim="adamw_torch"),
        teacher=stored,
        data_collator=stored.collate,
        train_dataset=texts * 4,
        eval_dataset=texts,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
