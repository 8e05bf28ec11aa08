"""Training of tiny models in the ``Trainer``, and the dense step beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

import bgkernels as bg
from bgkernels.integrations.transformers import HybridDistillationTrainer
from tests.models import batch, dense, tiny

SHANNON = bg.routing.entropy(kind="shannon")


def examples(n: int = 8) -> list[dict[str, Any]]:
    """Of unequal numbers of labels, so that a mean of means shows."""
    data = batch(rows=n, length=n + 6)
    return [{k: v[i] for k, v in data.items()} for i in range(n)]


def arguments(folder: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(**options | changes)


def trained(student: Any, folder: Path, **changes: Any) -> HybridDistillationTrainer:
    loss = {"routing": SHANNON, "temperature": 2.0}
    trainer = HybridDistillationTrainer(
        student,
        arguments(folder, **changes),
        teacher=tiny(seed=1, hidden_size=24),
        loss=loss,
        train_dataset=examples(),
        eval_dataset=examples(3),
    )
    trainer.train()
    return trainer


def sgd_step(student: Any) -> dict[str, torch.Tensor]:
    """Parameters after one step of SGD on the dense loss of all examples."""
    student, teacher = student.double(), tiny(seed=1, hidden_size=24).double()
    data = batch(rows=8, length=14)
    valid = int((data["labels"][:, 1:] != -100).sum())
    (dense(student, teacher, data, 2.0) / valid).backward()
    return {n: p.detach() - 0.1 * p.grad for n, p in student.named_parameters()}
