"""Sources of logits tiles, and where a student's gradients are gathered."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bgkernels.backends.base import Factors
from bgkernels.streaming import gemm, memory
from bgkernels.streaming.planner import Demand, Plan
from bgkernels.streaming.problem import Problem, Tensors
from bgkernels.streaming.shard import Shard


class Needs(NamedTuple):
    """Which gradients are asked for.

    Args:
        input, weight, bias: of the student's tensors.
        held: whether gradients wait for a factor: fp16 then has too few exponents, and they are
            kept in fp32.
    """

    input: bool = False
    weight: bool = False
    bias: bool = False
    held: bool = False

    @property
    def any(self) -> bool:
        """Whether a gradient is asked for at all."""
        return self.input or self.weight or self.bias

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the gradient of a tensor of this dtype."""
        return torch.float32 if self.held and dtype == torch.float16 else dtype


class Logits(Protocol):
    """A source of tiles."""

    dtype: torch.dtype

    def start(self, rows: slice) -> None:
        """Begin a chunk of rows."""

    def logits(self, columns: slice, buffer: Tensor) -> Tensor:
        """``(rows, width)`` raw outputs of the chunk, in ``buffer`` or where they are."""


class LogitsHead:
    """Logits ``(rows, vocab)`` that exist: tiles are views, of them and of their gradient."""

    def __init__(self, logits: Tensor, gradient: Tensor | None = None) -> None:
        self.given, self.gradient = logits, gradient
        self.rows, self.vocab = logits.shape
        self.dtype = logits.dtype

    @property
    def differentiated(self) -> bool:
        """Whether a gradient is gathered."""
        return self.gradient is not None

    def start(self, rows: slice) -> None:
        """Begin a chunk of rows."""
        self.chunk = rows

    def logits(self, columns: slice, buffer: Tensor) -> Tensor:
        """``(rows, width)`` raw outputs of the chunk; the buffer is not needed."""
        return self.given[self.chunk, columns]

    def gradient_tile(self, columns: slice, tile: Tensor, buffer: Tensor) -> Tensor:
        """Where pass 2 writes the gradient of a tile."""
        assert self.gradient is not None
        return self.gradient[self.chunk, columns]

    def backward(self, columns: slice, d: Tensor) -> None:
        """Take the gradient of a tile, which is in its place already."""

    def begin(self, columns: slice) -> None:
        """Begin a group of columns."""

    def finish(self, shard: Shard, last: bool) -> None:
        """End a chunk of rows; the gradient of a column is that of its rank alone."""

    def end(self) -> None:
        """End a group of columns."""

    def gradients(self, columns: int) -> tuple[Tensor | None, ...]:
        """``(gradient of the logits,)``; zero from ``columns`` on, which no tile covers."""
        if self.gradient is not None:
            self.gradient[:, columns:] = 0
        return (self.gradient,)


class LinearHead:
    """``hidden @ weight.T + bias``, a tile at a time, and its gradients, gathered in fp32.

    Where the device cannot multiply the tensors' dtype (``gemm.product_dtype``), tiles of
    ``weight`` and chunks of ``hidden``
    are widened to fp32 first: exact, and the logits then keep fp32.

    Args:
        hidden: ``(rows, hidden)``.
        weight: ``(vocab, hidden)``.
        bias: ``(vocab,)`` or None.
        product: the dtype to multiply in.
        needs: which gradients to gather.
        chunks: number of row chunks that :meth:`backward` will see; with one, a tile of dW is
            complete at once.
        groups: number of groups of columns for which it will see them all; with one, a chunk of dX
            is complete at once.
        owned: the caller's sum, to which dW is added, or None.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, product: torch.dtype,
        needs: Needs = Needs(), chunks: int = 1, groups: int = 1, owned: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.product, self.needs = product, needs
        self.rows, self.vocab = hidden.size(0), weight.size(0)
        self.dtype = gemm.logits_dtype(product, hidden.device)
        wide = torch.float64 if product == torch.float64 else torch.float32
        self.grad_input = None
        if needs.input:
            self.grad_input = torch.empty_like(hidden, dtype=needs.dtype(hidden.dtype))
        self.grad_bias = (
            torch.zeros_like(bias, dtype=wide) if needs.bias and bias is not None else None
        )
        self.owned = owned if needs.weight else None
        alone = needs.weight and owned is None
        self.grad_weight = self._new_weight() if alone and chunks == 1 else None
        self.sum_weight: Tensor | None = None
        self.chunks, self.groups = chunks, groups
        self.sum_input = None
        if needs.input and groups > 1:
            self.sum_input = torch.zeros_like(hidden, dtype=wide)
        self._wide, self._scratch = wide, {}  # type: tuple[torch.dtype, dict[str, Tensor]]
        self._columns: slice | None = None

    @property
    def differentiated(self) -> bool:
        """Whether a gradient is gathered."""
        return self.needs.any

    def _new_weight(self) -> Tensor:
        dtype = self.needs.dtype(self.weight.dtype)
        return memory.empty(self.weight.shape, dtype, self.weight.device)

    def begin(self, columns: slice) -> None:
        """Begin a group of columns, to whose part of dW every chunk of rows adds."""
        self.group = columns
        if self.owned is not None:
            self.sum_weight = self.owned[columns]
        elif self.needs.weight and self.chunks > 1:
            rows = len(self.weight) if self.groups == 1 else columns.stop - columns.start
            shape = rows, self.weight.shape[1]
            self.sum_weight = memory.empty(shape, self._wide, self.weight.device).zero_()

    def _take(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A contiguous scratch matrix, allocated once for its largest use."""
        size = shape.numel()
        if name not in self._scratch or self._scratch[name].numel() < size:
            self._scratch[name] = memory.empty((size,), dtype, self.hidden.device)
        return self._scratch[name][:size].view(shape)

    def start(self, rows: slice) -> None:
        """Begin a chunk of rows."""
        self.chunk, self._columns = rows, None
        x = self.hidden[rows]
        self.x = x if x.dtype == self.product else self._take("x", x.shape, self.product).copy_(x)
        if self.sum_input is not None:
            self.dx = self.sum_input[rows]
        elif self.needs.input:
            self.dx = self._take("dx", x.shape, self._wide).zero_()

    def _weight_tile(self, columns: slice) -> Tensor:
        """``(width, hidden)`` in the product dtype; the last one is kept."""
        w = self.weight[columns]
        if w.dtype == self.product:
            return w
        tile = self._take("w", w.shape, self.product)
        if columns != self._columns:
            tile.copy_(w)
            self._columns = columns
        return tile

    def factors(self, columns: slice) -> Factors:
        """The same outputs as factors."""
        bias = None if self.bias is None else self.bias[columns].float().contiguous()
        return Factors(self.x, self._weight_tile(columns), bias)

    def logits(self, columns: slice, buffer: Tensor) -> Tensor:
        """``(rows, width)`` raw outputs of the chunk, in ``buffer``."""
        w = self._weight_tile(columns)
        out = gemm.mm(self.x, w.t(), gemm.matrix(buffer, self.x.size(0), w.size(0)))
        return out if self.bias is None else out.add_(self.bias[columns])

    def gradient_tile(self, columns: slice, tile: Tensor, buffer: Tensor) -> Tensor:
        """Where pass 2 writes: over the tile, or beside it in the dtype of the next products."""
        return tile if tile.dtype == self.product else gemm.matrix(buffer, *tile.shape)

    def backward(self, columns: slice, d: Tensor) -> None:
        """Add the products of a tile's gradient ``d (rows, width)``."""
        if self.needs.input:
            w = self._weight_tile(columns)
            gemm.add_mm_(self.dx, d, w, lambda: self._take("dx_part", self.dx.shape, self._wide))
        if self.grad_bias is not None:
            self.grad_bias[columns] += d.sum(0, dtype=self._wide)
        self.add_weight(columns, d)

    def add_weight(self, columns: slice, d: Tensor) -> None:
        """Add what the rows of ``d`` give to a tile of dW."""

        def scratch() -> Tensor:
            return self._take("dw", self.weight[columns].shape, self._wide)

        if self.sum_weight is not None:
            first = self.group.start
            target = self.sum_weight[columns.start - first : columns.stop - first]
            gemm.add_mm_(target, d.t(), self.x, scratch)
        elif self.grad_weight is not None:
            gemm.mm_narrow(d.t(), self.x, self.grad_weight[columns], scratch)

    def finish(self, shard: Shard, last: bool) -> None:
        """End a chunk of rows: dX is the sum of what each shard of the vocabulary adds to it.

        Complete with the ``last`` group of columns.
        """
        if self.grad_input is not None and last:
            self.grad_input[self.chunk] = shard.sum_(self.dx).to(self.grad_input.dtype)

    def end(self) -> None:
        """End a group of columns, and release its fp32 sum."""
        if self.sum_weight is None:
            return
        if self.owned is not None:
            self._scratch.clear()
        elif self.groups == 1:
            self._scratch.clear()
            self.grad_weight = self.sum_weight.to(self.needs.dtype(self.weight.dtype))
        else:
            if self.grad_weight is None:
                self.grad_weight = self._new_weight()
            self.grad_weight[self.group] = self.sum_weight
        self.sum_weight = None

    def gradients(self, columns: int) -> tuple[Tensor | None, ...]:
        """Gradients of ``(hidden, weight, bias)``, None where not needed.

        Rows of the weight from ``columns`` on, which no tile covers, get zero.
        """
        weight = self.grad_weight
        self._scratch.clear()
        if weight is not None:
            weight[columns:] = 0
        bias = None
        if self.grad_bias is not None and self.bias is not None:
            bias = self.grad_bias.to(self.needs.dtype(self.bias.dtype))
        return self.grad_input, weight, bias


Head = LogitsHead | LinearHead


def make_head(
    tensors: Tensors,
    problem: Problem,
    needs: Needs = Needs(),
    plan: Plan | None = None,
    gradient: Tensor | None = None,
) -> Head:
    """The source of logits for ``(hidden, weight, bias)`` or ``(logits,)``."""
    first = tensors[0]
    assert first is not None
    if len(tensors) == 1:
        return LogitsHead(first, gradient)
    weight = tensors[1]
    assert weight is not None
    walks = (1, 1) if plan is None else (plan.chunk_count, plan.groups)
    product, owned = problem.product(first), problem.weight_grad
    return LinearHead(first, weight, tensors[2], product, needs, *walks, owned)


def head_demand(tensors: Tensors, problem: Problem) -> Demand:
    """Bytes that the tiles of a head take; none of logits that exist."""
    if len(tensors) < 2:
        return Demand()
    hidden, weight = tensors[:2]
    assert hidden is not None and weight is not None
    product = problem.product(hidden)
    return Demand(
        logit_bytes=gemm.logits_dtype(product, hidden.device).itemsize,
        weight_bytes=0 if product == weight.dtype else product.itemsize,
        row_bytes=hidden.shape[1] * (0 if product == hidden.dtype else product.itemsize),
        hidden=hidden.shape[1],
    )
