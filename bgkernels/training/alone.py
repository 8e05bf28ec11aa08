"""Training without a teacher."""

from __future__ import annotations

from dataclasses import asdict

from bgkernels.training import models, ranks
from bgkernels.training.config import DemoConfig, plain
from bgkernels.training.demo import begin
from bgkernels.training.distill import train_student
from bgkernels.training.excerpts import excerpts
from bgkernels.training.files import write_json
from bgkernels.training.loop import History
from bgkernels.training.marks import describe, examine_by_name, finite
from bgkernels.training.progress import Display, Silent


def run_training(config: DemoConfig, display: Display | None = None) -> History:
    """Train a model by cross-entropy; leaves it in ``model/`` of ``config.output``.

    Args:
        config: its ``student`` and ``student_training`` are the model's.
        display: where to show progress; None: nowhere.

    Raises:
        TrainingError: a cause and its remedy; see :mod:`bgkernels.training.errors`.
    """
    display, task, marks = display or Silent(), config.data.task, None
    materials, facts = begin(config, display)
    model, history = train_student(config, materials, "hard", None, display)
    if task:
        marks = examine_by_name(model, task).measures()
        display.say(describe(marks))
    passages = excerpts(materials, model, {"hard": model})
    if ranks.first():
        found = {
            "title": f"A model of {model.parameters / 1e6:.2f} M parameters",
            "data": facts.description,
            "caption": "",
            "config": plain(config),
            "students": {
                "hard": {
                    "title": "model",
                    "history": asdict(history),
                    "marks": marks and finite(marks),
                    "measures": {},
                }
            },
            "passages": [asdict(passage) for passage in passages],
        }
        write_json(config.output / "results.json", found)
    models.export(model, materials.tokenizer, config.output / "model")
    return history
