"""The analysis of a pair of real models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import bgkernels as bg
from bgkernels.training.analysis.passages import read_passage
from bgkernels.training.config import DemoConfig, plain
from bgkernels.training.corpus import load_corpus
from bgkernels.training.errors import OptionError
from bgkernels.training.evaluate import Measures, Parts
from bgkernels.training.maps import TokenMap
from bgkernels.training.marks import examine_by_name, finite
from bgkernels.training.materials import Materials, prepare
from bgkernels.training.progress import Display, Silent
from bgkernels.training.sharding import place
from bgkernels.training.translated import TranslatedLM

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AnalysisConfig:
    """What is analysed.

    Args:
        pair: models, text, held-out windows; both models must be named.
        routing: name of the policy whose weights are mapped.
        passages: how many held-out windows are mapped.
        horizon, rollouts: of the risk; with 0 rollouts it is not estimated.
    """

    pair: DemoConfig
    routing: str = "entropy"
    passages: int = 2
    horizon: int = 8
    rollouts: int = 4


@dataclass(frozen=True)
class Analysis:
    """What was found.

    Args:
        config: what was asked.
        measures: on files, on the teacher's continuations and on the student's own.
        accumulation: length of the continuation → ExAccErr by part, as a share.
        passages: token maps.
        prompts: continuations that were scored.
        marks: of a task, measures of the student's solutions.
    """

    config: AnalysisConfig
    measures: Measures
    accumulation: dict[int, Parts]
    passages: list[TokenMap]
    prompts: int
    marks: dict[str, float] | None = None

    def plain(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "config": plain(self.config),
            "prompts": self.prompts,
            "marks": self.marks and finite(self.marks),
            "measures": {name: _plain(parts) for name, parts in self.measures.items()},
            "accumulation": {str(n): _plain(parts) for n, parts in self.accumulation.items()},
            "passages": [asdict(passage) for passage in self.passages],
        }


def _plain(parts: Parts) -> dict[str, Any]:
    return {part: estimate.plain() for part, estimate in parts.items()}


def run_analysis(config: AnalysisConfig, display: Display | None = None) -> Analysis:
    """Score a pair on held-out text and on texts of its own, and map some passages.

    Args:
        config: what to do.
        display: where to show progress; None: nowhere.

    Raises:
        TrainingError: a cause and its remedy; see :mod:`bgkernels.training.errors`.
    """
    display = display or Silent()
    try:
        policy = bg.routing.get(config.routing)
    except (TypeError, ValueError) as error:
        raise OptionError(str(error)) from error
    with display.working("reading models and text"):
        materials = prepare(config.pair, load_corpus(config.pair.data))
    teacher, student, exam = materials.teacher, materials.student, materials.exam
    if teacher is None or config.pair.student is None:
        raise OptionError("an analysis needs two trained models; name --teacher and --student")
    if isinstance(teacher, TranslatedLM):
        raise OptionError(
            "an analysis compares two models token by token; name --teacher and --student of one "
            "tokenizer"
        )
    student.freeze()
    place(student, config.pair)
    threshold = exam.config.threshold
    with display.working("scoring held-out text, the teacher's and the student's"):
        taught = exam.speak(teacher, min(teacher.vocab, student.vocab))
        readings = exam.read(student, teacher, taught)
    with display.working("mapping passages"):
        risk = {"horizon": config.horizon, "rollouts": config.rollouts, "seed": config.pair.seed}
        passages = [
            read_passage(
                student, teacher, materials.tokenizer, text, policy,
                **(risk if config.rollouts else {}),
            )
            for text in _windows(materials, config.passages)
        ]  # fmt: skip
    return Analysis(
        config,
        readings.measures(threshold),
        readings.accumulation(_lengths(exam.windows.shape[1] - exam.start), threshold),
        passages,
        len(exam.windows),
        examine_by_name(student, task).measures() if (task := config.pair.data.task) else None,
    )


def _windows(materials: Materials, count: int) -> Tensor:
    """Held-out windows spread over the text, without their prompts' far beginnings."""
    windows = materials.exam.windows
    return windows[:: max(1, len(windows) // max(1, count))][:count]


def _lengths(longest: int) -> list[int]:
    """Eight lengths or so, up to all of the continuation."""
    return sorted({max(1, longest * i // 8) for i in range(1, 9)})
