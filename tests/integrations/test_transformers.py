"""``HybridDistillationTrainer`` and a plain ``Trainer`` with an attached loss."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra `integrations`: transformers")
pytest.importorskip("accelerate", reason="needs the extra `integrations`: accelerate")

import bgkernels as bg
from bgkernels.integrations.causal_lm import attach
from bgkernels.integrations.heads import HeadError
from bgkernels.integrations.probe.watch import NotDistillingError
from bgkernels.integrations.transformers import HybridDistillationTrainer, LossRows
from tests.integrations.steps import SHANNON, arguments, examples, sgd_step, trained
from tests.models import batch, dense, tiny


@pytest.mark.parametrize("changes", [
    {"gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 8, "gradient_checkpointing": True},
], ids=["accumulated", "checkpointed"])  # fmt: skip
def test_a_step_is_the_dense_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    expected = sgd_step(tiny())
    student = tiny()
    trained(student, tmp_path, **changes)
    for name, p in student.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_plain_trainer_with_an_attached_loss(tmp_path: Path) -> None:
    from transformers import Trainer

    expected = sgd_step(tiny())
    student = tiny()
    attach(student, tiny(seed=1, hidden_size=24), routing=SHANNON, temperature=2.0)
    args = arguments(tmp_path, gradient_accumulation_steps=4)
    Trainer(student, args, train_dataset=examples()).train()
    for name, p in student.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_fifty_steps_learn_and_the_checkpoint_is_plain(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    changes = {"max_steps": 50, "learning_rate": 3e-3, "optim": "adamw_torch", "bf16": True}
    schedule = {
        "eval_strategy": "steps",
        "eval_steps": 50,
        "save_strategy": "steps",
        "save_steps": 50,
    }
    student = tiny()
    trainer = trained(student, tmp_path, **changes, **schedule, logging_steps=10)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    entry = next(e for e in trainer.state.log_history if "hard_loss" in e)
    assert entry["soft_loss"] > 0 and 0 <= entry["bridge_share"] <= 1
    assert 0 < entry["teacher_entropy"] < torch.tensor(64.0).log()
    evaluated = next(e for e in trainer.state.log_history if "eval_loss" in e)
    assert evaluated["eval_hard_loss"] > 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-50")
    assert type(saved) is type(student)
    for name, p in saved.named_parameters():
        assert torch.equal(p, student.get_parameter(name)), name


def test_evaluation_is_the_dense_loss(tmp_path: Path) -> None:
    student, teacher = tiny(), tiny(seed=1, hidden_size=24)
    data = batch(rows=3, length=9)
    valid = (data["labels"][:, 1:] != -100).sum()
    expected = dense(student.double(), teacher.double(), data, 2.0) / valid
    trainer = HybridDistillationTrainer(
        student.float(),
        arguments(tmp_path),
        teacher=teacher.float(),
        loss={"routing": SHANNON, "temperature": 2.0},
        eval_dataset=examples(3),
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_compiled(tmp_path: Path) -> None:
    torch._dynamo.reset()
    expected = sgd_step(tiny(num_hidden_layers=1))
    student = tiny(num_hidden_layers=1)
    changes = {"torch_compile": True, "torch_compile_backend": "eager"}
    trained(student, tmp_path, per_device_train_batch_size=8, **changes)
    for name, p in student.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_peft(tmp_path: Path) -> None:
    """Adapters below the head learn; one on the head is refused, and a trained copy is read."""
    peft = pytest.importorskip("peft", reason="needs the extra `integrations`: peft")
    student = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    trained(student, tmp_path, max_steps=2)
    moved = {n for n, p in student.named_parameters() if "lora_B" in n and p.any()}
    assert len(moved) == 4
    assert student.get_base_model().lm_head.weight.grad is None

    student = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(HeadError, match=r"head of type Linear.*target_modules"):
        trained(student, tmp_path)
    later = tiny()
    attach(later, tiny(seed=1))
    later = peft.get_peft_model(later, peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(HeadError, match="target_modules"):
        later(**batch())
    attach(student.merge_and_unload(), tiny(seed=1))

    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    student = peft.get_peft_model(tiny(), config)
    trained(student, tmp_path)
    saved = student.get_base_model().lm_head
    assert not torch.equal(saved.modules_to_save["default"].weight, saved.original_module.weight)


def test_a_curriculum_follows_the_step(tmp_path: Path) -> None:
    seen: list[int] = []
    routing = bg.routing.curriculum(lambda step: seen.append(step) or 0.5)
    trainer = HybridDistillationTrainer(
        tiny(),
        arguments(tmp_path, max_steps=3),
        teacher=tiny(seed=1),
        loss={"routing": routing},
        train_dataset=examples(),
    )
    trainer.train()
    assert sorted(set(seen)) == [0, 1, 2]


def test_rows_are_counted_where_the_batch_is_made() -> None:
    data = batch()
    collate = LossRows(lambda items: data)
    valid = torch.nn.functional.pad(data["labels"][:, 1:] != -100, (0, 1))
    assert torch.equal(collate([])["loss_rows"], valid.flatten().nonzero().squeeze(1))
    assert collate.collator([]) is data and "loss_rows" not in data


def test_arguments_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    """What needs logits, or another model, is refused by name."""
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trained(tiny(), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"`use_liger_kernel` replaces the model's forward"):
        trained(tiny(), tmp_path, use_liger_kernel=True)
    for name, x in (("compute_metrics", lambda _: {}), ("model_init", lambda: tiny())):
        given = {name: x} | ({} if name == "model_init" else {"model": tiny()})
        with pytest.raises(ValueError, match=f"`{name}`"):
            HybridDistillationTrainer(args=arguments(tmp_path), teacher=tiny(seed=1), **given)
    args = arguments(tmp_path)
    assert args.n_gpu <= 1
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"nn\.DataParallel.*torchrun"):
        HybridDistillationTrainer(tiny(), args, teacher=tiny(seed=1))


def test_the_teacher_has_two_names(tmp_path: Path) -> None:
    """TRL's word is accepted."""
    args, teacher = arguments(tmp_path), tiny(seed=1)
    made = HybridDistillationTrainer(tiny(), args, teacher_model=teacher)
    assert made.attachment.teacher.model is teacher
    with pytest.raises(TypeError, match=r"`teacher` .* both were"):
        HybridDistillationTrainer(tiny(), args, teacher=teacher, teacher_model=teacher)


@pytest.mark.parametrize("how", ["compute_loss_func", "label_smoothing_factor", "liger"])
def test_a_loss_that_is_never_asked_for_is_loud(tmp_path: Path, how: str) -> None:
    """A plain ``Trainer`` that computes another loss of the model stops in its first step."""
    from transformers import Trainer

    def theirs(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs.logits.float().logsumexp(-1).mean()

    student = tiny()
    attach(student, tiny(seed=1))
    changes = {"label_smoothing_factor": 0.1} if how == "label_smoothing_factor" else {}
    given = {"compute_loss_func": theirs} if how == "compute_loss_func" else {}
    args = arguments(tmp_path, **changes)
    trainer = Trainer(student, args, train_dataset=examples(), **given)
    if how == "liger":  # which puts a forward of its own on the model, as this does
        student.forward = MethodType(type(student).forward, student)
    with pytest.raises(NotDistillingError, match=r"never computed.*HybridDistillationTrainer"):
        trainer.train()


def test_a_loss_of_ones_own_is_allowed_where_it_is_meant() -> None:
    student = tiny()
    attachment = attach(student, tiny(seed=1))
    with pytest.raises(NotDistillingError):
        student(batch()["input_ids"]).logits.mean().backward()
    attachment.remove()
    student(batch()["input_ids"]).logits.mean().backward()
    attachment = attach(student, tiny(seed=1))
    student(**batch()).loss.backward()
    student(batch()["input_ids"]).logits.mean().backward()  # beside the attached one


def test_a_teacher_may_read_columns_of_the_dataset(tmp_path: Path) -> None:
    """Stored logits go from the dataset to the teacher, and past the student."""
    teacher = tiny(seed=1)

    class Stored:
        columns = ("teacher_logits",)

        def __call__(self, inputs: Any, rows: Any) -> bg.LogitsTeacher:
            return bg.LogitsTeacher(inputs["teacher_logits"].flatten(0, 1)[rows])

    def stored(item: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            return {**item, "teacher_logits": teacher(item["input_ids"][None]).logits[0]}

    common = {"loss": {"routing": SHANNON}, "args": arguments(tmp_path)}
    given = {"eval_dataset": [{**stored(e), "useless": 1} for e in examples(3)]}
    kept = HybridDistillationTrainer(tiny(), teacher=Stored(), **common, **given)
    plain = HybridDistillationTrainer(tiny(), teacher=teacher, **common, eval_dataset=examples(3))
    expected = plain.evaluate()["eval_loss"]
    assert kept.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
