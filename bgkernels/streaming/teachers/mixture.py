"""Several dense teachers as one: the tiles of ``log Σ λ_i·p_i``.

A tile of the mixture needs every teacher's normaliser, so each chunk of rows begins with a walk
over the teachers alone. It also gives the statistics on which weights may depend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bgkernels.backends.base import Tile
from bgkernels.backends.eager import real_logits_
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.state import NEG_INF, empty
from bgkernels.rows.stats import RowStats, finalize
from bgkernels.streaming.comparison import Dense, Outcome, Setting
from bgkernels.streaming.heads import Logits
from bgkernels.streaming.sources import MixtureSource


class MixtureHead:
    """See :class:`bgkernels.streaming.heads.Logits`. Its real logits are ``T·log Σ λ_i·p_i``.

    Args:
        heads: of the teachers.
        source: maps to real logits, and the weights if they are a function.
        given: ``(rows, teachers)`` weights, or None.
        spec: of the call.
        setting: of the call.
    """

    def __init__(
        self, heads: Sequence[Logits], source: MixtureSource, given: Tensor | None,
        spec: RowSpec, setting: Setting,
    ) -> None:  # fmt: skip
        self.heads, self.source, self.given = heads, source, given
        self.spec, self.setting, self.dtype = spec, setting, setting.wide
        size, device = setting.plan.chunk * setting.plan.width, setting.device
        self.raw = {h.dtype: torch.empty(size, dtype=h.dtype, device=device) for h in heads}
        self.scratch = torch.empty(size, dtype=setting.wide, device=device)

    def start(self, rows: slice) -> None:
        """Begin a chunk of rows."""
        self.chunk = rows
        for head in self.heads:
            head.start(rows)

    def weigh(self, labels: Tensor) -> Tensor:
        """``log λ_i - lse_i`` of each teacher, ``(rows, teachers)``, by which tiles are mixed."""
        stats = [self._statistics(i, labels) for i in range(len(self.heads))]
        weights = self.source.weigh(stats) if self.given is None else self.given[self.chunk]
        lse = torch.stack([s.lse_t for s in stats], 1)
        self.offsets = (weights.to(lse).log() - lse).to(self.dtype)
        return self.offsets

    def _statistics(self, i: int, labels: Tensor) -> RowStats:
        """Of one teacher, which stands on both sides of the comparison."""
        backend, cap, compared = self.setting.backend, self.source.parts[i].cap, self.spec.compared
        spec = replace(self.spec, columns=compared, student=cap, teacher=cap, logit_sum=False)
        plain = replace(spec, extras=tuple(t for t in spec.tilts if t.a == 0))
        beyond = labels >= compared
        held = labels.masked_fill(beyond, 0)
        state = empty(len(labels), len(plain.tilts), dtype=self.dtype, device=labels.device)
        shard = self.setting.shard
        for columns in self.setting.plan.tiles():
            part = slice(columns.start, min(columns.stop, shard.own(compared)))
            if part.start < part.stop:
                x = self.heads[i].logits(part, self.raw[self.heads[i].dtype])
                tile = Tile(x, x, self.chunk.start, shard.first + part.start)
                backend.absorb_(state, tile, held, plain)
        state = shard.merged(state, plain)
        s = finalize(state, held, plain, self.setting.ignore_index).stats
        logp = s.logp_t.masked_fill(beyond, NEG_INF)
        return replace(s, logp_s=logp, logp_t=logp, label=torch.where(beyond, labels, s.label))

    def logits(self, columns: slice, buffer: Tensor) -> Tensor:
        """``(rows, width)`` real logits of the chunk, in ``buffer``."""
        shape = (self.chunk.stop - self.chunk.start, columns.stop - columns.start)
        out, part = (x[: shape[0] * shape[1]].view(shape) for x in (buffer, self.scratch))
        for i, (head, source) in enumerate(zip(self.heads, self.source.parts, strict=True)):
            to = part if i else out
            real_logits_(to.copy_(head.logits(columns, self.raw[head.dtype])), source.cap)
            to.div_(self.spec.temperature).add_(self.offsets[:, i, None])
            if i:
                torch.logaddexp(out, part, out=out)
        return out.mul_(self.spec.temperature)


class Mixed(Dense):
    """A dense comparison whose teacher is a mixture."""

    def __init__(self, head: MixtureHead, spec: RowSpec, setting: Setting) -> None:
        super().__init__(head, spec, setting)
        self.head = head

    def start(self, rows: slice, labels: Tensor, given: Outcome | None) -> None:
        """Begin a chunk of rows; the weights are known where pass 1 is left out."""
        super().start(rows, labels, given)
        if given is None:
            self.memory = (self.head.weigh(labels),)
        else:
            (self.head.offsets,) = given.memory
