"""Capture soft labels for a cache: each row's top columns, and statistics of the whole row.

It takes one walk over the vocabulary, like pass 1, with the teacher in place of both models.
Entropy, power sum and sample are those of the whole row, not of the ``k`` columns that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bgkernels.backends.base import Tile, close
from bgkernels.backends.eager import real_logits
from bgkernels.loss.options import Options
from bgkernels.loss.pose import pose
from bgkernels.rows.arithmetic import NEG_INF, NONE
from bgkernels.rows.extras import Tilt
from bgkernels.rows.spec import Cap, RowSpec
from bgkernels.rows.state import empty
from bgkernels.rows.stats import RowStats, Statistics
from bgkernels.streaming import checks
from bgkernels.streaming.driver import workload
from bgkernels.streaming.heads import LinearHead, Needs, make_head
from bgkernels.streaming.planner import plan
from bgkernels.streaming.problem import Problem
from bgkernels.streaming.teachers.dense import LinearTeacher, LogitsTeacher, NoTeacher


@dataclass(frozen=True)
class SoftLabels:
    """It holds the soft labels of each token, cut to their most probable columns.

    Attributes:
        indices: ``(..., k)`` int64 columns, the most probable first; ``-1`` where a row has fewer.
        logprobs: ``(..., k)`` fp32 log-probabilities at the capture's temperature, under the whole
            distribution: a row's probabilities sum to less than 1; ``-inf`` where the index is -1.
        sample: ``(...)`` int64, a token sampled from the teacher at temperature 1; or None.
        entropy: ``(...)`` fp32, Shannon entropy of the whole distribution, in nats; or None.
        power_sum: ``(...)`` fp32, ``log Σ p^gamma`` over the whole distribution; or None.
    """

    indices: Tensor
    logprobs: Tensor
    sample: Tensor | None = None
    entropy: Tensor | None = None
    power_sum: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by name."""
        return {name: x for name, x in vars(self).items() if x is not None}


@torch.no_grad()
def capture(
    teacher: LinearTeacher | LogitsTeacher,
    k: int,
    *,
    temperature: float = 1.0,
    gamma: float = 0.1,
    seed: int = 0,
    first_row: int = 0,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> SoftLabels:
    """Return a teacher's top ``k`` log-probabilities and statistics, never ``[tokens, vocab]``.

    The teacher's head is multiplied once. If two columns have equal probability and only one of
    them fits, either may be kept.

    Args:
        teacher: a :class:`~bgkernels.LinearTeacher` or :class:`~bgkernels.LogitsTeacher`.
        k: number of columns to keep per row, at most the vocabulary; masked columns (``-inf``) are
            left out.
        temperature: temperature of log-probabilities, entropy and power sum.
        gamma: exponent of the power sum; ``routing="entropy"`` uses 0.1.
        seed: seed of the sample; the same seed gives the same tokens in every backend and chunking.
        first_row: the sampler's number of the first row. With the right numbers, rows that are
            captured in several calls get the same tokens as in a single call.
        vocab_size: use only these leading columns, and normalise over them; None: all columns.
        memory_budget: most bytes of temporaries; None: the device's default.
        backend: as in :func:`bgkernels.linear_hybrid_distillation`.

    Returns:
        :class:`SoftLabels` shaped ``(...)``. A row with a NaN or +inf logit has NaN statistics.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.

    Example:
        >>> import torch, bgkernels as bg
        >>> teacher = bg.LinearTeacher(torch.randn(2, 5, 12), torch.randn(50, 12))
        >>> labels = bg.capture(teacher, 8)
        >>> labels.indices.shape, labels.entropy.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5]))
    """
    checks.integer("k", k, low=1)
    checks.integer("first_row", first_row, low=0)
    tilt = Tilt(0.0, checks.number("gamma", gamma, low=0, open_low=True))
    options = Options.of(
        temperature=temperature,
        seed=seed,
        vocab_size=vocab_size,
        memory_budget=memory_budget,
        backend=backend,
    )
    problem = _pose(teacher, tilt, options)
    columns = problem.spec.columns
    if k > columns:
        raise ValueError(f"`k` must be at most the vocabulary, {columns} columns; got {k}")
    chunks = [labels.tensors() for labels in _walk(problem, k, first_row)]
    joined = {name: torch.cat([tensors[name] for tensors in chunks]) for name in chunks[0]}
    return SoftLabels(
        **{name: x.reshape((*problem.leading, *x.shape[1:])) for name, x in joined.items()}
    )


def _pose(teacher: LinearTeacher | LogitsTeacher, tilt: Tilt, options: Options) -> Problem:
    """Check a teacher, and pose the problem of comparing it with itself."""
    if not isinstance(teacher, (LinearTeacher, LogitsTeacher)):
        kind = type(teacher).__name__
        raise TypeError(f"`teacher` must be a LinearTeacher or LogitsTeacher; got {kind}")
    tensors = [None if x is None else checks.tensor("teacher", x) for x in teacher.tensors]
    names: tuple[str, ...] = ("logits",)
    if isinstance(teacher, LinearTeacher):
        hidden, weight, bias = tensors
        assert hidden is not None and weight is not None
        mixed = torch.is_autocast_enabled(hidden.device.type)
        checks.linear("teacher", hidden, weight, bias, mixed=mixed)
        names = ("input", "linear_weight", "linear_bias")
        scale, softcap = teacher.logit_scale, teacher.logit_softcap
        options = replace(options, logit_scale=scale, logit_softcap=softcap)
    student = dict(zip(names, tensors, strict=True))
    return pose(student, teacher, "teacher_sample", options, extras=(tilt,))


@dataclass(frozen=True)
class BestColumns:
    """It holds the best columns so far.

    Args:
        values: ``(rows, k)`` raw head outputs.
        indices: ``(rows, k)`` int64 columns of them.
        largest: whether larger outputs are better: False only for a negative logit scale.
    """

    values: Tensor
    indices: Tensor
    largest: bool

    @classmethod
    def empty(cls, rows: int, k: int, cap: Cap, like: Tensor) -> BestColumns:
        """Return what is the best of no columns."""
        largest = cap.scale >= 0
        values = like.new_full((rows, k), NEG_INF if largest else -NEG_INF)
        return cls(values, torch.full_like(values, NONE, dtype=torch.int64), largest)

    def merge(self, raw: Tensor, first_column: int) -> BestColumns:
        """Return the best of these columns and those of a tile ``(rows, width)``."""
        k = self.values.shape[1]
        new = raw.topk(min(k, raw.shape[1]), dim=1, largest=self.largest)
        values = torch.cat([self.values, new.values.to(self.values.dtype)], 1)
        indices = torch.cat([self.indices, new.indices + first_column], 1)
        best = values.topk(k, dim=1, largest=self.largest)
        return BestColumns(best.values, indices.gather(1, best.indices), self.largest)


def _walk(problem: Problem, k: int, first_row: int) -> Iterator[SoftLabels]:
    """Yield the labels of each chunk of rows."""
    device, dtype = problem.labels.device, problem.dtype
    problem = replace(problem, teacher=NoTeacher())  # it stands on the student's side
    spec = replace(problem.spec, teacher=problem.spec.student)
    p = plan(workload(problem, Needs(), statistics=True, backward=False), problem.budget)
    head = make_head(problem.student, problem)
    size = p.chunk * p.width if isinstance(head, LinearHead) else 0
    buffer = torch.empty(size, dtype=head.dtype, device=device)
    for rows in p.chunks():
        labels = problem.labels[rows]
        head.start(rows)
        state = empty(len(labels), spec, dtype=dtype, device=device)
        best = BestColumns.empty(len(labels), k, spec.teacher, state.floats)
        for columns in p.tiles():
            raw = head.logits(columns, buffer)
            tile = Tile(raw, raw, first_row + rows.start, columns.start)
            problem.backend.absorb_(state, tile, labels, spec)
            best = best.merge(raw, columns.start)
        statistics = Statistics.empty(spec, len(labels), device)
        close(problem.backend, state, labels, statistics)
        yield _close(best, statistics.row_stats(problem.ignore_index), spec)


def _close(best: BestColumns, stats: RowStats, spec: RowSpec) -> SoftLabels:
    """Return the labels of rows that have seen every column."""
    dtype, (tilt,) = best.values.dtype, spec.extras
    assert isinstance(tilt, Tilt)
    logits = real_logits(best.values, spec.teacher).to(stats.lse_t.dtype)
    logprobs = logits / spec.temperature - stats.lse_t[:, None]
    return SoftLabels(
        indices=torch.where(logprobs == NEG_INF, NONE, best.indices),
        logprobs=logprobs.to(dtype),
        sample=stats.label,
        entropy=stats.entropy_t.to(dtype),
        power_sum=stats.power_sum(tilt.a, tilt.b).to(dtype),
    )
