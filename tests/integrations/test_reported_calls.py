"""What people ask of a student and its teacher in a call: kinds of faults that were reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import REPORTED as SIZE
from tests.models import batch, make, tiny

pytest.importorskip("transformers", reason="needs the extra `training`")

import transformers

from bgkernels.integrations.causal_lm import attach
from bgkernels.integrations.heads import HeadError


def test_a_teacher_that_cannot_see_is_refused() -> None:
    student, teacher = tiny(), tiny(seed=1)
    attach(student, teacher)
    student.forward.__func__.attachment.student.original = lambda self, pixel_values, **kwargs: (
        type(self).forward(self, **kwargs)
    )
    with pytest.raises(ValueError, match=r"teacher LlamaForCausalLM does not take `pixel_values`"):
        student(**batch(), pixel_values=torch.rand(3, 3, 4, 4))


def test_the_head_that_the_model_would_use() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra `integrations`: peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    base, teacher = tiny(), tiny(seed=1)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        base.lm_head.modules_to_save["default"].weight.mul_(1.5)
    attach(model, teacher, routing="hard")
    inputs = batch()
    trained = model(**inputs).loss
    with model.disable_adapter():
        plain = model(**inputs).loss
        expected = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    model.get_base_model().forward.__func__.attachment.remove()
    labels = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    dense = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(plain, dense)
    torch.testing.assert_close(trained, model(**inputs).loss)
    assert abs(trained - plain) > 0.1


def test_a_teacher_around_the_student_is_the_student() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra `integrations`: peft")
    base = tiny()
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    for pair in ((base, wrapped), (wrapped, base), (wrapped, wrapped)):
        with pytest.raises(ValueError, match="`teacher` is the student itself"):
            attach(*pair)


def test_outputs_are_as_asked_for() -> None:
    student, inputs = tiny(), batch()
    plain = student(**inputs, output_hidden_states=True)
    attach(student, tiny(seed=1), routing="hard")
    output = student(**inputs, output_hidden_states=True)
    assert type(output) is type(plain) and output.logits is None
    for x, ref in zip(output.hidden_states, plain.hidden_states, strict=True):
        assert torch.equal(x, ref)
    as_tuple = student(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], plain.loss)


def test_only_what_the_teacher_can_read_is_passed_on() -> None:
    student, inputs = tiny(), batch()
    attach(student, tiny(seed=1, hidden_size=16))
    embeddings = student.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with pytest.raises(ValueError, match=r"`inputs_embeds` are embeddings of the student"):
        student(inputs_embeds=embeddings, **inputs)
    bloom = make("BloomForCausalLM", vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    packed = {"input_ids": torch.arange(3, 9)[None], "position_ids": torch.arange(6)[None]}
    packed["labels"] = packed["input_ids"]
    attach(student, bloom)
    with pytest.raises(ValueError, match=r"BloomForCausalLM does not take `position_ids`"):
        student(**packed)
    attach(student, tiny(seed=1))
    bounds = torch.tensor([0, 3, 6], dtype=torch.int32)
    assert student(**packed, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds).loss.isfinite()


def test_a_teacher_of_too_few_positions_or_tokens() -> None:
    gpt = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    student, inputs = tiny(), batch(length=9)
    attach(student, make("GPT2LMHeadModel", "GPT2Config", **gpt, n_positions=8))
    with pytest.raises(ValueError, match=r"takes at most 8 tokens, and `input_ids` has 9"):
        student(**inputs)
    attach(student, make("OPTForCausalLM", **SIZE | {"ffn_dim": 48, "max_position_embeddings": 8}))
    with pytest.raises(ValueError, match=r"OPTForCausalLM takes at most 8 tokens"):
        student(**inputs)
    attach(student, tiny(seed=1, vocab_size=40))
    with pytest.raises(ValueError, match=r"has embeddings of 40 tokens, and `input_ids` has"):
        student(**inputs)


def test_nothing_is_left_of_it() -> None:
    student, teacher = tiny(), tiny(seed=1)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.modules()]
    names = [set(m.__dict__) for m in student.modules()]
    attach(student, teacher)
    attachment = attach(student, teacher)  # in place of the first
    attachment.remove()
    attachment.remove()
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.modules()]
    assert names == [set(m.__dict__) for m in student.modules()]


def test_attach_costs_two_forwards_and_a_backward_of_the_head() -> None:
    student = tiny()
    calls: list[int] = []
    student.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    attach(student, tiny(seed=1))
    assert len(calls) == 2
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize("frozen", [False, True])
def test_parts_that_were_evaluated_stay_so(frozen: bool) -> None:
    student, teacher = tiny().train(), tiny(seed=1)
    if frozen:
        student.model.layers[0].eval()
    state = torch.get_rng_state()
    attach(student, teacher)
    assert student.training and student.model.layers[0].training is not frozen
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_that_does_not_run_is_named() -> None:
    class Broken(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise KeyError("pixel_values")

    broken = Broken(transformers.LlamaConfig(**SIZE))
    for pair in ((broken, tiny()), (tiny(), broken)):
        with pytest.raises(HeadError, match=r"Broken cannot be tried on a few tokens: KeyError"):
            attach(*pair)
