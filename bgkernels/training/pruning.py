"""Structured pruning: a smaller model of the teacher's kind, made of its most useful parts.

Parts are scored by what they do on data, without gradients:

* a layer by its *block influence*, ``1 - cos(input, output)`` of the residual stream (Men et al.
  2024, ShortGPT);
* a head and a neuron of the feed-forward net by the mean size of what it adds to the stream: the
  norm of its activations times that of its columns of the output projection (in the manner of
  Wanda, Sun et al. 2024, and Minitron, Muralidharan et al. 2024).

Query heads that share a key-value head are kept or dropped together. Where a block normalises what
attention and feed-forward net add (Gemma 2 and 3), scores rank the parts of one block all the same.
Of models with latent attention and experts (DeepSeek-V2 and V3) layers and heads are chosen, and
what a layer has of experts stays whole. The result is a plain ``transformers`` model of the same
class, to be distilled into: the way of Llama 3.2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bgkernels.training.bypass import check_equal
from bgkernels.training.errors import ModelError, OptionError
from bgkernels.training.models import CausalLM, read_head

SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LATENT = ("self_attn.q_b_proj", "self_attn.kv_b_proj")
LATENT_KEYS = ("self_attn.q_proj", "self_attn.kv_b_proj")
ATTENTION_IN = {*SEPARATE, *LATENT}
"""Projections into heads: of queries, keys and values apart, or out of latents, of which a small
model has none for queries."""
ATTENTION_OUT = "self_attn.o_proj"
WIDE = ("mlp.gate_proj", "mlp.up_proj")
NARROW = "mlp.down_proj"
DENSE = (*WIDE, NARROW)
"""A gated feed-forward net; blocks of experts have none of this name."""
DENSE_FIRST = "first_k_dense_replace"
"""How DeepSeek's configurations count the blocks before those of experts."""


@dataclass(frozen=True)
class Shape:
    """How much is left.

    Args:
        layers: blocks.
        heads: key-value heads of a block; each keeps its query heads.
        width: neurons of a block's feed-forward net.
    """

    layers: int
    heads: int
    width: int

    @classmethod
    def of(cls, model: CausalLM) -> Shape:
        """The shape of a model."""
        config = model.network.config.get_text_config()
        return cls(config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size)


@dataclass(frozen=True)
class Importance:
    """Scores of the parts of a model, larger for what matters more.

    Args:
        layers: ``(layers,)``.
        heads: ``(layers, key-value heads)``.
        neurons: ``(layers, width)``; zeros for blocks of experts.
    """

    layers: Tensor
    heads: Tensor
    neurons: Tensor


def _blocks(model: CausalLM) -> list[Any]:
    """The model's blocks.

    Raises:
        ModelError: they are not made of the projections that are pruned here.
    """
    blocks = list(getattr(model.body, "layers", []))
    missing = "a list `layers`" if not blocks else _missing(model, blocks)
    if not missing:
        return blocks
    raise ModelError(
        f"--model cannot be pruned: its blocks lack {missing}; "
        "Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3, DeepSeek-V2 and V3 and their like can be"
    )


def _missing(model: CausalLM, blocks: list[Any]) -> str:
    """Names of projections that some block should have, or nothing."""
    latent = next((x for x in (LATENT, LATENT_KEYS) if all(_has(blocks[0], n) for n in x)), None)
    needed = [*(latent or SEPARATE), ATTENTION_OUT]
    experts = hasattr(model.network.config.get_text_config(), DENSE_FIRST)
    needed += [] if experts else DENSE
    return ", ".join(n for n in needed if not all(_has(block, n) for block in blocks))


def _has(block: nn.Module, name: str) -> bool:
    try:
        return isinstance(block.get_submodule(name), nn.Linear)
    except AttributeError:
        return False


@torch.no_grad()
def measure(model: CausalLM, windows: Tensor) -> Importance:
    """Score the parts of a model on some text.

    Args:
        model: not changed.
        windows: ``(sequences, length)`` tokens.

    Raises:
        ModelError: its blocks are of another kind.
    """
    blocks, shape = _blocks(model), Shape.of(model)
    size = {"heads": blocks[0].self_attn.o_proj.in_features, "neurons": shape.width}
    square = {name: torch.zeros(len(blocks), n, dtype=torch.float64) for name, n in size.items()}
    influence = torch.zeros(len(blocks), dtype=torch.float64)

    def add_squares(name: str, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            square[name][i] += inputs[0].double().square().flatten(0, -2).sum(0).cpu()

        return hook

    def add_influence(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            alike = nn.functional.cosine_similarity(inputs[0].double(), after.double(), dim=-1)
            influence[i] += (1 - alike).sum().cpu()

        return hook

    handles = []
    for i, block in enumerate(blocks):
        handles.append(block.register_forward_hook(add_influence(i)))
        for name, module in _outputs(block).items():
            handles.append(module.register_forward_pre_hook(add_squares(name, i)))
    try:
        for part in windows.split(16):
            model.hidden(part.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    for i, block in enumerate(blocks):
        for name, module in _outputs(block).items():
            square[name][i] *= module.weight.double().square().sum(0).cpu()  # of its columns
    return Importance(
        influence / windows.numel(),
        square["heads"].unflatten(1, (shape.heads, -1)).sum(-1).sqrt(),
        square["neurons"].sqrt(),
    )


def _outputs(block: Any) -> dict[str, Any]:
    """The output projections of a block's heads, and of its neurons if it has no experts."""
    dense = {"neurons": block.mlp.down_proj} if _has(block, NARROW) else {}
    return {"heads": block.self_attn.o_proj, **dense}


@torch.no_grad()
def prune(model: CausalLM, importance: Importance, shape: Shape) -> CausalLM:
    """A model of the most important parts; the given one is not changed.

    Args:
        model: to choose from, on any device; the result is in the memory of the CPU.
        importance: of its parts.
        shape: of the result.

    Raises:
        OptionError: the shape is larger than the model's, or empty, or narrower where there are
            experts.
        ModelError: its blocks are of another kind, or what is left of them computes something else
            than in the whole model.
    """
    blocks, whole = _blocks(model), Shape.of(model)
    for name, wanted, there in zip(
        ("layers", "heads", "width"), _all(shape), _all(whole), strict=True
    ):
        if not 1 <= wanted <= there:
            raise OptionError(f"--{name} must be between 1 and the model's {there}; got {wanted}")
    if shape.width < whole.width and not all(_has(block, NARROW) for block in blocks):
        raise OptionError(
            "--width cannot be chosen for --model: its experts are kept whole; leave it out, and "
            "choose --layers and --heads"
        )
    kept = _best(importance.layers, shape.layers)
    network = type(model.network)(_config(model, kept, shape))
    network.to(next(model.network.parameters()).dtype)
    state = _outside(model)
    chosen = [
        (_best(h, shape.heads), _best(n, shape.width))
        for h, n in zip(importance.heads, importance.neurons, strict=True)
    ]
    for i, j in enumerate(kept.tolist()):
        block = {k: v.cpu() for k, v in blocks[j].state_dict().items()}
        heads, neurons = chosen[j]
        state |= {f"{i}.{k}": v for k, v in _slice(block, heads, neurons, whole.heads).items()}
    prefix = next(n for n, m in network.named_modules() if m is network.base_model.layers)
    outside = {k: v for k, v in state.items() if not k[0].isdigit()}
    inside = {f"{prefix}.{k}": v for k, v in state.items() if k[0].isdigit()}
    _load(network, outside | inside)
    small = read_head(network, "--model")
    columns = partial(_dropped, model, blocks, chosen)
    check_equal(model, small, blocks, kept, columns)
    return small


def _load(network: Any, state: dict[str, Tensor]) -> None:
    """Load what was sliced.

    Raises:
        ModelError: the model has parameters that span all heads or neurons.
    """
    there = network.state_dict()
    spanning = [k for k, v in there.items() if k in state and state[k].shape != v.shape]
    if spanning:
        raise ModelError(
            f"--heads and --width cannot be chosen for --model: {spanning[0]} and "
            f"{len(spanning) - 1} others span all of a block's heads or neurons, such as norms of "
            "all queries; choose --layers alone"
        )
    network.load_state_dict(state)


def _dropped(
    model: CausalLM, blocks: list[Any], chosen: list[tuple[Tensor, Tensor]], i: int
) -> dict[nn.Module, Tensor]:
    """The columns of a block's output projections that are not kept."""
    heads, neurons = chosen[i]
    outputs, groups = _outputs(blocks[i]), Shape.of(model).heads
    size = outputs["heads"].in_features // groups
    left = {"heads": (heads[:, None] * size + torch.arange(size)).flatten(), "neurons": neurons}
    found = {}
    for name, module in outputs.items():
        kept = torch.zeros(module.in_features, dtype=torch.bool)
        kept[left[name]] = True
        found[module] = (~kept).nonzero()[:, 0]
    return found


def _all(shape: Shape) -> tuple[int, int, int]:
    return shape.layers, shape.heads, shape.width


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest scores, in their own order."""
    return scores.topk(count).indices.sort().values


def _config(model: CausalLM, kept: Tensor, shape: Shape) -> Any:
    """The model's configuration in its new shape; lists with an entry a layer keep theirs."""
    config = copy.deepcopy(model.network.config)
    inner = config.get_text_config()
    per_group = inner.num_attention_heads // inner.num_key_value_heads
    size = getattr(inner, "head_dim", None) or inner.hidden_size // inner.num_attention_heads
    layers = kept.tolist()
    for name, x in list(vars(inner).items()):
        if not isinstance(x, list):
            continue
        if len(x) >= inner.num_hidden_layers > max(layers) and not name.startswith("_"):
            setattr(inner, name, [x[i] for i in layers])  # an entry a layer
        elif name.endswith("_layers"):  # numbers of layers
            setattr(inner, name, [layers.index(i) for i in x if i in layers])
    if hasattr(inner, DENSE_FIRST):
        setattr(inner, DENSE_FIRST, int((kept < getattr(inner, DENSE_FIRST)).sum()))
    inner.head_dim = size
    inner.num_hidden_layers = shape.layers
    inner.num_key_value_heads = shape.heads
    inner.num_attention_heads = shape.heads * per_group
    inner.intermediate_size = shape.width
    return config


def _outside(model: CausalLM) -> dict[str, Tensor]:
    """Everything but the blocks."""
    layers: Any = model.body.layers
    prefix = next(n for n, m in model.network.named_modules() if m is layers) + "."
    state = model.network.state_dict()
    return {k: v.clone() for k, v in state.items() if not k.startswith(prefix)}


def _slice(
    block: dict[str, Tensor], heads: Tensor, neurons: Tensor, groups: int
) -> dict[str, Tensor]:
    """A block's tensors with only these groups of heads, and these neurons."""

    def pick(x: Tensor, dim: int) -> Tensor:
        grouped = x.reshape(*x.shape[:dim], groups, -1, *x.shape[dim + 1 :])
        return grouped.index_select(dim, heads).flatten(dim, dim + 1)

    out = {}
    for name, x in block.items():
        owner, _, kind = name.rpartition(".")
        if owner in ATTENTION_IN:
            x = pick(x, 0)
        elif owner == ATTENTION_OUT and kind == "weight":
            x = pick(x, 1)
        elif owner in WIDE:
            x = x[neurons]
        elif owner == NARROW and kind == "weight":
            x = x[:, neurons]
        out[name] = x.clone()
    return out
