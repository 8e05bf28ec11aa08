"""The hybrid loss attached to real model classes, against the dense computation in fp64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import bgkernels as bg
from tests.models import FAMILIES, batch, dense, tiny

pytest.importorskip("transformers", reason="needs the extra `training`: transformers")

from bgkernels.integrations.causal_lm import attach
from bgkernels.integrations.heads import HeadError
from bgkernels.integrations.teachers import ModelTeacher

SHANNON = bg.routing.entropy(kind="shannon")


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(got: Any, expected: Any, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, ref in expected.items():
        error = (got[name] - ref).abs().max()
        assert error <= tolerance * ref.abs().max() + 1e-300, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_equals_the_dense_one(family: str) -> None:
    student, teacher = tiny(family).double(), tiny(family, seed=1, hidden_size=24).double()
    data = batch()
    loss = dense(student, teacher, data, 2.0) / 10
    loss.backward()
    expected = gradients(student)
    attach(student, teacher, routing=SHANNON, temperature=2.0)
    got = student(**data, num_items_in_batch=10).loss
    got.backward()
    torch.testing.assert_close(got, loss, rtol=1e-10, atol=0)
    assert_same(gradients(student), expected, 1e-8)
    assert all(p.grad is None for p in teacher.parameters())


def test_without_labels_and_after_removal_the_model_is_itself() -> None:
    student, data = tiny(), batch()
    plain = student(**data)
    attachment = attach(student, tiny(seed=1))
    ids = data["input_ids"]
    assert torch.equal(student(ids, data["attention_mask"]).logits, plain.logits)
    assert student.generate(ids[:, :3], max_new_tokens=2, do_sample=False).shape[1] <= 5
    assert student(**data).logits is None
    attachment.remove()
    assert torch.equal(student(**data).loss, plain.loss)


def test_labels_may_be_shifted_and_rows_counted_beforehand() -> None:
    student, data = tiny(), batch()
    attach(student, tiny(seed=1))
    expected = student(**data).loss
    inputs = {k: v for k, v in data.items() if k != "labels"}
    shifted = torch.nn.functional.pad(data["labels"][:, 1:], (0, 1), value=-100)
    rows = (shifted.flatten() != -100).nonzero().squeeze(1)
    assert torch.equal(student(**inputs, shift_labels=shifted).loss, expected)
    assert torch.equal(student(**data, loss_rows=rows).loss, expected)
    unmasked = student(data["input_ids"], labels=data["labels"]).loss  # attention rounds otherwise
    torch.testing.assert_close(unmasked, expected)


def test_a_copy_computes_its_own_loss() -> None:
    student, data = tiny(), batch()
    attach(student, tiny(seed=1))
    clone = copy.deepcopy(student)
    with torch.no_grad():
        student.lm_head.weight.zero_()
    clone(**data).loss.backward()
    assert clone.lm_head.weight.grad is not None
    assert student.lm_head.weight.grad is None


def test_no_label_at_all() -> None:
    student, data = tiny(), batch()
    attach(student, tiny(seed=1))
    data["labels"][:] = -100
    loss = student(**data, num_items_in_batch=torch.tensor(0)).loss
    loss.backward()
    assert loss == 0
    assert all(not g.any() for g in gradients(student).values())


@pytest.mark.parametrize("routing", ["risk_guided", "top_entropy"])
def test_batchwide_policies(routing: str) -> None:
    """Risk-guided weights look along the sequence, so that rows keep their places."""
    student, teacher, data = tiny().double(), tiny(seed=1).double(), batch()
    attach(student, teacher, routing=routing)
    inputs = {k: v for k, v in data.items() if k != "labels"}
    labels = torch.nn.functional.pad(data["labels"][:, 1:], (0, 1), value=-100)
    hidden = [m.model(**inputs).last_hidden_state for m in (student, teacher)]
    expected = bg.linear_hybrid_distillation(
        hidden[0],
        student.lm_head.weight,
        bg.LinearTeacher(hidden[1].detach(), teacher.lm_head.weight.detach()),
        labels,
        routing=routing,
    )
    torch.testing.assert_close(student(**data).loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("target", ["teacher_argmax", "teacher_sample"])
def test_labels_of_the_teacher(target: str) -> None:
    student, teacher, data = tiny(), tiny(seed=1), batch()
    attach(student, teacher, target=target, routing="hard", seed=3)
    loss = student(**data).loss
    source = ModelTeacher(teacher)
    shifted = torch.nn.functional.pad(data["labels"][:, 1:], (0, 1), value=-100)
    rows = (shifted.flatten() != -100).nonzero().squeeze(1)
    inputs = {k: v for k, v in data.items() if k != "labels"}
    hidden = student.model(**inputs).last_hidden_state.flatten(0, 1)[rows]
    expected = bg.linear_hybrid_distillation(
        hidden, student.lm_head.weight, source(inputs, rows), target, routing="hard", seed=3
    )
    torch.testing.assert_close(loss, expected)


def test_a_callable_teacher_reads_its_columns() -> None:
    """Stored soft labels travel in the batch, and no body sees them."""
    student, teacher, data = tiny(), tiny(seed=1), batch()
    inputs = {k: v for k, v in data.items() if k != "labels"}

    class Stored:
        columns = ("teacher_logits",)

        def __call__(self, inputs: Any, rows: Any) -> bg.LogitsTeacher:
            return bg.LogitsTeacher(inputs["teacher_logits"].flatten(0, 1)[rows])

    with torch.no_grad():
        logits = teacher(**inputs).logits
    attachment = attach(student, teacher)
    expected = student(**data).loss
    attachment.remove()
    attach(student, Stored())
    got = student(**data, teacher_logits=logits).loss
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_path_and_a_peft_model_are_teachers(tmp_path: Path) -> None:
    student, teacher, data = tiny(), tiny(seed=1), batch()
    attach(student, teacher)
    expected = student(**data).loss
    teacher.save_pretrained(tmp_path)
    for path in (tmp_path, str(tmp_path)):
        attach(student, path)
        assert torch.equal(student(**data).loss, expected)
    peft = pytest.importorskip("peft", reason="needs the extra `integrations`: peft")
    attach(student, peft.get_peft_model(teacher, peft.LoraConfig(target_modules=["q_proj"])))
    torch.testing.assert_close(student(**data).loss, expected)  # a new adapter changes nothing
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(HeadError, match="prompt-learning"):
        attach(student, peft.get_peft_model(tiny(seed=1), prompt))


def test_measures_are_those_of_the_dense_rows() -> None:
    student, teacher, data = tiny(), tiny(seed=1), batch()
    attachment = attach(student, teacher, routing=SHANNON, temperature=2.0)
    student.eval()
    student(**data)
    hard, soft, entropy, bridges, own, right, tokens = attachment.measures[False].pop().tolist()
    attachment.remove()
    valid = data["labels"][:, 1:] != -100
    inputs = {k: v for k, v in data.items() if k != "labels"}
    z_s, z_t = (m(**inputs).logits[:, :-1][valid].double() for m in (student, teacher))
    (lp_s, lp_t), sure = (torch.log_softmax(z / 2, -1) for z in (z_s, z_t)), z_t.log_softmax(-1)
    h = -(sure.exp() * sure).sum(-1)
    assert tokens == valid.sum()
    assert hard == pytest.approx(student(**data).loss.item() * tokens, rel=1e-5)
    assert soft == pytest.approx(4 * (lp_t.exp() * (lp_t - lp_s)).sum().item(), rel=1e-4)
    assert entropy == pytest.approx(h.sum().item(), rel=1e-5)
    assert bridges == (h / torch.tensor(64.0).log() < 0.5).sum()
    plain = z_s.log_softmax(-1)
    assert own == pytest.approx(-(plain.exp() * plain).sum().item(), rel=1e-5)
    assert right == (z_s.argmax(-1) == data["labels"][:, 1:][valid]).sum()
    assert attachment.measures[False].pop() is None


def quantised(model: Any) -> None:
    class Linear4bit(torch.nn.Linear):
        pass

    model.lm_head = Linear4bit(16, 64, bias=False)


def squared(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *a: a[2].square())


def nowhere(model: Any) -> None:
    model.lm_head = torch.nn.Linear(16, 64, bias=False, device="meta")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (quantised, "head of type Linear4bit.*merge_and_unload"),
        (squared, "does more to its logits"),
        (nowhere, "not in memory"),
        (lambda m: m.set_output_embeddings(None), "no output head"),
    ],
)
def test_heads_that_cannot_be_read(spoil: Any, message: str) -> None:
    for position in (0, 1):
        models = [tiny(), tiny(seed=1)]
        spoil(models[position])
        with pytest.raises(HeadError, match=message):
            attach(*models)


def test_options_are_checked() -> None:
    student = tiny()
    with pytest.raises(ValueError, match="the student itself"):
        attach(student, student)
    with pytest.raises(TypeError, match=r"reduction.*set by the model"):
        attach(student, tiny(), reduction="sum")
    with pytest.raises(ValueError, match="`target`"):
        attach(student, tiny(), target="argmax")
    with pytest.raises(ValueError, match=r"risk_guided.*needs target='labels'"):
        attach(student, tiny(), target="teacher_argmax", routing="risk_guided")
    with pytest.raises(TypeError, match="`teacher` must be"):
        attach(student, 3)
    with pytest.raises(HeadError, match="expected a transformers causal"):
        attach(torch.nn.Linear(2, 2), tiny())
