"""What can go wrong with cached labels."""

from __future__ import annotations

from bgkernels.training.errors import TrainingError


class LabelError(TrainingError):
    """Labels cannot be made, written or read; the message names the cause and the remedy."""


class CorruptLabels(LabelError):
    """A file of labels is missing, or is not what was written."""


class ServerError(LabelError):
    """An inference server cannot be asked, or does not answer as its teacher would."""


class NoStates(ServerError):
    """An inference server has no endpoint for hidden states."""
