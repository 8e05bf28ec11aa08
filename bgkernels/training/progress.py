"""What the user sees while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from bgkernels.training import ranks
from bgkernels.training.errors import extra
from bgkernels.training.loop import Progress

if TYPE_CHECKING:
    from rich.console import Console


class Display(Protocol):
    """Where a run tells what it does."""

    def say(self, message: str) -> None:
        """One line that stays."""

    def training(
        self, title: str, steps: int
    ) -> AbstractContextManager[Callable[[Progress], None]]:
        """A bar for one run; the callable that comes back moves it."""

    def working(self, title: str) -> AbstractContextManager[None]:
        """A sign of life for work of unknown length."""


class Silent:
    """A display that shows nothing, for tests and for use as a library."""

    def say(self, message: str) -> None:
        """Nothing."""

    @contextmanager
    def training(self, title: str, steps: int) -> Iterator[Callable[[Progress], None]]:
        """Nothing."""
        yield lambda progress: None

    @contextmanager
    def working(self, title: str) -> Iterator[None]:
        """Nothing."""
        yield


class Terminal:
    """Bars with step, loss, validation, tokens per second, most memory and time left.

    Args:
        console: where to draw; where it is no terminal, each validation is a line.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, message: str) -> None:
        """One line that stays."""
        self.console.print(message, highlight=False)

    @contextmanager
    def training(self, title: str, steps: int) -> Iterator[Callable[[Progress], None]]:
        """A bar for one run."""
        with extra():
            from rich import progress as bars
        columns = (
            bars.TextColumn(f"{title:<14}"),
            bars.BarColumn(bar_width=12),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[figures]}"),
            bars.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        with bars.Progress(*columns, console=self.console) as bar:
            task = bar.add_task(title, total=steps, figures="")

            def show(now: Progress) -> None:
                bar.update(task, completed=now.step, figures=_figures(now))
                if not self.console.is_terminal and now.step == now.validation.get("step"):
                    self.say(f"{title} {now.step}/{steps} {_figures(now)}")

            yield show

    @contextmanager
    def working(self, title: str) -> Iterator[None]:
        """A spinner, and the title as a line once done."""
        with self.console.status(title):
            yield
        self.say(f"[dim]{title}: done[/]")


def terminal(console: Console) -> Display:
    """The terminal for the first of several processes; the others are silent."""
    return Terminal(console) if ranks.first() else Silent()


def _figures(now: Progress) -> str:
    """Loss, validation, speed and memory in a few columns."""
    validation = now.validation.get("cross_entropy")
    held_out = f" held-out {validation:.2f}" if validation is not None else ""
    speed = f"{now.tokens_per_second:,.0f} tok/s" if now.tokens_per_second else "from disk"
    return f"loss {now.loss:.2f}{held_out} [cyan]{speed}[/] {now.memory / 2**30:.1f} GiB"
