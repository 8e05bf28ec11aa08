"""Large tensors lie in huge pages where the system has them, and are what they were."""

from __future__ import annotations

import pytest
import torch

from bgkernels.streaming import memory
from bgkernels.streaming.memory import LEAST, PAGE, in_huge_pages


def test_whole_pages_of_large_tensors_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        memory, "_advise", lambda: lambda start, size, _: asked.append((start, size))
    )
    small, large = torch.empty(LEAST - 1, dtype=torch.uint8), torch.empty(LEAST, dtype=torch.uint8)
    assert in_huge_pages(small) is small and not asked
    assert in_huge_pages(large) is large
    ((start, size),) = asked
    assert start % PAGE == size % PAGE == 0 and size >= LEAST - 2 * PAGE
    assert large.data_ptr() <= start and start + size <= large.data_ptr() + LEAST
    assert in_huge_pages(torch.empty(LEAST, device="meta")).is_meta and len(asked) == 1


def test_the_advice_changes_no_number() -> None:
    x = in_huge_pages(torch.empty(LEAST // 4)).copy_(torch.arange(LEAST // 4))
    assert torch.equal(x, torch.arange(LEAST // 4, dtype=torch.float32))


def test_a_system_without_huge_pages_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_advise", lambda: None)
    assert in_huge_pages(torch.empty(LEAST)).numel() == LEAST
