"""The head of a checkpoint, read without the body: one or two tensors of many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bgkernels.integrations.heads import Head, HeadError
from bgkernels.integrations.probe.curve import Curve, NotAHead, fit, grid

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
POSITIONS = 8


@dataclass(frozen=True, eq=False)
class CheckpointHead:
    """What is read of a checkpoint.

    Args:
        name: path or name of the checkpoint.
        head: weight ``(vocab, hidden)`` and bias, with the scale and the soft-cap of the model.
        norm: the layer whose output the head multiplies, in fp32; None: not one of known kind.
        parameters: how many the whole model has; 0: not known.
    """

    name: str
    head: Head
    norm: nn.Module | None = None
    parameters: int = 0


def read_head(name: str | PathLike[str], dtype: torch.dtype | None = None) -> CheckpointHead:
    """The head of a causal language model, and the norm before it.

    The model is built on the meta device, where it takes no memory, to learn the names of its
    tensors; what it does to its logits is measured there on known ones. Of a checkpoint on the Hub,
    only the files that hold those tensors are fetched.

    Args:
        name: path or name of a checkpoint in safetensors.
        dtype: of the head; None: as stored.

    Raises:
        HeadError: there is no such checkpoint or tensor, the head is quantised, or the model does
            more to its logits than scale and soft-cap them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config: Any = AutoConfig.from_pretrained(name)
        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise HeadError(
            f"`head` {str(name)!r} could not be read: {reason}. Pass the path or name of the "
            "checkpoint that is served, or a CheckpointHead"
        ) from error
    layer, table = model.get_output_embeddings(), model.get_input_embeddings()
    if type(layer) is not nn.Linear:
        raise HeadError(f"`head` {str(name)!r} has no plain linear head ({type(model).__name__})")
    curve = _measured(model, layer, config)
    names = {id(module): path for path, module in model.named_modules()}
    tensors = _Tensors(str(name))
    alternatives = [names[id(layer)]]
    if model.config.get_text_config().tie_word_embeddings:
        alternatives.append(names[id(table)])
    weight = tensors.read([f"{path}.weight" for path in alternatives])
    bias = None if layer.bias is None else tensors.read([f"{alternatives[0]}.bias"])
    if weight.shape != layer.weight.shape or not weight.is_floating_point():
        raise HeadError(
            f"the head of {str(name)!r} has shape {tuple(weight.shape)} and type {weight.dtype}, "
            f"and its configuration says {tuple(layer.weight.shape)}; name the checkpoint before "
            "it was quantised"
        )
    dtype = dtype or weight.dtype
    head = Head(
        weight.to(dtype), None if bias is None else bias.to(dtype), curve.scale, curve.cap
    )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    return CheckpointHead(str(name), head, _norm(model, names, tensors), parameters)


def _measured(model: Any, layer: nn.Linear, config: Any) -> Curve:
    """What a model on the meta device does to its logits; its body is not run."""
    states = _States(torch.empty(1, POSITIONS, layer.in_features, device="meta"))
    model.base_model.forward = lambda *args, **kwargs: states
    layer.register_forward_hook(lambda module, inputs, output: grid(torch.empty(output.shape)))
    tokens = torch.empty(1, POSITIONS, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            logits = model.eval()(input_ids=tokens, use_cache=False).logits
        return fit(logits, layer.out_features, config.get_text_config())
    except (NotAHead, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise HeadError(
            f"what {type(model).__name__} does to its logits cannot be measured without its body "
            f"({error}); pass `head` as a CheckpointHead with its scale and soft-cap"
        ) from error


class _States:
    """The output of a body that was not run; whatever else is read of it is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Tensor:
        return self.last_hidden_state


def _norm(model: Any, names: dict[int, str], tensors: _Tensors) -> nn.Module | None:
    """The only norm beside the layers of a body, its last one, with its weights."""
    found = [m for m in model.base_model.children() if "Norm" in type(m).__name__]
    if len(found) != 1:
        return None
    try:
        state = {
            key: tensors.read([f"{names[id(found[0])]}.{key}"]).float()
            for key, _ in found[0].named_parameters()
        }
    except HeadError:
        return None
    norm: nn.Module = found[0].to_empty(device="cpu").float()
    norm.load_state_dict(state)
    return norm.requires_grad_(False)


class _Tensors:
    """Single tensors of a checkpoint in safetensors.

    Args:
        name: its path or name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        index = self._file(INDEX)
        self.files: dict[str, str] = {}
        if index is not None:
            self.files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (path := self._file(FILE)) is not None:
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                self.files = dict.fromkeys(file.keys(), FILE)
        else:
            raise HeadError(
                f"`head` {name!r} has neither {FILE} nor {INDEX}; convert the checkpoint to "
                "safetensors: save_pretrained()"
            )

    def read(self, paths: Sequence[str]) -> Tensor:
        """The tensor of the first of some paths that there is, whatever comes before it.

        A language model inside of a larger one has a prefix to its names.

        Raises:
            HeadError: there is none, or more than one.
        """
        from safetensors import safe_open

        for path in paths:
            inner = path.removeprefix("model.")
            near = [x for x in self.files if x.endswith(f".{path}") or x.endswith(f".{inner}")]
            found = [path] if path in self.files else near
            if len(found) == 1:
                file = self._file(self.files[found[0]])
                if file is None:
                    raise HeadError(f"{self.files[found[0]]} of {self.name!r} is missing")
                with safe_open(file, "pt") as content:
                    tensor: Tensor = content.get_tensor(found[0])
                return tensor
        raise HeadError(
            f"the checkpoint {self.name!r} has no tensor {' or '.join(paths)}; name the one that "
            "is served, before it was quantised"
        )

    def _file(self, name: str) -> Path | None:
        """A file of the checkpoint, fetched if need be."""
        from transformers.utils.hub import cached_file

        missing: Any = {"_raise_exceptions_for_missing_entries": False}
        path = cached_file(self.name, name, **missing)
        return None if path is None else Path(path)
