"""What a step multiplies."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Products(TorchDispatchMode):
    """The multiply-adds of each matrix product that runs within it.

    Attributes:
        sizes: multiply-adds, a number for each product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f.name().split("::")[1].split(".")[0]
        if name in ("mm", "addmm_", "addmm"):
            a, b = args[-2:]
            self.sizes.append(a.shape[0] * a.shape[1] * b.shape[1])
        return f(*args, **(kwargs or {}))
