"""DeepSpeed ZeRO-3: two processes give what one does, in a plain loop and in the ``Trainer``."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="needs the extra `integrations`: accelerate")

from tests.integrations.two_tokenizers import Pair
from tests.integrations.zero3 import CASES, RATE, steps, student, teacher
from tests.models import dense
from tests.pairs import saved_by_two

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs the extra `deepspeed`"
    ),
]
PAIR = Pair.make()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What process 0 of two saved."""
    folder = tmp_path_factory.mktemp("zero3")
    PAIR.save(folder)
    teacher().save_pretrained(folder / "teacher")
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return saved_by_two("tests.zero3_step", folder, **environment)


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_one_process(found: dict[str, Any], case: str) -> None:
    model, other = student(case).double(), teacher().double()
    for data in steps(case):
        items = (data["labels"][:, 1:] != -100).sum()
        model.zero_grad()
        (dense(model, other, data, 2.0) / items).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * p.grad if p.requires_grad else 0
    for name, p in model.named_parameters():
        got = found[case][name].double()
        torch.testing.assert_close(got, p.detach(), rtol=1e-4, atol=1e-5, msg=name)


def test_two_tokenizers(found: dict[str, Any]) -> None:
    for name, p in PAIR.differentiated(rows=4).named_parameters():
        got = found["two tokenizers"][name].double()
        torch.testing.assert_close(got, p - RATE * p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_parts_are_refused_by_name(found: dict[str, Any]) -> None:
    for name in ("`linear_weight`", "`teacher.weight`"):
        assert f"{name} is empty here: its elements are on other processes" in found["refused"]
    assert "LlamaForCausalLM are partitioned by DeepSpeed ZeRO-3, and no engine" in found["refused"]
    assert "LlamaForCausalLM computes another loss than the cross-entropy" in found["refused"]


def test_the_parts_of_the_loss_are_logged(found: dict[str, Any]) -> None:
    logged = found["logged"]
    assert logged["soft_loss"] > 0 and logged["eval_loss"] == pytest.approx(logged["expected"])
