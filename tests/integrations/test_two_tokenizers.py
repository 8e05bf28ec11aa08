"""Student and teacher with two tokenizers, in a plain loop and in trainers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra `integrations`: transformers")
pytest.importorskip("accelerate", reason="needs the extra `integrations`: accelerate")

from bgkernels.integrations.causal_lm import attach
from bgkernels.integrations.heads import HeadError
from bgkernels.integrations.transformers import HybridDistillationTrainer
from bgkernels.integrations.translated import TranslatedTeacher
from bgkernels.vocabularies import VocabularyError, match
from tests.integrations.steps import arguments
from tests.integrations.two_tokenizers import Pair
from tests.models import tiny
from tests.vocabularies import toys

PAIR = Pair.make()


def test_a_step_is_the_dense_one_of_the_coarse_definition() -> None:
    student, teacher = (m.double() for m in PAIR.models())
    data, found = PAIR.batch(), match(PAIR.student, PAIR.teacher)
    wanted = PAIR.dense(student, teacher, data, found) / (data["labels"][:, 1:] >= 0).sum()
    wanted.backward()
    gradients = {n: p.grad.clone() for n, p in student.named_parameters()}
    student.zero_grad()
    attachment = attach(
        student, teacher, **PAIR.both,
        routing="static", backend="eager",
    )  # fmt: skip
    loss = student(**data).loss
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    loss.backward()
    for name, p in student.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    seen = attachment.teacher.aligned
    assert 0 < seen["soft"] < seen["tokens"] == int(data["attention_mask"].sum())
    assert seen["differing"] == 0


def test_a_collator_gives_both_models_their_tokens() -> None:
    student, teacher = PAIR.models()
    source = TranslatedTeacher(teacher, match(PAIR.student, PAIR.teacher), PAIR.teacher)
    attach(student, source)
    whole = source.collator(lambda items: items)(PAIR.batch())
    assert whole["teacher_input_ids"].shape == whole["teacher_attention_mask"].shape
    assert torch.equal(student(**whole).loss, student(**PAIR.batch()).loss)
    cut = {name: x[1:] for name, x in whole.items()}  # accelerate may cut batches
    rows = {name: x[1:] for name, x in PAIR.batch().items()}
    torch.testing.assert_close(student(**cut).loss, student(**rows).loss)


def test_the_trainer_takes_the_tokenizer_of_the_teacher(tmp_path: Path) -> None:
    student, teacher = PAIR.models()
    data = PAIR.batch()
    trainer = HybridDistillationTrainer(
        student,
        arguments(tmp_path, max_steps=12, optim="adamw_torch", learning_rate=1e-2),
        teacher=teacher,
        teacher_tokenizer=PAIR.teacher,
        processing_class=PAIR.student,
        train_dataset=[{name: x[i] for name, x in data.items()} for i in range(3)],
        data_collator=lambda items: {n: torch.stack([x[n] for x in items]) for n in items[0]},
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert any(entry.get("soft_loss", 0) > 0 for entry in trainer.state.log_history)
    assert trainer.attachment.teacher.aligned["soft"] > 0


def test_trl_fine_tunes_with_two_tokenizers(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra `integrations`: trl")
    import datasets
    from trl import SFTConfig

    from bgkernels.integrations.trl import HybridSFTTrainer

    student, teacher = PAIR.models()
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, max_length=64, save_strategy="no", logging_steps=1, bf16=False,
    )  # fmt: skip
    trainer = HybridSFTTrainer(
        student,
        args,
        teacher=teacher,
        teacher_tokenizer=PAIR.teacher,
        processing_class=PAIR.student,
        train_dataset=datasets.Dataset.from_list([{"text": x} for x in toys.TEXTS * 2]),
    )
    trainer.train()
    seen = trainer.attachment.teacher.aligned
    assert 0 < seen["soft"] < seen["tokens"] and seen["differing"] == 0


def test_what_cannot_be_is_refused() -> None:
    student, teacher = PAIR.models()
    with pytest.raises(TypeError, match="`tokenizer` and `teacher_tokenizer`"):
        attach(student, teacher, teacher_tokenizer=PAIR.teacher)
    with pytest.raises(ValueError, match="`target` must be 'labels'"):
        attach(student, teacher, target="teacher_argmax", **PAIR.both)
    with pytest.raises(VocabularyError, match="head of the teacher has 64 columns"):
        attach(student, tiny(seed=1), **PAIR.both)
    with pytest.raises(VocabularyError, match="head of the student has 64 columns"):
        attach(tiny(), teacher, **PAIR.both)
    attach(student, teacher, **PAIR.both)
    data = PAIR.batch()
    packed = torch.arange(data["input_ids"].shape[1]) % 7
    with pytest.raises(ValueError, match="packed documents"):
        student(**data, position_ids=packed.expand_as(data["input_ids"]))


def test_encoder_decoders_have_one_tokenizer() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    with pytest.raises(HeadError):
        attach(
            T5ForConditionalGeneration(config), PAIR.models()[1],
            **PAIR.both,
        )  # fmt: skip


def test_the_tokens_of_another_tokenizer_are_seen() -> None:
    """A batch that another tokenizer made is text of another kind, with nothing in common."""
    student, teacher = PAIR.models()
    source = TranslatedTeacher(teacher, match(PAIR.student, PAIR.teacher), PAIR.teacher)
    attach(student, source)
    data = PAIR.batch()
    wrong = source.read(data)
    wrong["teacher_input_ids"] = wrong["teacher_input_ids"].flip(0, 1)
    before = student(**source.read(data)).loss
    assert not torch.equal(student(**wrong).loss, before)
