"""What the demo found, as values: for the table, the figure and ``results.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bgkernels.training.config import DemoConfig, plain
from bgkernels.training.evaluate import Measures
from bgkernels.training.loop import History
from bgkernels.training.marks import finite
from bgkernels.training.methods import find


@dataclass(frozen=True)
class CorpusFacts:
    """Size of the corpus.

    Args:
        origin: the folder.
        digest: identifies texts and split.
        files, tokens: of the training part and of the held-out part.
        vocab: tokens of the tokenizer.
    """

    origin: str
    digest: str
    files: tuple[int, int]
    tokens: tuple[int, int]
    vocab: int


@dataclass(frozen=True)
class TeacherFacts:
    """The teacher.

    Args:
        name: what it is.
        parameters: how many.
        cross_entropy: on the held-out text that the students are scored on.
        curve_cross_entropy: on the part of it that the validation curves are of.
        history: of its training; empty for a pretrained model.
    """

    name: str
    parameters: int
    cross_entropy: float
    curve_cross_entropy: float
    history: History


@dataclass(frozen=True)
class StudentResult:
    """One student: its training, its measures, and of a task those of its marks."""

    parameters: int
    history: History
    measures: Measures
    marks: dict[str, float] | None = None


@dataclass(frozen=True)
class Passage:
    """A piece of held-out text as the teacher sees it.

    Args:
        tokens: as text.
        ambiguity: the teacher's ``H / log V`` where it predicts each of them.
    """

    tokens: tuple[str, ...]
    ambiguity: tuple[float, ...]


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found.

    Args:
        config: what was asked.
        corpus, teacher: what the students learnt from.
        students: by method.
        passage: for the picture.
        seconds: of this invocation; less than the training took where it was resumed.
    """

    config: DemoConfig
    corpus: CorpusFacts
    teacher: TeacherFacts
    students: dict[str, StudentResult]
    passage: Passage
    seconds: float

    @property
    def prompts(self) -> int:
        """Held-out windows that were scored."""
        first = next(iter(self.students.values()))
        return len(first.measures["kl"]["all"].influence)

    @property
    def bridge_share(self) -> float:
        """Bridges among the scored tokens of the held-out files; the same for every student."""
        first = next(iter(self.students.values()))
        return first.measures["kl"]["bridge"].share

    def plain(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "config": plain(self.config),
            "corpus": asdict(self.corpus),
            "teacher": asdict(self.teacher),
            "bridge_share": self.bridge_share,
            "students": {
                method: {
                    "title": find(method).title,
                    "parameters": student.parameters,
                    "history": asdict(student.history),
                    "marks": student.marks and finite(student.marks),
                    "measures": {
                        name: {part: estimate.plain() for part, estimate in parts.items()}
                        for name, parts in student.measures.items()
                    },
                }
                for method, student in self.students.items()
            },
            "seconds": self.seconds,
        }
