"""What is measured: named shapes, the forms of a step, and their tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOGIT_STD = 3.0
KEPT = 64
"""Columns that a top-k teacher keeps."""
Shape = tuple[int, ...]
Allocate = Callable[[str, Shape, torch.dtype], Tensor]


@dataclass(frozen=True)
class Form:
    """What a step starts from, and which gradients it leaves.

    Args:
        about: for titles; empty for the usual one.
        tensors: the inputs, beside the target.
        gradients: those whose gradients are asked for.
    """

    about: str
    tensors: tuple[str, ...]
    gradients: tuple[str, ...]


HEADS = ("input", "weight", "t_input", "t_weight")
FORMS = {
    "step": Form("", HEADS, HEADS[:2]),
    "hard": Form("hard labels only", HEADS[:2], HEADS[:2]),
    "top-k": Form(f"top-{KEPT} teacher", (*HEADS[:2], "indices", "logprobs"), HEADS[:2]),
    "matched": Form("another vocabulary, 90 % matched", (*HEADS, "pairs"), HEADS[:2]),
    "logits": Form("from logits", ("logits", "t_logits"), ("logits",)),
    "evaluation": Form("no gradient", HEADS, ()),
}


@dataclass(frozen=True)
class Case:
    """One distillation step of the heads.

    Args:
        name: of the shape.
        rows, hidden_s, hidden_t, vocab: tokens, widths of student and teacher, columns.
        vocab_t: columns of the teacher, padded; 0: the student's.
        softcap: of both models' logits; 0: none.
        dtype: of hidden states and heads, or of logits.
        temperature: of the divergence.
        gap: 0: the teacher has nothing to do with the student; else its hidden states are the
            student's plus this much noise, and it has the student's head.
        ignored: share of tokens that take no part.
        scale: factor on the student's and the teacher's logits.
        form: a name in :data:`FORMS`.
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
    scale: float = 1.0
    form: str = "step"

    @property
    def title(self) -> str:
        """A line that says everything a reader compares by."""
        vocab = f"{self.vocab:,}" + (f" (teacher {self.vocab_t:,})" if self.vocab_t else "")
        shape = (
            f"{self.dtype}, {self.rows:,} tokens, {self.hidden_s} ← {self.hidden_t}, V = {vocab}"
        )
        about = FORMS[self.form].about
        return f"{shape}, {about}" if about else shape

    @property
    def products(self) -> tuple[str, ...]:
        """The matrix products of the step: ``student``, ``teacher``, ``input``, ``weight``."""
        form = FORMS[self.form]
        student = ("student",) if "input" in form.tensors else ()
        teacher = ("teacher",) if "t_input" in form.tensors else ()
        return student + teacher + tuple(x for x in form.gradients if student)

    @property
    def flops(self) -> float:
        """Of those products."""
        width = sum(self.hidden_t if x == "teacher" else self.hidden_s for x in self.products)
        return 2.0 * self.rows * self.vocab * width

    @property
    def moved(self) -> int:
        """Bytes that a step from logits must read and write."""
        size = getattr(torch, self.dtype).itemsize
        return self.rows * (2 * self.vocab + (self.vocab_t or self.vocab)) * size

    @property
    def tensors(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shapes and dtypes of the inputs."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        columns_t = self.vocab_t or self.vocab
        every = {
            "input": ((self.rows, self.hidden_s), dtype),
            "weight": ((self.vocab, self.hidden_s), dtype),
            "t_input": ((self.rows, self.hidden_t), dtype),
            "t_weight": ((columns_t, self.hidden_t), dtype),
            "logits": ((self.rows, self.vocab), dtype),
            "t_logits": ((self.rows, columns_t), dtype),
            "indices": ((self.rows, KEPT), torch.int64),
            "logprobs": ((self.rows, KEPT), torch.float32),
            "pairs": ((2, self.vocab * 9 // 10), torch.int64),
        }
        made = {name: every[name] for name in FORMS[self.form].tensors}
        return made | {"target": ((self.rows,), torch.int64)}

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


class Problem:
    """The tensors of a case, by name.

    Args:
        case: the work.
        tensors: in the order of ``case.tensors``; those of ``FORMS[case.form].gradients`` will
            ask for one.
    """

    input: Tensor
    weight: Tensor
    t_input: Tensor
    t_weight: Tensor
    logits: Tensor
    t_logits: Tensor
    indices: Tensor
    logprobs: Tensor
    pairs: Tensor
    target: Tensor

    def __init__(self, case: Case, tensors: dict[str, Tensor]) -> None:
        self.case, self.tensors = case, tensors
        self.wanted = [tensors[name].requires_grad_() for name in FORMS[case.form].gradients]
        self.__dict__.update(tensors)

    @classmethod
    def of(
        cls, case: Case, allocate: Allocate | None = None, device: torch.device | str = "cpu"
    ) -> Problem:
        """Fresh tensors, the same for every call."""
        new = allocate or (lambda _, shape, dtype: torch.empty(shape, dtype=dtype, device=device))
        made = {name: new(name, *spec) for name, spec in case.tensors.items()}
        random = torch.Generator(device).manual_seed(0)
        _fill(case, made, random)
        made["target"].random_(case.vocab, generator=random)
        made["target"][: int(case.rows * case.ignored)] = -100
        return cls(case, made)

    @classmethod
    def store(cls, case: Case, folder: str) -> None:
        """Write the tensors where other processes can map them."""
        cls.of(case, lambda *spec: _mapped(folder, *spec))

    @classmethod
    def load(cls, case: Case, folder: str) -> Problem:
        """The tensors of :meth:`store`, in memory that all processes share."""
        return cls(case, {n: _mapped(folder, n, *spec) for n, spec in case.tensors.items()})


def _fill(case: Case, made: dict[str, Tensor], random: torch.Generator) -> None:
    """Hidden states and heads of normal logits, student's first; or those logits."""
    std = LOGIT_STD * case.scale
    heads = {"weight": std / case.hidden_s**0.5 if case.hidden_s else 0.0}
    heads |= {"t_weight": std / case.hidden_t**0.5 if case.hidden_t else 0.0}
    for name, twin in (("input", "t_input"), ("weight", "t_weight"), ("logits", "t_logits")):
        if name not in made:
            continue
        spread = std if name == "logits" else 1.0
        _normal_(made[name], heads.get(name, spread), random)
        if twin not in made:
            continue
        if not case.gap:
            _normal_(made[twin], heads.get(twin, spread), random)
        elif name == "weight":
            made[twin].copy_(made[name])
        else:
            _normal_(made[twin], case.gap * spread, random)
            made[twin] += made[name]
    if "pairs" in made:  # scattered, and in no order
        for ids, columns in zip(
            made["pairs"], (case.vocab, case.vocab_t or case.vocab), strict=True
        ):
            order = torch.randperm(columns, generator=random, device=random.device)
            ids.copy_(order[: len(ids)])
    if "indices" in made:
        step = case.vocab // KEPT
        first = torch.randint(step, (case.rows, 1), generator=random, device=random.device)
        made["indices"].copy_(first + step * torch.arange(KEPT, device=random.device))
        _normal_(made["logprobs"], LOGIT_STD, random)
        made["logprobs"].copy_(made["logprobs"].log_softmax(-1) + torch.tensor(0.9).log())


def _normal_(x: Tensor, std: float, random: torch.Generator, rows: int = 8192) -> None:
    for part in x.split(rows):
        part.copy_(torch.randn(part.shape, generator=random, device=random.device) * std)


def _mapped(folder: str, name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    path, size = os.path.join(folder, name), torch.Size(shape).numel()
    return torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)
