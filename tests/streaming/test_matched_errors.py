"""What a matched teacher refuses, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

import bgkernels as bg

PAIRED = torch.arange(4).expand(2, 4)
LOGITS = bg.LogitsTeacher(torch.randn(2, 9))
MATCHED = bg.MatchedTeacher(LOGITS, PAIRED)
ERRORS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "kind": (bg.MatchedTeacher(MATCHED, PAIRED), {}, TypeError, "LinearTeacher, LogitsTeacher or"),
    "pairs": (bg.MatchedTeacher(LOGITS, [(0, 1)]), {}, TypeError, "teacher.pairs"),  # type: ignore[arg-type]
    "dtype": (bg.MatchedTeacher(LOGITS, PAIRED.int()), {}, TypeError, "int64"),
    "shape": (bg.MatchedTeacher(LOGITS, PAIRED.T), {}, TypeError, r"\(2, m\)"),
    "nothing": (bg.MatchedTeacher(LOGITS, PAIRED[:, :0]), {}, ValueError, "a token at least"),
    "student": (bg.MatchedTeacher(LOGITS, PAIRED + 7), {}, ValueError, "of the student must lie"),
    "teacher": (
        bg.MatchedTeacher(bg.LogitsTeacher(torch.randn(2, 3)), PAIRED), {}, ValueError,
        "of the teacher must lie",
    ),
    "twice": (bg.MatchedTeacher(LOGITS, PAIRED.new_zeros(2, 3)), {}, ValueError, "comes twice"),
    "rest": (bg.MatchedTeacher(LOGITS, PAIRED, "renormalize"), {}, ValueError, "teacher.rest"),
    "positions": (
        bg.MatchedTeacher(LOGITS, PAIRED, positions=torch.tensor([0, 2])), {}, ValueError,
        "the teacher's rows",
    ),
    "positions' shape": (
        bg.MatchedTeacher(LOGITS, PAIRED, positions=torch.tensor([0])), {}, ValueError, "leading",
    ),
    "positions' dtype": (
        bg.MatchedTeacher(LOGITS, PAIRED, positions=torch.tensor([0.0, 1.0])), {}, TypeError,
        "teacher.positions",
    ),
    "rows": (
        bg.MatchedTeacher(bg.LogitsTeacher(torch.randn(3, 9)), PAIRED), {}, ValueError,
        "teacher.teacher.logits",
    ),
    "word": (MATCHED, {"target": "teacher_argmax"}, ValueError, "labels of the student's"),
    "vocabulary": (MATCHED, {"vocab_size": 3}, ValueError, "of the student must lie"),
    "distribution": (
        bg.MixtureTeacher([MATCHED, LOGITS], (0.5, 0.5), "distribution"), {}, NotImplementedError,
        "kind='sum'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    teacher, options, kind, message = ERRORS[name]
    options = {"target": torch.tensor([1, 2])} | options
    with pytest.raises(kind, match=message):
        bg.hybrid_distillation(torch.randn(2, 9), teacher, options.pop("target"), **options)


def test_compilation_is_refused() -> None:
    torch._dynamo.reset()
    y = torch.tensor([1, 2])

    def loss(z: Tensor) -> Any:
        return bg.hybrid_distillation(z, MATCHED, y)

    with pytest.raises(Exception, match=r"torch\.compile does not support this MatchedTeacher"):
        torch.compile(loss, fullgraph=True, backend="eager")(torch.randn(2, 9))


def test_a_vocabulary_that_is_shared_out_is_refused() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        for teacher in (MATCHED, bg.MixtureTeacher([LOGITS, MATCHED], (0.5, 0.5))):
            with pytest.raises(NotImplementedError, match=r"`vocab_group`.*pass whole heads"):
                bg.hybrid_distillation(
                    torch.randn(2, 9), teacher, torch.tensor([1, 2]), vocab_group=dist.group.WORLD
                )
    finally:
        dist.destroy_process_group()
