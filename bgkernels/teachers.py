"""A teacher object is the source of soft labels: a head, logits, their top columns, or a mixture.

:class:`MatchedTeacher` is for a teacher whose vocabulary is not the student's.
"""

from bgkernels.streaming.teachers.base import Teacher
from bgkernels.streaming.teachers.dense import LinearTeacher, LogitsTeacher
from bgkernels.streaming.teachers.matched import MatchedTeacher
from bgkernels.streaming.teachers.mixture import MixtureTeacher
from bgkernels.streaming.teachers.topk import TopKTeacher

__all__ = [
    "LinearTeacher",
    "LogitsTeacher",
    "MatchedTeacher",
    "MixtureTeacher",
    "Teacher",
    "TopKTeacher",
    "members",
]


def members(teacher: Teacher | None) -> tuple[Teacher, ...]:
    """Return the teachers of a mixture, or the single teacher; nothing for None."""
    return () if teacher is None else teacher.members
