"""Structured pruning: what is kept works as it did, and the least useful goes first."""

from __future__ import annotations

import pytest
import torch
import transformers
from typer.testing import CliRunner

from bgkernels.training import models, pruning
from bgkernels.training.cli import app
from bgkernels.training.errors import ModelError, OptionError
from bgkernels.training.pruning import Shape
from bgkernels.training.tokens import train_tokenizer
from tests.test_training_parts import WORDS, write_notes

KINDS = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {"tie_word_embeddings": False},
    "Qwen3": {"tie_word_embeddings": True},
    "Mistral": {"tie_word_embeddings": False},
}


def model_of(kind, **config):
    """A random model with three blocks, two key-value heads of two query heads each."""
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Config")(
        vocab_size=290, hidden_size=32, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
        max_position_embeddings=16, **config,
    )  # fmt: skip
    network = getattr(transformers, f"{kind}ForCausalLM")(made)
    for name, x in network.named_parameters():
        if name.endswith("bias"):
            x.data.normal_()  # they start as zeros, which would hide a wrong slice
    return models.read_head(network, "--model")


@pytest.fixture(params=KINDS)
def model(request):
    return model_of(request.param, **KINDS[request.param])


@pytest.fixture
def text():
    return torch.randint(290, (4, 12), generator=torch.Generator().manual_seed(1))


def logits(model, text):
    with torch.no_grad():
        return model.network(text).logits


def test_the_whole_model_is_itself(model, text):
    same = pruning.prune(model, pruning.measure(model, text), Shape.of(model))
    assert torch.equal(logits(same, text), logits(model, text))


def test_parts_that_add_nothing_are_dropped_without_loss(model, text):
    """Silence a head group, some neurons and a block: pruning finds them, and nothing changes."""
    blocks, silent = model.network.model.layers, [1, 5, 20, 21]
    with torch.no_grad():
        for block in blocks:
            block.self_attn.o_proj.weight[:, :16] = 0  # the first key-value head's two
            block.mlp.down_proj.weight[:, silent] = 0
        for projection in (blocks[1].self_attn.o_proj, blocks[1].mlp.down_proj):
            projection.weight.zero_()
    small = pruning.prune(model, pruning.measure(model, text), Shape(2, 1, 20))
    assert Shape.of(small) == Shape(2, 1, 20)
    assert small.parameters < model.parameters
    torch.testing.assert_close(logits(small, text), logits(model, text), rtol=1e-4, atol=1e-4)


def test_importance_is_the_size_of_what_a_part_adds(text):
    """Against the definition, computed from the activations of one block by hand."""
    model, seen = model_of("Llama"), {}
    block = model.network.model.layers[0]
    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, x: seen.update(heads=x[0])),
        block.mlp.down_proj.register_forward_pre_hook(lambda m, x: seen.update(neurons=x[0])),
        block.register_forward_hook(lambda m, x, y: seen.update(stream=(x[0], y))),
    ]
    logits(model, text)
    for handle in handles:
        handle.remove()
    found = pruning.measure(model, text)
    neurons = seen["neurons"].flatten(0, 1).norm(dim=0) * block.mlp.down_proj.weight.norm(dim=0)
    torch.testing.assert_close(found.neurons[0].float(), neurons.detach())
    heads = seen["heads"].flatten(0, 1).norm(dim=0) * block.self_attn.o_proj.weight.norm(dim=0)
    torch.testing.assert_close(
        found.heads[0].float(), heads.detach().unflatten(0, (2, 16)).norm(dim=-1)
    )
    before, after = seen["stream"]
    after = after[0] if isinstance(after, tuple) else after
    alike = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    assert float(found.layers[0]) == pytest.approx(float((1 - alike).mean().detach()), rel=1e-4)


def test_the_large_model_stays_as_it_was(model, text):
    before = model.digest
    small = pruning.prune(model, pruning.measure(model, text), Shape(1, 1, 8))
    with torch.no_grad():
        for p in small.network.parameters():
            p.add_(1)
    assert model.digest == before and Shape.of(model) == Shape(3, 2, 24)


@pytest.mark.parametrize("shape", [Shape(4, 2, 24), Shape(3, 0, 24), Shape(3, 2, 25)])
def test_impossible_shapes_are_refused(shape, text):
    model = model_of("Llama")
    with pytest.raises(OptionError, match=r"--(layers|heads|width) must be between 1 and"):
        pruning.prune(model, pruning.measure(model, text), shape)


def test_other_kinds_of_model_are_refused(text):
    config = transformers.GPT2Config(vocab_size=290, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = models.read_head(transformers.GPT2LMHeadModel(config), "--model")
    with pytest.raises(ModelError, match="cannot be pruned"):
        pruning.measure(model, text)


def test_command_writes_a_model_that_can_be_loaded(tmp_path):
    (tmp_path / "corpus").mkdir()
    write_notes(tmp_path / "corpus")
    tokenizer = train_tokenizer([" ".join(WORDS)], 290)
    models.export(model_of("Llama"), tokenizer, tmp_path / "large")
    arguments = (
        "prune", "--model", tmp_path / "large", "--corpus", tmp_path / "corpus", "--layers", 2,
        "--sequence-length", 12, "--width", 10, "--output", tmp_path / "small",
    )  # fmt: skip
    result = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"}).invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0 and "parameters are now" in result.output, result.output
    small, _ = models.load_pretrained(str(tmp_path / "small"), "--student", 12)
    assert Shape.of(small) == Shape(2, 2, 10)
