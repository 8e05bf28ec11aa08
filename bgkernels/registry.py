"""A registry finds divergences and policies by a name, and adds new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])


class Registry(Generic[T]):
    """A registry maps names to factories of one kind of object.

    Args:
        kind: what is registered, for messages ("divergence", "routing").
        product: the class that factories return.
    """

    def __init__(self, kind: str, product: type[T]) -> None:
        self.kind = kind
        self.product = product
        self._factories: dict[str, Callable[..., T]] = {}

    def register(self, factory: F) -> F:
        """Register a factory under its own name; a decorator. ValueError if it is taken."""
        name = factory.__name__
        if name in self._factories:
            raise ValueError(f"{self.kind} {name!r} is registered already; choose another name")
        self._factories[name] = factory  # type: ignore[assignment]
        return factory

    def get(self, name: str, /, **params: object) -> T:
        """Make the object called ``name``, with defaults or ``params``. ValueError if unknown."""
        if name not in self._factories:
            raise ValueError(f"`{self.kind}` must be one of {', '.join(self)}; got {name!r}")
        return self._factories[name](**params)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._factories))

    def __contains__(self, name: object) -> bool:
        return name in self._factories
