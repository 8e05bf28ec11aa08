"""The labels of a document do not depend on the one beside it."""

from __future__ import annotations

import pytest
import torch

from bgkernels.labels import CaptureConfig, LabelDataset, generate
from bgkernels.training.models import CausalLM, read_head
from tests.models import REPORTED, make

LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [6.0] * 4,
    "original_max_position_embeddings": 8, "rope_theta": 100.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 100.0}
DOCUMENTS = [[5, 9, 40], list(range(3, 33)), [7, 8, 30, 11], [], [9, 60, 5], list(range(40, 60))]


def teacher(kind: str) -> CausalLM:
    if kind == "longrope":
        network = make(
            "Phi3ForCausalLM", **REPORTED, rope_parameters=LONG,
            original_max_position_embeddings=8,
        )  # fmt: skip
    elif kind == "dynamic":
        size = REPORTED | {"max_position_embeddings": 8, "rope_parameters": DYNAMIC}
        network = make("LlamaForCausalLM", **size)
    else:
        network = make("LlamaForCausalLM", **REPORTED)
    return read_head(network, "--teacher")


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "fixed"])
def test_short_documents_stay_short(tmp_path, kind):
    model, seen = teacher(kind), []
    generate(model, DOCUMENTS, tmp_path, CaptureConfig(k=8, batch_size=6))
    model.network.model.register_forward_hook(lambda *a: seen.append(1))
    labels = LabelDataset(tmp_path)
    for i, document in enumerate(DOCUMENTS):
        if not document:
            continue
        with torch.no_grad():
            network = teacher(kind).network  # anew: dynamic frequencies remember
            expected = network(torch.tensor([document])).logits[0].log_softmax(-1)
        found = labels[i].labels
        picked = expected.gather(-1, found.indices.long())
        torch.testing.assert_close(found.logprobs.float(), picked, rtol=0, atol=2e-2)


@pytest.mark.parametrize(("kind", "forwards"), [("fixed", 3), ("longrope", 6)])
def test_documents_share_a_forward_where_they_can(tmp_path, kind, forwards):
    """Two forwards tell; then there is one of all, or one of each length."""
    model, seen = teacher(kind), []
    model.network.model.register_forward_hook(lambda *a: seen.append(1))
    documents = [x for x in DOCUMENTS if x]
    generate(model, documents, tmp_path, CaptureConfig(k=8, batch_size=6))
    assert len(seen) == forwards
