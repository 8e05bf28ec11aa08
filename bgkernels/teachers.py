"""Soft labels come from one of these: a head, logits, some of their columns, or a mixture.

A teacher of another vocabulary is matched with the student's.
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
    """The teachers of a mixture, or the one; none for None."""
    return () if teacher is None else teacher.members
