"""A recorded model says what the model says, whatever becomes of its weights."""

from __future__ import annotations

import pytest
import torch
import transformers

from bgkernels.training import lora, models, tracing
from bgkernels.training.config import ModelShape
from bgkernels.training.decoding import Decoder
from bgkernels.training.generation import continue_text, generate
from bgkernels.training.models import CausalLM
from bgkernels.training.tracing import TracedLM

VOCAB, GIVEN, LENGTH = 50, 6, 20
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}


@pytest.fixture
def model():
    speaker = models.small_llama(ModelShape(32, 2, 2), VOCAB, 64, seed=3)
    speaker.network.lm_head.weight.data.mul_(3)
    speaker.freeze()
    return speaker


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(VOCAB, (4, GIVEN), generator=torch.Generator().manual_seed(0))


def same(traced: TracedLM, model: CausalLM, prompts: torch.Tensor) -> bool:
    said = [generate(m, prompts, LENGTH, VOCAB, seed=1) for m in (traced, model)]
    return torch.equal(*said)


def test_a_recording_is_played(model, prompts, monkeypatch):
    traced, read, calls = TracedLM.of(model), Decoder._read, []
    assert same(traced, model, prompts)
    assert list(traced.recordings) == [(4, GIVEN + LENGTH - 1)]
    monkeypatch.setattr(Decoder, "_read", lambda *x: calls.append(x) or read(*x))
    generate(traced, prompts, LENGTH, VOCAB, seed=2)
    assert len(calls) == 1, "the prompt, and no token by itself"


def test_a_recording_reads_the_weights_as_they_are(model, prompts):
    traced = TracedLM.of(model)
    before = continue_text(traced, prompts, LENGTH, VOCAB, seed=1)
    recordings = dict(traced.recordings)
    with torch.no_grad():
        for p in model.network.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    assert same(traced, model, prompts) and traced.recordings == recordings
    assert not torch.equal(continue_text(traced, prompts, LENGTH, VOCAB, seed=1), before)


def test_other_parameters_are_recorded_anew(model, prompts, tmp_path):
    """Merged, an adapter is in the weights; played as before, it would count twice."""
    traced = TracedLM.of(model)
    adapter = lora.adapt(model, 4, seed=0)
    with torch.no_grad():
        for name, p in model.network.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
    model.network.eval()
    assert same(traced, model, prompts)
    first = list(traced.recordings.values())
    lora.merge(adapter, tmp_path)
    assert same(traced, model, prompts)
    second = list(traced.recordings.values())
    assert None not in first + second and first != second


@pytest.mark.parametrize(
    "kind, recorded",
    [
        ("GPTNeoX", True),
        ("Qwen3", True),
        ("Mixtral", True),
        ("Mistral", False),  # a window that slides within the text
        ("Bloom", False),  # no positions
    ],
)
def test_families(kind, recorded, prompts):
    more = {"sliding_window": 8} if kind == "Mistral" else {}
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CausalLM(getattr(transformers, f"{kind}ForCausalLM")(config))
    model.freeze()
    traced = TracedLM.of(model)
    assert same(traced, model, prompts)
    assert [r is not None for r in traced.recordings.values()] == [recorded]


def test_a_recording_that_is_wrong_somewhere_is_not_played(model, prompts, monkeypatch):
    """Here at the last position of all, as of a model that does something else there."""
    layer = model.body.layers[0]
    forward, seen = layer.forward, GIVEN + LENGTH - 2

    def elsewhere(hidden, **inputs):
        late = int(inputs["position_ids"].max()) >= seen
        return forward(hidden, **inputs) * (1 + late)

    monkeypatch.setattr(layer, "forward", elsewhere)
    traced = TracedLM.of(model)
    generate(traced, prompts, LENGTH, VOCAB, seed=1)
    assert list(traced.recordings.values()) == [None]


def test_a_model_in_training_is_not_recorded(model, prompts):
    model.network.train()
    traced = TracedLM.of(model)
    assert same(traced, model, prompts) and list(traced.recordings.values()) == [None]


def test_a_shape_is_recorded_once(model, prompts, monkeypatch):
    record, calls = tracing._record, []
    monkeypatch.setattr(tracing, "_record", lambda *x: calls.append(x) or record(*x))
    traced = TracedLM.of(model)
    for rows in (4, 2, 4):
        generate(traced, prompts[:rows], LENGTH, VOCAB, seed=rows)
    assert [len(tokens) for _, tokens, _ in calls] == [4, 2]
