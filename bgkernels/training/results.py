"""What the demo found, as values: for the table, the figure and ``results.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bgkernels.training.config import DemoConfig, plain
from bgkernels.training.evaluate import Measures
from bgkernels.training.loop import History
from bgkernels.training.maps import TokenMap
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

    @property
    def description(self) -> str:
        """The corpus in a line."""
        (files, held_out), (tokens, held_out_tokens) = self.files, self.tokens
        return (
            f"{files} texts with {tokens:,} tokens to train on, {held_out} with "
            f"{held_out_tokens:,} held out, from {self.origin}"
        )


@dataclass(frozen=True)
class TeacherFacts:
    """The teacher.

    Args:
        name: what it is.
        parameters: how many.
        cross_entropy: on the held-out text that the students are scored on.
        curve_cross_entropy: on the part of it that the validation curves are of.
        history: of its training; empty for a pretrained model.
        marks: measures of its marks, of a task.
    """

    name: str
    parameters: int
    cross_entropy: float
    curve_cross_entropy: float
    history: History
    marks: dict[str, float] | None = None


@dataclass(frozen=True)
class StudentResult:
    """One student: its training, its measures, and of a task those of its marks."""

    parameters: int
    history: History
    measures: Measures
    marks: dict[str, float] | None = None


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found.

    Args:
        config: what was asked.
        corpus, teacher: what the students learnt from.
        students: by method.
        passages: held-out text with what every model would have said.
        seconds: of this invocation; less than the training took where it was resumed.
    """

    config: DemoConfig
    corpus: CorpusFacts
    teacher: TeacherFacts
    students: dict[str, StudentResult]
    passages: tuple[TokenMap, ...]
    seconds: float

    @property
    def title(self) -> str:
        """Who learnt from whom."""
        student = next(iter(self.students.values()))
        sizes = (f"{x / 1e6:.2f} M" for x in (self.teacher.parameters, student.parameters))
        teacher, small = sizes
        students = "a student" if len(self.students) == 1 else f"{len(self.students)} students"
        return f"A teacher of {teacher} parameters, and {students} of {small}"

    @property
    def caption(self) -> str:
        """How to read a table of the measures."""
        return (
            f"± standard error over {self.prompts} prompts. Bridges: tokens where the teacher's "
            f"entropy is below {self.config.evaluation.threshold:g}·log V; gardens: the others. "
            f"The teacher's own cross-entropy on the held-out files is "
            f"{self.teacher.cross_entropy:.3f}. The excess is exposure bias: how much further from "
            "the teacher a student is on what it wrote itself than on what the teacher wrote."
        )

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
            "title": self.title,
            "data": self.corpus.description,
            "caption": self.caption,
            "config": plain(self.config),
            "corpus": asdict(self.corpus),
            "teacher": asdict(self.teacher) | {"marks": _finite(self.teacher.marks)},
            "bridge_share": self.bridge_share,
            "students": {
                method: {
                    "title": find(method).title,
                    "parameters": student.parameters,
                    "history": asdict(student.history),
                    "marks": _finite(student.marks),
                    "measures": {
                        name: {part: estimate.plain() for part, estimate in parts.items()}
                        for name, parts in student.measures.items()
                    },
                }
                for method, student in self.students.items()
            },
            "passages": [asdict(passage) for passage in self.passages],
            "seconds": self.seconds,
        }


def _finite(marks: dict[str, float] | None) -> dict[str, float | None] | None:
    return finite(marks) if marks else None
