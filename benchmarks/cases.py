"""What is measured: named shapes, their tensors, and the suites made of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOGIT_STD = 3.0
Shape = tuple[int, ...]
Allocate = Callable[[str, Shape, torch.dtype], Tensor]


@dataclass(frozen=True)
class Case:
    """One distillation step of the heads.

    Args:
        name: of the shape.
        rows, hidden_s, hidden_t, vocab: tokens, widths of student and teacher, columns.
        vocab_t: columns of the teacher, padded; 0: the student's.
        softcap: of both models' logits; 0: none.
        dtype: of hidden states and heads.
        temperature: of the divergence.
        gap: 0: the teacher has nothing to do with the student; else its hidden states are the
            student's plus this much noise, and it has the student's head.
        ignored: share of tokens that take no part.
    """

    name: str
    rows: int
    hidden_s: int
    hidden_t: int
    vocab: int
    vocab_t: int = 0
    softcap: float = 0.0
    dtype: str = "float32"
    temperature: float = 1.0
    gap: float = 0.0
    ignored: float = 0.0

    @property
    def title(self) -> str:
        """A line that says everything a reader compares by."""
        vocab = f"{self.vocab:,}" + (f" (teacher {self.vocab_t:,})" if self.vocab_t else "")
        return f"{self.dtype}, {self.rows:,} tokens, {self.hidden_s} ← {self.hidden_t}, V = {vocab}"

    @property
    def flops(self) -> float:
        """Of the four products: student logits, teacher logits, dX, dW."""
        return 2.0 * self.rows * self.vocab * (3 * self.hidden_s + self.hidden_t)

    @property
    def tensors(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shapes and dtypes of the inputs."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return {
            "input": ((self.rows, self.hidden_s), dtype),
            "weight": ((self.vocab, self.hidden_s), dtype),
            "t_input": ((self.rows, self.hidden_t), dtype),
            "t_weight": ((self.vocab_t or self.vocab, self.hidden_t), dtype),
            "target": ((self.rows,), torch.int64),
        }

    @property
    def bytes(self) -> int:
        """Of the inputs."""
        return sum(
            torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors.values()
        )

    def scaled(self, scale: float) -> Case:
        """The case with another vocabulary, a multiple of 64, and the same padding."""
        vocab = max(64, round(self.vocab * scale / 64) * 64)
        padded = vocab + self.vocab_t - self.vocab if self.vocab_t else 0
        return replace(self, vocab=vocab, vocab_t=padded)


@dataclass(frozen=True)
class Problem:
    """The tensors of a case; gradients are asked for of ``input`` and ``weight``."""

    case: Case
    input: Tensor
    weight: Tensor
    t_input: Tensor
    t_weight: Tensor
    target: Tensor

    @classmethod
    def of(cls, case: Case, allocate: Allocate | None = None) -> Problem:
        """Fresh tensors, the same for every call."""
        new = allocate or (lambda _, shape, dtype: torch.empty(shape, dtype=dtype))
        made = {name: new(name, *spec) for name, spec in case.tensors.items()}
        random = torch.Generator().manual_seed(0)
        _normal_(made["input"], 1.0, random)
        _normal_(made["weight"], LOGIT_STD / case.hidden_s**0.5, random)
        if case.gap:
            _normal_(made["t_input"], case.gap, random)
            made["t_input"] += made["input"]
            made["t_weight"].copy_(made["weight"])
        else:
            _normal_(made["t_input"], 1.0, random)
            _normal_(made["t_weight"], LOGIT_STD / case.hidden_t**0.5, random)
        made["target"].copy_(torch.randint(case.vocab, (case.rows,), generator=random))
        made["target"][: int(case.rows * case.ignored)] = -100
        return cls(case, **made).wanting_gradients()

    @classmethod
    def store(cls, case: Case, folder: str) -> None:
        """Write the tensors where other processes can map them."""
        cls.of(case, lambda *spec: _mapped(folder, *spec))

    @classmethod
    def load(cls, case: Case, folder: str) -> Problem:
        """The tensors of :meth:`store`, in memory that all processes share."""
        made = {name: _mapped(folder, name, *spec) for name, spec in case.tensors.items()}
        return cls(case, **made).wanting_gradients()

    def wanting_gradients(self) -> Problem:
        """Ask for the gradients."""
        self.input.requires_grad_()
        self.weight.requires_grad_()
        return self


def _normal_(x: Tensor, std: float, random: torch.Generator, rows: int = 8192) -> None:
    for part in x.split(rows):
        part.copy_(torch.randn(part.shape, generator=random) * std)


def _mapped(folder: str, name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    path, size = os.path.join(folder, name), torch.Size(shape).numel()
    return torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)


# The pairs of arXiv:2605.26246, student ← teacher, at 1,024 tokens. The paper names its Qwen and
# DeepSeek pairs; which Llama and Gemma models it means is a guess.
PAIRS = (
    Case("Qwen2.5 0.5B ← 7B", 1024, 896, 3584, 151_936, 152_064),
    Case("Qwen2.5 3B ← 7B", 1024, 2048, 3584, 151_936, 152_064),
    Case("Qwen2.5-Math 1.5B ← 7B", 1024, 1536, 3584, 151_936, 152_064),
    Case("DeepSeek-Coder 1.3B ← 6.7B", 1024, 2048, 4096, 32_256),
    Case("Llama 3.2 1B ← 3.1 8B", 1024, 2048, 4096, 128_256),
    Case("Gemma 2 2B ← 9B", 1024, 2304, 3584, 256_000, softcap=30.0),
    Case("Gemma 3 1B ← 4B", 1024, 1152, 2560, 262_144, 262_208),
)
TARGET = Case("Qwen2.5 0.5B ← 1.5B", 1024, 896, 1536, 151_936)
REDUCED = replace(TARGET, name="reduced vocabulary", vocab=16_384)


@dataclass(frozen=True)
class Field:
    """A case and who runs it.

    Args:
        case: the work.
        entries: names in :data:`benchmarks.entries.ENTRIES`.
        rounds, seconds: each entry runs once a round, at most so many rounds, and from the third
            on only while it has spent fewer seconds than these.
        patience: seconds that one step may take; an entry expected to take longer does not run.
    """

    case: Case
    entries: tuple[str, ...]
    rounds: int = 5
    seconds: float = 25.0
    patience: float = 60.0


LIMITS = ("limit", "natural")
PEERS = ("dense", "compiled", "paper", "liger")
SUITES: dict[str, tuple[Field, ...]] = {
    # The peers' 16-bit products would take minutes a step at the whole vocabulary on a processor
    # without instructions for them, so the whole field meets at a reduced one.
    "cpu": (
        Field(
            replace(TARGET, dtype="bfloat16"),
            (*LIMITS, "fused-1536", "fused-1024", "fused-512", "fused-128", "widened", *PEERS),
        ),
        Field(TARGET, (*LIMITS, "fused-1536", "fused-128", "dense", "compiled"), seconds=20.0),
        Field(
            replace(REDUCED, rows=256, vocab=8192, dtype="bfloat16"),
            (*LIMITS, "fused-128", "fused-128-eager", *PEERS),
            seconds=6.0,
        ),
        Field(
            REDUCED,
            (*LIMITS, "fused-128", "fused-32", "recompute-32", "fused-128-eager", *PEERS),
            seconds=6.0,
        ),
    ),
    "cache": tuple(
        Field(
            replace(TARGET, dtype=dtype),
            ("fused-1536", "fused-top-64", "fused-top-512"),
            seconds=40.0,
        )
        for dtype in ("bfloat16", "float32")
    ),
    "pairs": tuple(
        Field(
            replace(pair.scaled(1 / 16), rows=256, dtype=dtype),
            ("limit", "fused-128", "compiled"),
            seconds=5.0,
        )
        for pair in PAIRS
        for dtype in ("float32", "bfloat16")
    ),
    "smoke": (
        Field(
            Case("tiny", 24, 16, 24, 384),
            ("limit", "natural", "fused-128", "recompute-32", "fused-top-64", "dense", "paper"),
            rounds=2,
        ),
    ),
}
