"""Training without a teacher."""

from __future__ import annotations

from bgkernels.training import models, report
from bgkernels.training.config import DemoConfig
from bgkernels.training.corpus import load_corpus
from bgkernels.training.demo import corpus_facts
from bgkernels.training.distill import train_student
from bgkernels.training.loop import History
from bgkernels.training.marks import describe, examine_by_name
from bgkernels.training.materials import prepare
from bgkernels.training.progress import Display, Silent


def run_training(config: DemoConfig, display: Display | None = None) -> History:
    """Train a model by cross-entropy; leaves it in ``model/`` of ``config.output``.

    Args:
        config: its ``student`` and ``student_training`` are the model's.
        display: where to show progress; None: nowhere.

    Raises:
        TrainingError: a cause and its remedy; see :mod:`bgkernels.training.errors`.
    """
    display = display or Silent()
    with display.working("reading and encoding the corpus"):
        corpus = load_corpus(config.data)
        materials = prepare(config, corpus)
    if materials.unusable:
        display.say(report.left_out(materials.unusable))
    display.say(report.describe(corpus_facts(corpus, materials)))
    model, history = train_student(config, materials, "hard", None, display)
    if config.data.task:
        display.say(describe(examine_by_name(model, config.data.task).measures()))
    models.export(model, materials.tokenizer, config.output / "model")
    return history
