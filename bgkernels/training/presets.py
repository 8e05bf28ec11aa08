"""The two runs of ``bgkernels demo``, each of about two minutes of one core.

On text a reader sees words; on a task every answer is right or wrong.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bgkernels.training.accuracy.config import KNOBS, SMALL, TEACHER
from bgkernels.training.config import DataConfig, DemoConfig, EvalConfig, TrainConfig


def on_text() -> DemoConfig:
    """A teacher of a few hundred steps, on the sources of Python's standard library."""
    base = DemoConfig()
    return replace(
        base,
        teacher_training=replace(base.teacher_training, steps=300, validate_every=50),
        student_training=replace(base.student_training, steps=250),
        evaluation=EvalConfig(windows=64),
    )


def on_task(task: str) -> DemoConfig:
    """A teacher that has learnt a task, and students that write well and calculate badly.

    Args:
        task: as :func:`bgkernels.training.tasks.parse` reads it; one without knobs is made easy
            enough for small models.

    Example:
        >>> on_task("arithmetic").data.task
        'arithmetic:terms=5,digits=1,operations=+-,largest=99'
    """
    return DemoConfig(
        output=Path("runs", f"demo-{task.partition(':')[0]}"),
        methods=("hard", "soft", "soft-t2", "threshold+argmax"),
        data=DataConfig(task=KNOBS.get(task, task), batch_size=32),
        teacher_shape=replace(TEACHER, layers=2),
        student_shape=SMALL,
        teacher_training=TrainConfig(1000, 6e-3, validate_every=100, checkpoint_every=200),
        schooling=TrainConfig(450, 8e-3, validate_every=150, checkpoint_every=450),
        student_training=TrainConfig(200, 1.6e-2, validate_every=20),
        evaluation=EvalConfig(windows=64, curve_windows=16),
    )
