"""Training of the students of one method and size, by the library's own losses."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.training.methods import METHODS, Method, advance, find
from bgkernels.training.study.config import StudyConfig
from bgkernels.training.study.students import Students
from bgkernels.training.study.world import Texts, World, write

REFERENCE = "data"
"""The method whose κ weighs everybody's errors: cross-entropy on the teacher's texts."""


def _argmax(name: str) -> Method:
    """A method whose hard label is the teacher's favourite token, by its plain title."""
    return replace(find(f"{name}+argmax"), title=METHODS[name].title)


STUDIED: dict[str, Method] = {
    REFERENCE: replace(METHODS["hard"], title="hard: the text's token"),
    "hard": replace(METHODS["argmax"], title="hard: teacher's argmax"),
    "soft": METHODS["soft"],
    "static": _argmax("static"),
    "confidence": _argmax("confidence"),
    "entropy": _argmax("entropy"),
    "shannon": _argmax("shannon"),
    "threshold": _argmax("threshold"),
    "risk-guided": METHODS["risk-guided"],
    "reverse": _argmax("reverse-confidence"),
    "reverse-kl": METHODS["reverse-kl"],
    "half-on-policy": replace(
        METHODS["on-policy"], title="on-policy soft, λ = ½", written_by_student=0.5
    ),
    "on-policy": METHODS["on-policy"],
}
"""In the order of the table. All texts are the teacher's own, except in the last two methods."""


@dataclass(frozen=True)
class Lesson:
    """Trained students.

    Args:
        students: one a seed.
        losses: of each step, their mean.
        seconds: of the processor, spent on training; what else the machine does is left out.
    """

    students: Students
    losses: list[float]
    seconds: float


def teacher_texts(config: StudyConfig, world: World) -> Texts:
    """``(students, texts, steps)`` texts, other ones for each student."""
    parts = [
        write(world, lambda t, last, c: world.teacher[t, c], (config.texts,), seed)
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    return Texts(*(torch.stack(x) for x in zip(*(vars(p).values() for p in parts), strict=True)))


def teach(config: StudyConfig, world: World, method: Method, hidden: int, texts: Texts) -> Lesson:
    """Train students of one size by one method.

    Whatever the method, a student of a seed starts from the same weights, and sees the same texts
    in the same order, unless it writes them itself.
    """
    seeds = range(config.seed, config.seed + config.seeds)
    students = Students(seeds, world.steps, world.vocab, hidden)
    optimizer = torch.optim.AdamW(students.parameters(), config.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.seed)
    policy, divergence, losses = method.routing(), method.divergence_or("forward_kl"), []
    started = time.process_time()
    for step in range(config.steps):
        progress = step / config.steps
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - progress)
        chosen = torch.randint(config.texts, (config.batch,), generator=generator)
        batch = texts[chosen]
        if method.on_policy(step):
            batch = write(world, students.say, batch.tokens.shape[:-1], config.seed + step)
        advance(policy, progress)
        loss = bg.hybrid_distillation(
            students(batch.last),
            bg.LogitsTeacher(heard(world, batch)),
            batch.tokens if method.target == "data" else method.target,
            routing=policy,
            divergence=divergence,
            temperature=method.temperature_at(progress),
            num_items=batch.tokens[0].numel(),  # each student's own mean
        )
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / config.seeds)
    return Lesson(students, losses, time.process_time() - started)


def heard(world: World, texts: Texts) -> Tensor:
    """``(..., steps, vocab)`` what the teacher would say before each token, fp32."""
    return world.teacher[torch.arange(world.steps), texts.condition].float()
