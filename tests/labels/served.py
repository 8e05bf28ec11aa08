"""A served teacher as a source of labels, without a checkpoint."""

from __future__ import annotations

import torch

import bgkernels as bg
from bgkernels.labels.served.api import HiddenStates
from bgkernels.labels.served.client import Client
from bgkernels.labels.served.source import ServedStates
from bgkernels.training.models import CausalLM


def states(client: Client, teacher: CausalLM) -> ServedStates:
    """The hidden states that a server sends, and the teacher's head."""
    weight = teacher.head.weight.detach()
    head = bg.LinearTeacher(weight.new_empty(0, weight.shape[1]), weight)
    return ServedStates(HiddenStates(client, "teacher", torch.float32), head, "teacher", "digest")
