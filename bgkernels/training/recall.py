"""A teacher that does not read the same text twice."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bgkernels.training.files import digest
from bgkernels.training.models import CausalLM
from bgkernels.training.translated import TranslatedLM

Key = tuple[str, torch.Size, bool]


@dataclass(frozen=True)
class RecallingLM(CausalLM):
    """A frozen model that keeps the hidden states of what it has read, until its memory is full.

    Methods are compared on the same batches and validated on the same windows, and hidden states
    are small where logits are not: 768 bytes a token for the demo's teacher, of 192 columns. Not
    for sharded models, which all processes must ask at once.

    Args:
        limit: bytes to keep; what comes later is read each time.

    Example:
        >>> from bgkernels.training import models
        >>> model = models.small_llama(models.ModelShape(32, 1, 1), vocab=512, length=64, seed=0)
        >>> teacher = RecallingLM.of(model)
        >>> text = torch.zeros(2, 5, dtype=torch.long)
        >>> teacher.hidden(text) is teacher.hidden(text.clone())
        True
    """

    limit: int = 512 * 2**20
    kept: dict[Key, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, model: CausalLM) -> CausalLM:
        """The same model, frozen, with an empty memory."""
        model.freeze()
        if isinstance(model, TranslatedLM):
            return model.recalling(cls.of)
        return cls(model.network, model.logit_scale, model.logit_softcap)

    @torch.no_grad()
    def hidden(self, tokens: Tensor) -> Tensor:
        """As of any model, without gradients."""
        autocast = torch.is_autocast_enabled(tokens.device.type)
        key = (digest([tokens.cpu().numpy().tobytes()]), tokens.shape, autocast)
        found = self.kept.get(key)
        if found is None:
            found = super().hidden(tokens)
            if found.nbytes + sum(x.nbytes for x in self.kept.values()) <= self.limit:
                self.kept[key] = found
        return found
