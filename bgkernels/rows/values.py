"""Extra statistics are kept apart by comparison: the compiler of torch 2.8 cannot hash them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from bgkernels.rows.extras import Extra


class ExtraValues(Mapping[Extra, tuple[Tensor, ...]]):
    """It maps the extra statistics of some rows to their values.

    It compares them, since there are few; a dictionary would hash them.
    """

    def __init__(self, pairs: Iterable[tuple[Extra, tuple[Tensor, ...]]] = ()) -> None:
        self.pairs = tuple(pairs)

    def __getitem__(self, extra: Extra) -> tuple[Tensor, ...]:
        for key, values in self.pairs:
            if key == extra:
                return values
        raise KeyError(extra)

    def __contains__(self, extra: object) -> bool:
        return any(key == extra for key, _ in self.pairs)

    def __iter__(self) -> Iterator[Extra]:
        return iter([key for key, _ in self.pairs])

    def __len__(self) -> int:
        return len(self.pairs)

    def updated(self, other: ExtraValues) -> ExtraValues:
        """Return these values and the ``other``, which replace those of the same statistics."""
        return ExtraValues([*(pair for pair in self.pairs if pair[0] not in other), *other.pairs])


def distinct(extras: Iterable[Extra]) -> tuple[Extra, ...]:
    """Return extra statistics in their order, each once, by comparing them."""
    once: list[Extra] = []
    for extra in extras:
        if extra not in once:
            once.append(extra)
    return tuple(once)
