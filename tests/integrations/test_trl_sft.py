"""TRL's ``SFTTrainer`` with the hybrid loss: each kind of data, the loss and an update dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs the extra `integrations`: trl")
pytest.importorskip("datasets", reason="needs the extra `integrations`: datasets")

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import bgkernels as bg
from bgkernels.integrations.causal_lm import attach
from bgkernels.integrations.probe.watch import NotDistillingError
from bgkernels.integrations.trl import HybridSFTTrainer
from tests.models import REPORTED, VOCAB, dense, make, sentence, tiny, tokenizer

LOSS: dict[str, Any] = {"routing": bg.routing.entropy(kind="shannon"), "temperature": 2.0}
MARKED = (
    "{% for m in messages %}{{ m.role | replace('user', 'w3') | replace('assistant', 'w4') }} "
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }} <eos>{% endgeneration %}"
    "{% else %}{{ m.content }} <eos> {% endif %}{% endfor %}"
)
"""A template that marks what the assistant says."""


def arguments(folder: Path, **changes: Any) -> SFTConfig:
    given: dict[str, Any] = {
        "max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3,
        "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "bf16": False, "gradient_checkpointing": False, "learning_rate": 0.1, "optim": "sgd",
        "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "logging_steps": 1,
    }  # fmt: skip
    return SFTConfig(str(folder), **given | changes)


def chat(i: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": sentence(2 + i % 3, i)},
        {"role": "assistant", "content": sentence(3 + i % 4, 100 + i)},
        {"role": "user", "content": sentence(1 + i % 2, 200 + i)},
        {"role": "assistant", "content": sentence(2 + i % 5, 300 + i)},
    ]


def records(kind: str, n: int = 6) -> Dataset:
    rows: list[dict[str, Any]] = []
    for i in range(n):
        prompt, answer = sentence(2 + i % 3, i), sentence(3 + i % 4, 100 + i)
        rows.append(
            {
                "text": {"text": f"{prompt} {answer}"},
                "completion": {"prompt": prompt, "completion": f" {answer}"},
                "messages": {"messages": chat(i)},
                "conversational": {"prompt": chat(i)[:3], "completion": chat(i)[3:]},
            }[kind]
        )
    return Dataset.from_list(rows)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("text", {}),
    "completion only": ("completion", {}),
    "whole completion": ("completion", {"completion_only_loss": False}),
    "assistant only": ("messages", {"assistant_only_loss": True}),
    "conversational": ("conversational", {}),
    "packed": ("completion", {"packing": True, "max_length": 24, "eval_packing": True}),
    "padding-free": ("text", {"padding_free": True, "max_length": None}),
}
"""Records, and arguments of the trainer."""


def trainer(folder: Path, kind: str = "text", student: Any = None, **changes: Any) -> Any:
    shape, settings = KINDS[kind]
    words = tokenizer()
    if shape == "messages":
        words.chat_template = MARKED
    given = {k: changes.pop(k) for k in ("peft_config", "teacher") if k in changes}
    teacher = given.pop("teacher", None)
    made = HybridSFTTrainer(
        tiny() if student is None else student,
        arguments(folder, **settings | changes),
        teacher=tiny(seed=1, hidden_size=24) if teacher is None else teacher,
        train_dataset=records(shape),
        eval_dataset=records(shape, 3),
        processing_class=words,
        loss=LOSS,
        **given,
    )
    return made


def batches(made: Any, data: Any, size: int = 2) -> list[dict[str, Any]]:
    """What the trainer's own collator makes of its own data."""
    items = list(data)
    parts = [made.data_collator(items[i : i + size]) for i in range(0, len(items), size)]
    return [{**part, "use_cache": False} for part in parts]  # a cache lets packed documents mix


def dense_sum(student: Any, teacher: Any, parts: list[dict[str, Any]]) -> tuple[Any, int]:
    """The summed loss of some batches, and the number of labels."""
    tokens = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
    return sum(dense(student, teacher, part, 2.0) for part in parts), tokens


def count_calls(model: Any) -> list[int]:
    calls: list[int] = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_update_are_the_dense_ones(tmp_path: Path, kind: str) -> None:
    """Three batches of unequal numbers of labels in one step."""
    made = trainer(tmp_path, kind, per_device_eval_batch_size=8)
    parts = batches(made, made.train_dataset)
    made.args.gradient_accumulation_steps = len(parts)
    held_out = batches(made, made.eval_dataset, 8)
    if kind != "text":
        assert any((part["labels"] == -100).any() for part in parts)
    student, teacher = tiny().double(), tiny(seed=1, hidden_size=24).double()
    calls = count_calls(made.attachment.teacher.model)
    summed, tokens = dense_sum(student, teacher, held_out)
    assert made.evaluate()["eval_loss"] == pytest.approx(float(summed) / tokens, rel=1e-5)
    assert len(calls) == len(held_out)
    summed, tokens = dense_sum(student, teacher, parts)
    (summed / tokens).backward()
    made.train()
    assert len(calls) == len(held_out) + len(parts)
    logged = next(e for e in made.state.log_history if "loss" in e)
    assert logged["loss"] == pytest.approx(float(summed.detach()) / tokens, rel=1e-3)
    assert logged["hard_loss"] > 0 and logged["soft_loss"] > 0 and logged["num_tokens"] > 0
    for name, p in student.named_parameters():
        expected = p.detach() - 0.1 * p.grad
        got = made.model.get_parameter(name).double()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["text", "completion only"])
def test_entropy_and_accuracy_are_those_that_trl_logs(tmp_path: Path, kind: str) -> None:
    """Of one batch a step, since TRL takes the mean of the means of batches."""
    shape, settings = KINDS[kind]
    once = {"gradient_accumulation_steps": 1, "per_device_eval_batch_size": 3, "max_steps": 2}
    knowing = trainer(tmp_path, kind, max_steps=20, learning_rate=0.02, optim="adamw_torch")
    knowing.train()  # or no answer would be right
    students = [tiny(), tiny()]
    for student in students:
        student.load_state_dict(knowing.model.state_dict())
    ours = trainer(tmp_path, kind, students[0], **once)
    theirs = SFTTrainer(
        students[1],
        arguments(tmp_path, **settings, **once),
        train_dataset=records(shape),
        eval_dataset=records(shape, 3),
        processing_class=tokenizer(),
    )
    for made in (ours, theirs):
        made.args.learning_rate = 0.0
        made.train()
        made.evaluate()
    pairs = [*zip(ours.state.log_history, theirs.state.log_history, strict=True)]
    for name in ("entropy", "mean_token_accuracy"):
        found = [
            (one[key], other[key])
            for one, other in pairs
            for key in (name, f"eval_{name}")
            if key in other
        ]
        assert len(found) == 3 and all(x > 0 for x, _ in found)
        for one, other in found:
            assert one == pytest.approx(other, rel=1e-4)


def test_lengths_of_packed_documents_do_not_mix(tmp_path: Path) -> None:
    """A packed batch has the loss of its documents apart."""
    packed = trainer(tmp_path, "packed", per_device_train_batch_size=8)
    apart = trainer(tmp_path, "completion only", per_device_train_batch_size=8)
    found = []
    for made in (packed, apart):
        (part,) = batches(made, made.train_dataset, 8)
        with torch.no_grad():
            found.append(float(made.compute_loss(made.model, part)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra `integrations`: peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made = trainer(tmp_path, "completion only", peft_config=config, max_steps=2)
    calls = count_calls(made.attachment.teacher.model)
    made.train()
    assert len(calls) == 6
    moved = [n for n, p in made.model.named_parameters() if "lora_B" in n and p.any()]
    assert len(moved) == 4


def test_a_routers_loss_is_added_as_trl_adds_it(tmp_path: Path) -> None:
    """Its mean over the batches of a step, by the trainer's coefficient."""
    size = REPORTED | {"vocab_size": VOCAB, "num_local_experts": 4, "num_experts_per_tok": 2}
    student = make("MixtralForCausalLM", **size, experts_implementation="eager")
    teacher = tiny(seed=1)
    settings = {"router_aux_loss_coef": 0.3, "train_sampling_strategy": "sequential"}
    made = trainer(tmp_path, student=student, teacher=teacher, **settings)
    parts = batches(made, made.train_dataset)
    with torch.no_grad():
        tokens = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
        made.attachment.active = False
        summed = sum(float(dense(student, teacher, part, 2.0)) for part in parts)
        aux = [float(student(**part, output_router_logits=True).aux_loss) for part in parts]
        made.attachment.active = True
    made.train()
    logged = next(e for e in made.state.log_history if "loss" in e)
    expected = summed / tokens + 0.3 * sum(aux) / len(aux)
    assert logged["loss"] == pytest.approx(expected, rel=1e-3)
    assert logged["aux_loss"] == pytest.approx(sum(aux) / len(aux), rel=1e-3)


def test_liger_keeps_to_the_layers(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="use_liger_kernel"):
        made = trainer(tmp_path, use_liger_kernel=True)
    assert made.args.liger_kernel_config["fused_linear_cross_entropy"] is False


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_plain_sft_trainer_says_that_it_does_not_distil(tmp_path: Path, order: str) -> None:
    """TRL computes a loss of its own, whatever the model has."""
    student, teacher = tiny(), tiny(seed=1)
    if order == "before":
        attach(student, teacher)
    made = SFTTrainer(
        student, arguments(tmp_path), train_dataset=records("text"), processing_class=tokenizer()
    )
    if order == "after":
        attach(student, teacher)
    weights = student.lm_head.weight.detach().clone()
    with pytest.raises(NotDistillingError, match="HybridSFTTrainer"):
        made.train()
    assert torch.equal(student.lm_head.weight, weights)


def test_under_peft_too(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra `integrations`: peft")
    student = tiny()
    attach(student, tiny(seed=1))
    made = SFTTrainer(
        student, arguments(tmp_path), train_dataset=records("text"), processing_class=tokenizer(),
        peft_config=peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    with pytest.raises(NotDistillingError, match="never computed"):
        made.train()


def test_a_model_with_a_loss_already_is_attached_anew(tmp_path: Path) -> None:
    student = tiny()
    attach(student, tiny(seed=2))
    made = trainer(tmp_path, student=student)
    parts = batches(made, made.train_dataset)
    summed, tokens = dense_sum(tiny(), tiny(seed=1, hidden_size=24), parts)
    made.train()
    logged = next(e for e in made.state.log_history if "loss" in e)
    assert logged["loss"] == pytest.approx(float(summed.detach()) / tokens, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss_type": "dft"}, "`loss_type` must be 'nll'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor`:FutureWarning")
def test_what_needs_logits_is_refused(tmp_path: Path, changes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, **changes)


def test_the_teacher_has_two_names(tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "train_dataset": records("text"), "processing_class": tokenizer(),
    }  # fmt: skip
    made = HybridSFTTrainer(tiny(), arguments(tmp_path), teacher_model=tiny(seed=1), **common)
    assert made.attachment.teacher.model.config.vocab_size == VOCAB
    with pytest.raises(TypeError, match="neither was"):
        HybridSFTTrainer(tiny(), arguments(tmp_path), **common)
