"""A second CUDA stream beside the current one."""

from __future__ import annotations

from collections.abc import Callable

import torch


class SecondStream:
    """Work beside the current stream of a device.

    What it writes must be allocated before :meth:`start` and live until :meth:`join`: then the
    caching allocator, which knows of the current stream alone, gives no memory away too early. In a
    graph that is being captured, the work becomes a branch of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def start(self, work: Callable[[], object]) -> None:
        """Queue ``work`` behind all that the current stream was given before."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            work()

    def join(self) -> None:
        """Let the current stream wait for all that was started."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
