"""Held-out passages for a report, as every model of a run reads them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bgkernels.training.evaluate import score
from bgkernels.training.maps import AHEAD, TokenMap, hear
from bgkernels.training.materials import Materials
from bgkernels.training.models import CausalLM
from bgkernels.training.tokens import Batch
from bgkernels.training.translated import TranslatedLM

PASSAGES, LONGEST = 3, 160
"""How many, and their most tokens."""


def excerpts(
    materials: Materials, teacher: CausalLM, models: Mapping[str, CausalLM]
) -> tuple[TokenMap, ...]:
    """The held-out window whose share of bridges is the median one, and those at the quartiles.

    A model behind a server, or of another tokenizer, cannot be asked what it would have said.

    Args:
        materials: tokenizer and windows.
        teacher: who decides on bridges and gardens.
        models: by name, those that are asked; the last of them is a student.
    """
    exam = materials.exam
    threshold = exam.config.threshold
    tokens = score([*models.values()][-1], teacher, Batch.of(exam.windows))
    ambiguity = tokens.ambiguity.where(tokens.soft, threshold)  # of neither kind
    order = (ambiguity < threshold).float().mean(-1).argsort().tolist()
    quarters = (len(order) * part // 4 for part in (2, 1, 3))
    askable = {name: model for name, model in models.items() if can_be_asked(model)}
    maps = []
    for index in dict.fromkeys(order[place] for place in quarters):
        window = exam.windows[index]
        places = _places(materials, window)
        maps.append(
            TokenMap(
                tuple(str(materials.tokenizer.decode([t])) for t in window[places].tolist()),
                tuple(ambiguity[index][[place - 1 for place in places]].tolist()),
                given=str(
                    materials.tokenizer.decode(window[: places[0]], skip_special_tokens=True)
                ),
                voices={
                    name: hear(model, materials.tokenizer, window, places, exam.stop)
                    for name, model in askable.items()
                },
            )
        )
    return tuple(maps[:PASSAGES])


def can_be_asked(model: CausalLM) -> bool:
    """Whether a model is in this process and writes the run's own tokens."""
    return model.here and not isinstance(model, TranslatedLM)


def _places(materials: Materials, window: Tensor) -> range:
    """What is shown of a window: of a task's text, the solution and its end."""
    exam, text = materials.exam, window.tolist()
    if exam.stop is None:
        return range(1, max(2, min(LONGEST, len(text) - AHEAD) + 1))
    return range(exam.start, text.index(exam.stop, exam.start) + 1)
