"""A language small enough to be known exactly, with bridges and gardens.

A text has a fixed number of steps, each of one kind:

* **plain**: one token is right;
* **bridge**: a few tokens keep the text sound, one of them nearly always; any other *breaks* it for
  good: at every later bridge the teacher then wants another token;
* **garden**: many tokens will do, and none breaks anything; which half the choice came from sets
  the text's *style*, which later gardens keep to.

Plain steps and gardens forgive: a token that is wrong there is put right before the text goes on
(``forgiving``; otherwise it stays, and a student meets a last token that its lessons never had).

The teacher knows whether a text is broken, and its style. A student reads the step and the last
token alone, so ``(step, broken, style, last)`` is a finite Markov chain under either, and every
expectation is a sum (:mod:`~bgkernels.training.study.exact`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bgkernels.training.study.config import WorldConfig

Speaker = Callable[[int, Tensor, Tensor], Tensor]
"""``(step, last, condition)``, the latter two ``(...)``, to ``(..., vocab)`` logits."""

PLAIN, BRIDGE, GARDEN = range(3)
CONDITIONS = 4
"""What the teacher knows beside the step: ``2·broken + style``."""

CERTAINTY = (0.98, 0.97, 0.96, 0.95)
"""How sure the teacher is at each bridge of a sound text, in turn."""


@dataclass(frozen=True)
class World:
    """The language and its teacher.

    Args:
        kinds: ``(steps,)`` of ``PLAIN``, ``BRIDGE`` and ``GARDEN``.
        teacher: ``(steps, CONDITIONS, vocab)`` fp64 log-probabilities of the next token; every
            token has some.
        following: ``(steps, CONDITIONS, vocab)`` the condition after each token.
        kept: ``(steps, CONDITIONS, vocab)`` the token that the text goes on with after each.

    Example:
        >>> world = make_world(WorldConfig())
        >>> world.teacher.exp().sum(-1).allclose(torch.ones(36, 4, dtype=torch.float64))
        True
    """

    kinds: Tensor
    teacher: Tensor
    following: Tensor
    kept: Tensor

    @property
    def steps(self) -> int:
        """Tokens of a text."""
        return self.teacher.shape[0]

    @property
    def vocab(self) -> int:
        """Tokens of the language."""
        return self.teacher.shape[-1]


def make_world(config: WorldConfig) -> World:
    """The language of a configuration; the same one gives the same language."""
    kinds = _script(config)
    rows = torch.zeros(config.steps, CONDITIONS, config.vocab, dtype=torch.float64)
    following = torch.arange(CONDITIONS)[:, None].repeat(config.steps, 1, config.vocab)
    generator, bridges = torch.Generator().manual_seed(config.seed), 0
    for t, kind in enumerate(kinds.tolist()):
        tokens = torch.randperm(config.vocab, generator=generator)
        if kind == PLAIN:
            rows[t, :, tokens[0]] = 1.0
        elif kind == BRIDGE:
            _bridge(rows[t], following[t], tokens, config, CERTAINTY[bridges % len(CERTAINTY)])
            bridges += 1
        else:
            _garden(rows[t], following[t], tokens, config)
    kept = torch.arange(config.vocab).expand_as(rows).clone()
    if config.forgiving:
        wrong = (rows == 0) & (kinds != BRIDGE)[:, None, None]
        kept = torch.where(wrong, rows.argmax(-1, keepdim=True), kept)
    rows = (1 - config.slip) * rows + config.slip / config.vocab
    return World(kinds, rows.log(), following, kept)


def _script(config: WorldConfig) -> Tensor:
    """Bridges and gardens in turn, spread evenly, a bridge first."""
    pairs = min(config.bridges, config.gardens)
    events = [BRIDGE, GARDEN] * pairs
    events += [BRIDGE] * (config.bridges - pairs) + [GARDEN] * (config.gardens - pairs)
    kinds = torch.full((config.steps,), PLAIN)
    for i, event in enumerate(events):
        kinds[(2 * i + 1) * config.steps // (2 * len(events))] = event
    return kinds


def _bridge(
    rows: Tensor, following: Tensor, tokens: Tensor, config: WorldConfig, certainty: float
) -> None:
    """One token with ``certainty``, the others that keep it share the rest."""
    keeping, others = tokens[: config.bridge_choices], tokens[config.bridge_choices :]
    rows[:2, keeping] = (1 - certainty) / (config.bridge_choices - 1)
    rows[:2, keeping[0]] = certainty
    rows[2:, others[0]] = 1.0  # what a broken text wants here
    following[:2, others] += 2


def _garden(rows: Tensor, following: Tensor, tokens: Tensor, config: WorldConfig) -> None:
    """Falling probabilities; the other style exchanges the two halves."""
    chosen, half = tokens[: config.garden_choices], config.garden_choices // 2
    falling = torch.linspace(0, -2.5, config.garden_choices, dtype=torch.float64).softmax(0)
    for condition in range(CONDITIONS):
        broken, style = divmod(condition, 2)
        rows[condition, chosen] = falling.roll(half * style)
        following[condition, chosen[:half]] = 2 * broken
        following[condition, chosen[half:]] = 2 * broken + 1


@dataclass(frozen=True)
class Texts:
    """Texts with what teacher and student know before each token.

    Args:
        tokens: ``(..., steps)``.
        last: ``(..., steps)`` the token kept before; 0 at the start.
        condition: ``(..., steps)``.
    """

    tokens: Tensor
    last: Tensor
    condition: Tensor

    def __getitem__(self, chosen: Tensor) -> Texts:
        """Some of the texts of each student, by their numbers, ``(texts,)``."""
        return Texts(self.tokens[:, chosen], self.last[:, chosen], self.condition[:, chosen])


def write(world: World, speaker: Speaker, shape: tuple[int, ...], seed: int) -> Texts:
    """Sample texts token by token.

    Args:
        world: the language.
        speaker: who writes.
        shape: of the texts, such as ``(students, texts)``.
        seed: of the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    last, condition = torch.zeros(2, *shape, dtype=torch.long)
    said = []
    for t in range(world.steps):
        logits = speaker(t, last, condition)
        race = torch.empty_like(logits).exponential_(generator=generator)
        token = (logits - race.log()).argmax(-1)  # the Gumbel-max trick
        said.append((token, last, condition))
        last, condition = world.kept[t, condition, token], world.following[t, condition, token]
    return Texts(*(torch.stack(x, dim=-1) for x in zip(*said, strict=True)))
