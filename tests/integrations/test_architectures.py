"""A sample of the table of architectures: each works, or is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra `integrations`: transformers")

from tests.architectures import KINDS, OUTCOMES, Found, attempt, classes, page

WORK = {
    "causal": (
        "LlamaForCausalLM GPT2LMHeadModel BertLMHeadModel BloomForCausalLM CohereForCausalLM "
        "Cohere2ForCausalLM FalconForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM "
        "GPTNeoXForCausalLM GraniteForCausalLM MambaForCausalLM MBartForCausalLM "
        "MixtralForCausalLM OPTForCausalLM Olmo2ForCausalLM PhiForCausalLM Qwen2MoeForCausalLM "
        "RemBertForCausalLM SmolLM3ForCausalLM XLNetLMHeadModel"
    ),
    "encoder–decoder": (
        "BartForConditionalGeneration MarianMTModel M2M100ForConditionalGeneration "
        "T5ForConditionalGeneration"
    ),
}
TYPES = {kind: {name: model_type for model_type, name in classes(kind)} for kind in KINDS}
REFUSED = {"ProphetNetForCausalLM": "calls the head", "FSMTForConditionalGeneration": "a head of"}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in WORK.items() for name in names.split()]
)
def test_as_student_and_as_teacher(kind: str, name: str) -> None:
    if name not in TYPES[kind]:
        pytest.skip(f"this transformers has no {name}")
    assert attempt(TYPES[kind][name], name, kind) == Found(name, kind, "works")


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_class_and_the_reason(name: str) -> None:
    kind = next(kind for kind in KINDS if name in TYPES[kind])
    found = attempt(TYPES[kind][name], name, kind)
    assert found.outcome == "refused"
    assert found.why.startswith(name) and REFUSED[name] in found.why


def test_the_page_counts_and_explains() -> None:
    found = [Found(f"A{i}", "causal", outcome, "w|y") for i, outcome in enumerate(OUTCOMES)]
    made = page(found)
    assert "| silent | 1 | 0 | 0 |" in made and "| `A1` | w\\|y |" in made and "`A0`" in made


def test_the_page_in_the_tree_has_nothing_silent_and_no_crash() -> None:
    written = (Path(__file__).resolve().parents[2] / "docs/architectures.md").read_text()
    assert "| silent | 0 | 0 | 0 |" in written and "| crashed | 0 | 0 | 0 |" in written
