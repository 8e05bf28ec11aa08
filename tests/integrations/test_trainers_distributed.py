"""DDP through the ``Trainer`` and FSDP2 in a plain loop: two processes give what one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra `integrations`: transformers")
pytest.importorskip("accelerate", reason="needs the extra `integrations`: accelerate")

from tests.integrations.steps import sgd_step
from tests.integrations.two_tokenizers import Pair
from tests.models import batch, dense, tiny
from tests.pairs import saved_by_two

pytestmark = pytest.mark.slow
PAIR = Pair.make()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What process 0 of two saved."""
    folder = tmp_path_factory.mktemp("distributed")
    PAIR.save(folder)
    return saved_by_two("tests.distributed_step", folder)


def test_ddp(found: dict[str, Any]) -> None:
    expected = sgd_step(tiny())
    for name, p in found["ddp"].items():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_fsdp2_with_two_tokenizers(found: dict[str, Any]) -> None:
    for name, p in PAIR.differentiated(rows=4).named_parameters():
        got = found["two tokenizers"][name].double()
        torch.testing.assert_close(got, p.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("case", ["fsdp", "fsdp tied", "fsdp apart"])
def test_fsdp2(found: dict[str, Any], case: str) -> None:
    student = tiny("llama tied" if case == "fsdp tied" else "llama").double()
    data = batch(rows=4)
    items = (data["labels"][:, 1:] != -100).sum()
    (dense(student, tiny(seed=1, hidden_size=24).double(), data, 2.0) / items).backward()
    got = found[case]
    for name, p in student.named_parameters():
        torch.testing.assert_close(got[name].double(), p.grad, rtol=1e-4, atol=1e-5, msg=name)
