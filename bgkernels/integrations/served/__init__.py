"""A teacher behind a server: its head is here, and its hidden states come from there."""

from bgkernels.integrations.served.head import CheckpointHead, read_head
from bgkernels.integrations.served.teacher import ServedTeacher

__all__ = ["CheckpointHead", "ServedTeacher", "read_head"]
