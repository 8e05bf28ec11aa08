"""Students that train only a low-rank adapter (LoRA, Hu et al. 2021)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from bgkernels.training import ranks
from bgkernels.training.checkpoint import WHOLE
from bgkernels.training.errors import extra
from bgkernels.training.models import CausalLM, writing


def adapt(model: CausalLM, rank: int, seed: int) -> Any:
    """Give every linear layer but the head an adapter, in place, and freeze all else.

    The head stays plain, since the loss reads its weight. An adapter adds ``2·B·A`` to a weight;
    ``B`` starts at zero, so the model starts as it was.

    Args:
        model: the student.
        rank: of ``B·A``.
        seed: of ``A``; torch's global generator is left as it was.

    Returns:
        The PEFT model around ``model.network``, for :func:`merge`.

    Raises:
        MissingExtra: the package ``peft`` is not installed.

    Example:
        >>> from bgkernels.training.config import ModelShape
        >>> from bgkernels.training.models import small_llama
        >>> student = small_llama(ModelShape(32, 1, 1), vocab=512, length=64, seed=0)
        >>> adapter = adapt(student, rank=4, seed=0)  # doctest: +SKIP
        >>> merge(adapter, Path("adapter"))  # doctest: +SKIP
    """
    with extra("lora"):
        import peft
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model.network, config)


def merge(adapter: Any, folder: Path) -> None:
    """Save an adapter, then add it to the weights of its model, which is plain again.

    Args:
        adapter: what :func:`adapt` returned.
        folder: for ``PeftModel.from_pretrained``.

    Raises:
        TrainingError: the disk is full or the folder is not writable.
    """
    state = get_model_state_dict(adapter, options=WHOLE)
    if ranks.first():
        with writing(folder):
            adapter.save_pretrained(folder, state_dict=state)
    adapter.merge_and_unload()
