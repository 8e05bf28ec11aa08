"""A teacher that runs one step ahead of the student, in a thread and a stream of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

B = TypeVar("B")
T = TypeVar("T")
Device = torch.device | str
_END: Any = object()


def prefetch_teacher(
    batches: Iterable[B],
    forward: Callable[[B], T],
    *,
    depth: int = 1,
    device: Device = "cpu",
    to: Device | None = None,
) -> Generator[tuple[B, T], None, None]:
    """Batches with the teacher's output, computed while the student works on those before.

    At most ``depth`` outputs exist that the student has not taken; then teacher and ``batches``
    wait. The order is that of ``batches``. An exception of theirs is raised here, after the outputs
    before it. The thread ends with the iteration: at its end, at an exception, and where the loop
    over it is left (``close()`` says when).

    Args:
        batches: read in the thread.
        forward: from a batch to the teacher's output, such as
            :meth:`~bgkernels.training.models.CausalLM.as_teacher`; called without gradients. Enter
            ``torch.autocast`` inside it: threads do not share it.
        depth: outputs ahead.
        device: on which the teacher runs; a CUDA device gets a stream of its own there, so that
            both models share the device.
        to: device of the student: tensors of the output, those in tuples, lists, dictionaries and
            dataclasses too, are moved there. None: they stay.

    Raises:
        ValueError: ``depth`` is less than 1.

    Example:
        >>> teacher = torch.nn.Linear(3, 4)
        >>> for batch, hidden in prefetch_teacher(torch.ones(5, 2, 3), teacher):
        ...     assert hidden.shape == (2, 4)

        A teacher on a second device, with a copy of its head beside the student:

        >>> head = model.head.weight.to("cuda:0")  # doctest: +SKIP
        >>> def forward(batch):
        ...     return bg.LinearTeacher(model.hidden(batch.to("cuda:1")), head)
        >>> for batch, teacher in prefetch_teacher(
        ...     loader, forward, device="cuda:1", to="cuda:0"
        ... ):  # doctest: +SKIP
        ...     loss_fn(student(batch), weight, teacher, labels).backward()
    """
    if depth < 1:
        raise ValueError(f"`depth` must be at least 1; got {depth}")
    return _consume(batches, _Lane(forward, device, to), depth)


class _Lane:
    """Where the teacher runs. Its outputs are complete when they are handed over."""

    def __init__(self, forward: Callable[[Any], Any], device: Device, to: Device | None) -> None:
        self.forward, self.to = forward, to
        devices = [torch.device(d) for d in (to, device) if d is not None]
        self.streams = [torch.cuda.Stream(d) for d in devices if d.type == "cuda"]
        for stream in self.streams:  # weights may still be on their way
            stream.wait_stream(torch.cuda.current_stream(stream.device))

    def enter(self) -> ExitStack:
        """Make the streams current in this thread, that of the teacher's device last."""
        stack = ExitStack()
        for stream in self.streams:
            stack.enter_context(torch.cuda.stream(stream))
        return stack

    def __call__(self, batch: Any) -> Any:
        output = self.forward(batch)
        if self.to is not None:
            output = _map(lambda x: x.to(self.to), output)
        for stream in reversed(self.streams):
            stream.synchronize()
        return output

    def hand_over(self, output: Any) -> None:
        """Keep the memory of an output until the consumer's stream has used it."""
        if self.streams:
            _map(_used_here, output)


def _consume(batches: Iterable[B], lane: _Lane, depth: int) -> Generator[tuple[B, Any], None, None]:
    slots, stop = threading.Semaphore(depth), threading.Event()
    ready: queue.SimpleQueue[tuple[B, Any] | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            with torch.no_grad(), lane.enter():
                source = iter(batches)
                while slots.acquire() and not stop.is_set():
                    batch = next(source, _END)
                    if batch is _END:
                        break
                    ready.put((batch, lane(batch)))
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="teacher", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            slots.release()
            lane.hand_over(item[1])
            yield item
    finally:
        stop.set()
        slots.release()
        thread.join()


def _used_here(x: Tensor) -> Tensor:
    if x.is_cuda:
        x.record_stream(torch.cuda.current_stream(x.device))
    return x


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with its tensors replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        parts = [_map(function, x) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {key: _map(function, x) for key, x in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        new = {f.name: _map(function, getattr(value, f.name)) for f in fields(value) if f.init}
        return replace(value, **new)
    return value
