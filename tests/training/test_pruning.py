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
from tests.training.notes import WORDS, write_notes

LAYER_TYPES = ["sliding_attention", "full_attention", "full_attention"]
EXPERTS = {
    "num_key_value_heads": 4, "head_dim": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 2, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
}  # fmt: skip
KINDS = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {"tie_word_embeddings": False},
    "Qwen3": {"tie_word_embeddings": True},
    "Mistral": {"tie_word_embeddings": False},
    "DeepseekV2": {**EXPERTS, "q_lora_rank": None, "n_group": None, "topk_method": "greedy"},
    "DeepseekV3": {**EXPERTS, "q_lora_rank": 10, "n_group": 2, "topk_group": 1},
    "Gemma": {"head_dim": 12},
    "Gemma2": {"head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 20},
    "Gemma3": {"head_dim": 12, "sliding_window": 4, "layer_types": LAYER_TYPES},
}


def model_of(kind, **config):
    """A random model with three blocks, two key-value heads of two query heads each."""
    torch.manual_seed(0)
    make = getattr(transformers, f"{kind}TextConfig", None) or getattr(
        transformers, f"{kind}Config"
    )
    made = make(
        vocab_size=290, hidden_size=32, intermediate_size=24, num_attention_heads=4,
        initializer_range=0.2, max_position_embeddings=16,
        **{"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 8, **config},
    )  # fmt: skip
    network = getattr(transformers, f"{kind}ForCausalLM")(made)
    for x in network.parameters():
        if x.ndim == 1:
            x.data.normal_()  # biases start as zeros, norms as ones: a wrong slice would hide
    return models.read_head(network, "--model")


@pytest.fixture(params=KINDS)
def model(request):
    return model_of(request.param, **KINDS[request.param])


@pytest.fixture
def text():
    return torch.randint(290, (4, 12), generator=torch.Generator().manual_seed(1))


def dense(block):
    """Whether it has neurons, and no experts."""
    return hasattr(block.mlp, "down_proj")


def logits(model, text):
    with torch.no_grad():
        return model.network(text).logits


def test_the_whole_model_is_itself(model, text):
    same = pruning.prune(model, pruning.measure(model, text), Shape.of(model))
    assert torch.equal(logits(same, text), logits(model, text))


def test_parts_that_add_nothing_are_dropped_without_loss(model, text):
    """Silence a head group, some neurons and a block: pruning finds them, and nothing changes."""
    blocks, silent, whole = model.network.model.layers, [1, 5, 20, 21], Shape.of(model)
    with torch.no_grad():
        for block in blocks:
            projection = block.self_attn.o_proj
            projection.weight[:, : projection.in_features // 2] = 0  # the first half of the heads
            if dense(block):
                block.mlp.down_proj.weight[:, silent] = 0
        for projection in (blocks[1].self_attn.o_proj, blocks[1].mlp.down_proj):
            projection.weight.zero_()
    shape = Shape(2, whole.heads // 2, 20 if all(map(dense, blocks)) else 24)
    small = pruning.prune(model, pruning.measure(model, text), shape)
    assert Shape.of(small) == shape
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
    before, whole = model.digest, Shape.of(model)
    small = pruning.prune(model, pruning.measure(model, text), Shape(1, 1, whole.width))
    with torch.no_grad():
        for p in small.network.parameters():
            p.add_(1)
    assert model.digest == before and Shape.of(model) == whole


@pytest.mark.parametrize("shape", [Shape(4, 2, 24), Shape(3, 0, 24), Shape(3, 2, 25)])
def test_impossible_shapes_are_refused(shape, text):
    model = model_of("Llama")
    with pytest.raises(OptionError, match=r"--(layers|heads|width) must be between 1 and"):
        pruning.prune(model, pruning.measure(model, text), shape)


def test_experts_stay_whole(text):
    model = model_of("DeepseekV3", **KINDS["DeepseekV3"])
    with pytest.raises(OptionError, match=r"--width cannot be chosen .* experts are kept whole"):
        pruning.prune(model, pruning.measure(model, text), Shape(3, 4, 20))
    small = pruning.prune(model, pruning.measure(model, text), Shape(2, 2, 24))
    kinds = [dense(block) for block in small.network.model.layers]
    assert small.network.config.first_k_dense_replace == sum(kinds) and kinds[0]


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


def removed_by_hand(model, text, kept):
    """The whole network with only these blocks in its list."""
    network = model.network
    blocks = network.model.layers
    handles = [
        block.register_forward_hook(lambda module, inputs, output: inputs[0])
        for i, block in enumerate(blocks)
        if i not in kept
    ]
    found = logits(model, text)
    for handle in handles:
        handle.remove()
    return found


def importance_of(model, layers):
    """Scores by which these layers are kept."""
    shape = Shape.of(model)
    scores = torch.zeros(shape.layers)
    scores[layers] = 1.0
    ones = torch.ones(shape.layers, shape.heads), torch.ones(shape.layers, shape.width)
    return pruning.Importance(scores, *ones)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("SmolLM3", {"no_rope_layers": [1, 1, 0, 1, 0, 1, 1, 0]}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 4}),
        ("Olmo2", {}),
    ],
)
def test_layers_keep_what_is_theirs(text, kind, config):
    """Settings with an entry a layer go with their layers."""
    model = model_of(kind, num_hidden_layers=8, pad_token_id=0, **config)
    kept = [0, 2, 3, 5, 7]
    small = pruning.prune(model, importance_of(model, kept), Shape(5, 2, 24))
    expected = removed_by_hand(model, text, kept)
    torch.testing.assert_close(logits(small, text), expected, rtol=1e-4, atol=1e-4)


def test_norms_over_all_heads_are_refused_by_name(text):
    model = model_of("Olmo2", pad_token_id=0)
    with pytest.raises(ModelError, match=r"--heads .*self_attn\.q_norm\.weight.* span all"):
        pruning.prune(model, pruning.measure(model, text), Shape(3, 1, 24))


def test_blocks_that_look_at_their_numbers_are_refused(text):
    """Of any kind: what is left is compared with the same parts of the whole."""
    model = model_of("Llama")
    for i, block in enumerate(model.network.model.layers):
        block.mlp.act_fn = torch.nn.SiLU()
        block.mlp.register_forward_hook(lambda module, x, y, i=i: y * (i + 1))
    with pytest.raises(ModelError, match="computes something else than the same parts"):
        pruning.prune(model, importance_of(model, [0, 2]), Shape(2, 2, 24))
