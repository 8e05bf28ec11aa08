"""The study: a world, students by every method, and what is known of them exactly."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

from bgkernels.training.claims import Finding, Interval, Measured, judge
from bgkernels.training.config import plain
from bgkernels.training.machine import one_thread
from bgkernels.training.progress import Display, Silent
from bgkernels.training.study.claims import CLAIMS
from bgkernels.training.study.config import StudyConfig
from bgkernels.training.study.exact import Exact, examine
from bgkernels.training.study.lesson import REFERENCE, STUDIED, teach, teacher_texts
from bgkernels.training.study.measures import measure
from bgkernels.training.study.world import make_world


@dataclass(frozen=True)
class StudyResult:
    """Everything that the study found.

    Args:
        config: what was asked.
        measured: hidden units → method → measures of each student.
        seconds: hidden units → method → processor time of its students' training.
        findings: every claim at every size.
        identity: the largest absolute difference between EB and the sum that it must equal, in
            nats a text, over all students.
        duration: seconds of the whole.
    """

    config: StudyConfig
    measured: dict[int, dict[str, Measured]]
    seconds: dict[int, dict[str, float]]
    findings: list[Finding]
    identity: float
    duration: float

    @property
    def on_policy_cost(self) -> float:
        """Training time of on-policy students as a multiple of soft-only ones, over all sizes.

        The geometric mean of the ratios.
        """
        ratios = [x["on-policy"] / x["soft"] for x in self.seconds.values()]
        return math.exp(sum(map(math.log, ratios)) / len(ratios))

    def plain(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "config": plain(self.config),
            "identity": self.identity,
            "on_policy_cost": self.on_policy_cost,
            "duration": self.duration,
            "students": {
                str(hidden): {
                    method: {
                        "title": STUDIED[method].title,
                        "seconds": self.seconds[hidden][method],
                        **{
                            name: asdict(Interval.of(values)) | {"values": values.tolist()}
                            for name, values in measured.items()
                        },
                    }
                    for method, measured in methods.items()
                }
                for hidden, methods in self.measured.items()
            },
            "findings": [asdict(f) | {"verdict": f.verdict} for f in self.findings],
        }


def run_study(config: StudyConfig, display: Display | None = None) -> StudyResult:
    """Teach students of every method and size, and evaluate them exactly.

    Args:
        config: what to do.
        display: where to show progress; None: nowhere.

    Example:
        >>> result = run_study(StudyConfig.quick())  # doctest: +SKIP
        >>> result.identity < 1e-10  # doctest: +SKIP
        True
    """
    display, started = display or Silent(), time.perf_counter()
    world = make_world(config.world)
    measured: dict[int, dict[str, Measured]] = {}
    seconds: dict[int, dict[str, float]] = {}
    identity = 0.0
    with one_thread():
        texts = teacher_texts(config, world)
        for hidden in config.sizes:
            measured[hidden], seconds[hidden] = {}, {}
            reference: Exact | None = None
            for name, method in STUDIED.items():
                with display.working(f"{hidden} hidden units, {method.title}"):
                    lesson = teach(config, world, method, hidden, texts)
                    exact = examine(world, lesson.students.table())
                reference = exact if name == REFERENCE else reference
                assert reference is not None
                measured[hidden][name] = measure(exact, reference)
                seconds[hidden][name] = lesson.seconds
                identity = max(identity, discrepancy(exact))
    findings = [judge(claim, hidden, measured[hidden]) for claim in CLAIMS for hidden in measured]
    duration = time.perf_counter() - started
    return StudyResult(config, measured, seconds, findings, identity, duration)


def discrepancy(exact: Exact) -> float:
    """Largest distance, over students, between exposure bias and the sum that it must equal."""
    gap = exact.own_loss.sum(-1) - exact.taught_loss.sum(-1) - exact.bias.sum(-1)
    return float(gap.abs().max())
