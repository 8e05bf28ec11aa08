"""Large tensors on a CPU take over memory that was used before, and nobody shares any."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.streaming import memory
from bgkernels.streaming.memory import LEAST, MOST

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_idle() -> Iterator[None]:
    gc.collect()
    bg.empty_cache()
    yield
    bg.empty_cache()


def taken(size: int = LEAST) -> Tensor:
    return memory.empty((size,), torch.uint8, CPU)


def test_a_tensor_has_the_shape_and_dtype_asked_for() -> None:
    for shape, dtype in (((1 << 10, 1 << 11), torch.bfloat16), ((3, 1 << 20), torch.float64)):
        x = memory.empty(shape, dtype, CPU)
        assert (x.shape, x.dtype, x.is_contiguous()) == (torch.Size(shape), dtype, True)
        assert x.data_ptr() % 64 == 0
        assert torch.equal(x.fill_(3), torch.full(shape, 3, dtype=dtype))
    assert memory.empty((4, LEAST), torch.float32, torch.device("meta")).is_meta


def test_memory_passes_on_once_its_tensor_and_all_views_are_gone() -> None:
    first = taken()
    address, view = first.data_ptr(), first[5:]
    second = taken()
    assert second.data_ptr() != address
    del first
    assert not memory._idle, "a view of it lives"
    del view
    again, other = taken(LEAST), taken()
    assert again.data_ptr() == address != other.data_ptr()


def test_much_larger_memory_is_left_alone_and_given_back() -> None:
    taken(MOST * LEAST + 1)
    assert len(memory._idle) == 1
    small = taken()
    assert not memory._idle, "what did not fit went back to the system"
    del small
    assert len(memory._idle) == 1


def test_small_tensors_are_torchs_own() -> None:
    taken(LEAST - 1)
    assert not memory._idle


def test_threads_never_get_the_same_memory() -> None:
    clashes: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            x = taken().view(torch.int32)
            x[::4096] = number
            clashes.extend([number] if (x[::4096] != number).any() else [])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes


def test_gradients_of_earlier_steps_keep_their_numbers() -> None:
    logits = torch.randn(64, 40_000).requires_grad_()
    teacher, target = bg.LogitsTeacher(torch.randn(64, 40_000)), torch.arange(64)

    def gradient(scale: float) -> Tensor:
        loss = bg.hybrid_distillation(scale * logits, teacher, target)
        return torch.autograd.grad(loss, logits)[0]

    first = gradient(1.0)
    copy = first.clone()
    second = gradient(2.0)
    assert second.data_ptr() != first.data_ptr() and torch.equal(first, copy)
    assert not torch.equal(first, second)


def test_the_cache_is_emptied() -> None:
    taken()
    assert memory._idle
    bg.empty_cache()
    assert not memory._idle
