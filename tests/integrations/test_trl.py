"""TRL's trainers with our loss: its own loss where the configuration coincides, and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs the extra `integrations`: trl")
pytest.importorskip("datasets", reason="needs the extra `integrations`: datasets")

from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from bgkernels.integrations.trl import HybridGKDTrainer, HybridOnPolicyTrainer
from bgkernels.vocabularies import Translator, match
from tests.integrations.two_tokenizers import Pair, coarse
from tests.models import sentence, tiny, tokenizer
from tests.vocabularies import toys

COMMON: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": False,
    "gradient_checkpointing": False, "learning_rate": 1e-2, "logging_steps": 1,
}  # fmt: skip


def gkd(folder: Path, loss: dict[str, Any] | None = None, **changes: Any) -> HybridGKDTrainer:
    def chat(i: int) -> list[dict[str, str]]:
        question = {"role": "user", "content": sentence(2 + i % 3, i)}
        return [question, {"role": "assistant", "content": sentence(3 + i % 4, 100 + i)}]

    data = Dataset.from_list([{"messages": chat(i)} for i in range(8)])
    args = GKDConfig(str(folder), **COMMON | {"max_new_tokens": 4, "max_length": 24} | changes)
    return HybridGKDTrainer(
        tiny(),
        tiny(seed=1, hidden_size=24),
        args,
        train_dataset=data,
        processing_class=tokenizer(),
        loss=loss,
    )


def on_policy(folder: Path, loss: dict[str, Any] | None = None, **changes: Any) -> Any:
    data = Dataset.from_list([{"prompt": sentence(2 + i % 3, i)} for i in range(8)])
    args = DistillationConfig(str(folder), **COMMON | {"max_completion_length": 5} | changes)
    return HybridOnPolicyTrainer(
        tiny(),
        tiny(seed=1, hidden_size=24),
        args,
        train_dataset=data,
        processing_class=tokenizer(),
        loss=loss,
    )


def assert_same_loss(trainer: Any, theirs: Any, inputs: Any, num_items: Any) -> None:
    """Our loss and its gradients are TRL's, on the same batch of the same trainer."""
    model = trainer.model.train()
    found = []
    for compute in (type(trainer).compute_loss, theirs.compute_loss):
        loss = compute(trainer, model, inputs, num_items_in_batch=num_items)
        found.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
        trainer.attachment.remove()
    (ours, our_gradients), (expected, gradients) = found
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    for got, ref in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(got, ref, rtol=0, atol=1e-5 * float(ref.abs().max()))


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_gkd_is_trls_own_loss_with_soft_labels(tmp_path: Path, beta: float) -> None:
    trainer = gkd(tmp_path, {"routing": "soft"}, beta=beta)
    inputs = next(iter(trainer.get_train_dataloader()))
    assert_same_loss(trainer, GKDTrainer, inputs, torch.tensor(11))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_distillation_is_trls_own_loss_with_soft_labels(tmp_path: Path, beta: float) -> None:
    trainer = on_policy(tmp_path, {"routing": "soft"}, beta=beta)
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert_same_loss(trainer, DistillationTrainer, inputs, None)


def of_two_tokenizers(
    folder: Path, pair: Pair, padding: int = 6, **loss: Any
) -> HybridOnPolicyTrainer:
    student, teacher = pair.models(padding)
    data = Dataset.from_list([{"prompt": text[:20]} for text in toys.TEXTS * 2])
    args = DistillationConfig(str(folder), **COMMON | {"max_completion_length": 9})
    return HybridOnPolicyTrainer(
        student, teacher, args, train_dataset=data, processing_class=pair.student,
        teacher_tokenizer=pair.teacher, loss=loss,
    )  # fmt: skip


def test_on_policy_with_two_tokenizers(tmp_path: Path) -> None:
    """KL of coarse distributions where the teacher speaks, over all tokens that were generated."""
    pair = Pair.make()
    trainer = of_two_tokenizers(tmp_path, pair, padding=0, divergence="forward_kl")
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=None)
    trainer.attachment.remove()
    found, models = match(pair.student, pair.teacher), (trainer.model, pair.models()[1])
    translate, terms = Translator(found, pair.teacher), []
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    for prompt, start, said, mask in zip(*(inputs[name] for name in names), strict=True):
        own = torch.cat([prompt[start.bool()], said[mask.bool()]])
        rows = coarse(*models, own, translate(own[None]).ids[0], found)
        terms += [kl for _, kl in rows][int(start.sum()) - 1 :]
    spoken = [kl for kl in terms if kl is not None]
    assert 0 < len(spoken) < len(terms)
    expected = torch.stack(spoken).sum() / inputs["num_items_in_batch"]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_on_policy_trains_with_two_tokenizers(tmp_path: Path) -> None:
    trainer = of_two_tokenizers(tmp_path, Pair.make())
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    logged = [e for e in trainer.state.log_history if "loss" in e]
    assert len(logged) == 2 and all(e["soft_loss"] > 0 for e in logged)
    assert not torch.equal(trainer.model.lm_head.weight, before)


def test_a_hard_label_that_is_the_student_s_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`routing` must be 'soft' .*; got 'static'"):
        of_two_tokenizers(tmp_path, Pair.make(), routing="static")
    with pytest.raises(ValueError, match=r"use HybridSFTTrainer .* or HybridOnPolicyTrainer"):
        HybridGKDTrainer(tiny(), tiny(seed=1), teacher_tokenizer=tokenizer())


@pytest.mark.parametrize("lmbda", [0.0, 1.0], ids=["data", "generated"])
def test_gkd_trains(tmp_path: Path, lmbda: float) -> None:
    trainer = gkd(tmp_path, lmbda=lmbda)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert trainer.attachment.target == ("teacher_argmax" if lmbda else "labels")
    logged = [e for e in trainer.state.log_history if "loss" in e]
    assert len(logged) == 2 and all(e["hard_loss"] > 0 and e["soft_loss"] > 0 for e in logged)
    assert not torch.equal(trainer.model.lm_head.weight, before)


def test_on_policy_trains_and_saves(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trainer = on_policy(tmp_path, {"routing": "confidence"}, bf16=True, gradient_checkpointing=True)
    trainer.train()
    logged = [e for e in trainer.state.log_history if "loss" in e]
    assert len(logged) == 2 and all(0 <= e["bridge_share"] <= 1 for e in logged)
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(saved.lm_head.weight, trainer.model.lm_head.weight)
