"""Stage 3: continued pre-training on the distributions of both teachers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bgkernels.training.config import DataConfig
from bgkernels.training.corpus import load_corpus
from bgkernels.training.recipe.base import Outcome, Recipe
from bgkernels.training.tokens import Batch, Batches, token_stream


def pretrain(recipe: Recipe) -> Outcome:
    """The pruned model, brought back to what its teachers say of every token that it reads."""
    config, student = recipe.config, recipe.models["pruned"].clone()
    teachers = recipe.models["teacher"], recipe.models["second-teacher"]
    text = recipe.batches(prompts=True) if config.corpus is None else text_of(recipe, config.corpus)
    seconds = recipe.imitate(
        "pretrained", student, text, config.pretraining, "two-teachers", teachers
    )
    return Outcome(student, seconds)


@dataclass(frozen=True)
class Text:
    """Batches of a corpus, and what tells them from others."""

    batches: Batches
    identity: Mapping[str, Any]

    def __getitem__(self, number: int) -> Batch:
        """The batch of a number."""
        return self.batches[number]


def text_of(recipe: Recipe, folder: Path) -> Text:
    """The corpus in the tokens of the models.

    Raises:
        CorpusError: it cannot be read, or is too short.
    """
    config = recipe.config
    corpus = load_corpus(DataConfig(corpus=folder))
    stream, learnt = token_stream(recipe.room.tokenizer, corpus.train)
    sizes = config.sequence_length, config.batch_size
    batches = Batches(stream, *sizes, config.seed, learnt)
    return Text(batches, {"corpus": corpus.digest, "sizes": list(sizes)})
