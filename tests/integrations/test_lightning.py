"""The Lightning module: a step is the dense one, fifty learn, a checkpoint is of the student."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra `integrations`: lightning")
pytest.importorskip("transformers", reason="needs the extra `training`: transformers")

from lightning import Trainer
from torch.utils.data import DataLoader

import bgkernels as bg
from bgkernels.integrations.lightning import HybridDistillationModule
from bgkernels.integrations.probe.watch import NotDistillingError
from tests.integrations.two_tokenizers import Pair
from tests.models import batch, dense, tiny

LOSS = {"routing": bg.routing.entropy(kind="shannon"), "temperature": 2.0}


def fit(
    module: HybridDistillationModule, folder: Path, steps: int, batches: Any = None, **changes: Any
) -> Trainer:
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **changes,
    )  # fmt: skip
    data = DataLoader(batches or [batch(rows=4)] * 5, batch_size=None)
    trainer.fit(module, train_dataloaders=data, val_dataloaders=data)
    return trainer


def test_a_step_is_the_dense_one(tmp_path: Path) -> None:
    reference, data = tiny().double(), batch(rows=4)
    valid = (data["labels"][:, 1:] != -100).sum()
    (dense(reference, tiny(seed=1).double(), data, 2.0) / valid).backward()
    student = tiny()
    sgd = partial(torch.optim.SGD, lr=0.1)
    module = HybridDistillationModule(student, tiny(seed=1), loss=LOSS, optimizer=sgd)
    fit(module, tmp_path, 1, enable_checkpointing=False)
    for name, p in reference.named_parameters():
        expected = p.detach() - 0.1 * p.grad
        torch.testing.assert_close(student.get_parameter(name).double(), expected, msg=name,
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


def test_a_batch_without_labels_is_loud(tmp_path: Path) -> None:
    module = HybridDistillationModule(tiny(), tiny(seed=1))
    data = {k: v for k, v in batch().items() if k != "labels"}
    with pytest.raises(
        NotDistillingError, match=r"no `labels` \(it has input_ids, attention_mask\)"
    ):
        module.training_step(data, 0)


def test_two_tokenizers(tmp_path: Path) -> None:
    pair = Pair.make()
    (reference, teacher), data = (m.double() for m in pair.models()), pair.batch()
    pair.dense(reference, teacher, data).div((data["labels"][:, 1:] >= 0).sum()).backward()
    student, teacher = pair.models()
    sgd = partial(torch.optim.SGD, lr=0.1)
    module = HybridDistillationModule(
        student, teacher, **pair.both, loss={"routing": "static"}, optimizer=sgd
    )
    fit(module, tmp_path, 1, [data], enable_checkpointing=False)
    assert "teacher_input_ids" in module.on_before_batch_transfer(data, 0)
    for name, p in reference.named_parameters():
        expected = p.detach() - 0.1 * p.grad
        torch.testing.assert_close(student.get_parameter(name).double(), expected, msg=name,
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


def test_fifty_steps_learn(tmp_path: Path) -> None:
    adam = partial(torch.optim.AdamW, lr=3e-3)
    routing = bg.routing.curriculum(lambda step: min(1.0, step / 10))
    module = HybridDistillationModule(
        tiny(), tiny(seed=1, hidden_size=24), loss={"routing": routing}, optimizer=adam
    )
    trainer = fit(module, tmp_path, 50)
    assert routing.step == 49
    found = trainer.callback_metrics
    assert found["val_loss"] < 0.5 and found["val_hard_loss"] > 0 and found["bridge_share"] <= 1
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"student"}
    student = tiny(seed=5)
    student.load_state_dict({k.removeprefix("student."): v for k, v in saved["state_dict"].items()})
