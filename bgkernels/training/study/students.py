"""The students: tiny networks that read the step and the last token, trained side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Students(nn.Module):
    """One network a seed, ``W·gelu(a[step] + b[last]) + c``; none shares a number with another.

    Their parameters are stacked, so that all are trained by one batched product; AdamW treats every
    number alone, hence each student is trained as if it were alone.

    Args:
        seeds: one a student.
        steps, vocab: of the language.
        hidden: units.

    Example:
        >>> students = Students(range(3), steps=36, vocab=64, hidden=12)
        >>> students(torch.zeros(3, 5, 36, dtype=torch.long)).shape
        torch.Size([3, 5, 36, 64])
    """

    def __init__(self, seeds: range, steps: int, vocab: int, hidden: int) -> None:
        super().__init__()
        shapes = {"step": (steps, hidden), "last": (vocab, hidden), "head": (hidden, vocab)}
        drawn: dict[str, list[Tensor]] = {name: [] for name in shapes}
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for name, shape in shapes.items():
                scale = hidden**-0.5 if name == "head" else 1.0
                drawn[name].append(torch.randn(shape, generator=generator) * scale)
        self.step, self.last, self.head = (nn.Parameter(torch.stack(x)) for x in drawn.values())
        self.bias = nn.Parameter(torch.zeros(len(seeds), 1, vocab))

    def forward(self, last: Tensor, step: slice = slice(None)) -> Tensor:
        """Logits of the next token.

        Args:
            last: ``(students, texts, steps)`` the token before each.
            step: which steps these are.

        Returns:
            ``(students, texts, steps, vocab)``.
        """
        student = torch.arange(len(last))[:, None, None]
        hidden = nn.functional.gelu(self.step[:, None, step] + self.last[student, last])
        logits = hidden.flatten(1, 2) @ self.head + self.bias
        return logits.view(*last.shape, -1)

    @torch.no_grad()
    def table(self) -> Tensor:
        """``(students, steps, last, vocab)`` logits of every input."""
        students, vocab, _ = self.last.shape
        every = torch.arange(vocab)[None, :, None].expand(students, vocab, self.step.shape[1])
        return self.forward(every).transpose(1, 2)

    @torch.no_grad()
    def say(self, step: int, last: Tensor, condition: Tensor) -> Tensor:
        """``(students, texts, vocab)`` logits at one step; what the teacher knows is not read."""
        return self.forward(last[..., None], slice(step, step + 1))[:, :, 0]
