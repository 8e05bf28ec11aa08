"""Two decorators compute a value once, in forms that ``torch.compile`` can trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

Value = TypeVar("Value")


def remembered(function: Callable[..., Value]) -> Callable[..., Value]:
    """Remember results as ``functools.lru_cache`` does, outside of compiled graphs, which warn."""
    cached = functools.lru_cache(maxsize=256, typed=True)(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Value:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return cached(*args, **kwargs)

    return call


class Bounded(dict[object, Value]):
    """A dictionary that forgets everything before it would hold more than ``MOST`` entries."""

    MOST = 256

    def __setitem__(self, key: object, value: Value) -> None:
        if len(self) >= self.MOST:
            self.clear()
        super().__setitem__(key, value)


class lazy(Generic[Value]):
    """It is ``functools.cached_property`` without the lock that Python has before 3.12.

    ``torch.compile`` cannot trace that lock.
    """

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Value:
        if instance is None:
            return self  # type: ignore[return-value]
        value = self.compute(instance)
        if not torch.compiler.is_compiling():
            instance.__dict__[self.name] = value  # found before the property from now on
        return value
