"""How close a student is to its teacher: on held-out text, and on text of its own.

Everything is read from :func:`bgkernels.linear_row_stats`, chunk by chunk, without gradients. The
prompts are the beginnings of held-out windows, and only what follows them is scored, so that three
texts can be compared on one footing: the file's own continuation, the student's and the teacher's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.training.config import EvalConfig
from bgkernels.training.generation import continue_text
from bgkernels.training.models import CausalLM
from bgkernels.training.sharding import whole
from bgkernels.training.tokens import Batch
from bgkernels.training.translated import TranslatedLM


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, with the part that each sequence has in its error.

    Tokens of one sequence are not independent, so sequences are what the standard error counts.

    Args:
        mean: over the tokens.
        share: of all tokens, those that the mean is over.
        influence: ``(sequences,)``; the standard error is the norm of it.
    """

    mean: float
    share: float
    influence: Tensor

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return float(self.influence.norm())

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference of two means over the same prompts, whose common part cancels."""
        return Estimate(self.mean - other.mean, self.share, self.influence - other.influence)

    def excess_over(self, other: Estimate) -> Estimate:
        """The relative excess ``self / other - 1``, by the delta method."""
        ratio = self.mean / other.mean if other.mean else math.nan
        influence = (self.influence - ratio * other.influence) / (other.mean or math.nan)
        return Estimate(ratio - 1, self.share, influence)

    def plain(self) -> dict[str, float | None]:
        """Values for JSON, where a mean over no token is null."""
        values = {"mean": self.mean, "error": self.error, "share": self.share}
        return {key: value if math.isfinite(value) else None for key, value in values.items()}


@dataclass(frozen=True)
class Tokens:
    """Statistics of every scored token.

    Args:
        nll: ``(sequences, length)`` the student's cross-entropy.
        kl: KL(teacher ‖ student).
        teacher_nll: what the text costs the teacher.
        ambiguity: the teacher's entropy as a share of its largest, ``H / log V``: low at bridges.
        valid: which are scored.
        soft: which have a soft label; of two tokenizers, not all.
    """

    nll: Tensor
    kl: Tensor
    teacher_nll: Tensor
    ambiguity: Tensor
    valid: Tensor
    soft: Tensor

    def until(self, length: int) -> Tokens:
        """Only the first ``length`` scored tokens of each sequence."""
        return replace(self, valid=self.valid & (self.valid.cumsum(-1) <= length))

    def estimates(
        self, values: Tensor, threshold: float, *, hard: bool = False
    ) -> dict[str, Estimate]:
        """Means over all tokens, bridges and gardens.

        Args:
            values: of each token; an infinite one, which the teacher has no token for, is left out.
            threshold: between bridges and gardens.
            hard: over tokens without a soft label too, which are in neither part.
        """
        bridge, soft = self.ambiguity < threshold, self.valid & self.soft
        chosen = (self.valid if hard else soft) & (values != math.inf)
        parts = {"all": chosen, "bridge": chosen & soft & bridge, "garden": chosen & soft & ~bridge}
        total = int(self.valid.sum())
        return {name: _mean(values, part, total) for name, part in parts.items()}


def _mean(values: Tensor, chosen: Tensor, total: int) -> Estimate:
    """Mean of the chosen values, and each sequence's influence on it."""
    count = chosen.sum()
    mean = values[chosen].double().mean()
    residual = torch.where(chosen, values.double() - mean, 0).sum(-1) / count
    sequences = len(values)
    correction = math.sqrt(sequences / max(1, sequences - 1))
    return Estimate(float(mean), float(count) / total, residual * correction)


Parts = Mapping[str, Estimate]
"""Part of the tokens (``all``, ``bridge``, ``garden``) → estimate."""

Measures = Mapping[str, Parts]
"""Name of a measure → its parts."""


@torch.no_grad()
def score(student: CausalLM, teacher: CausalLM | None, text: Batch) -> Tokens:
    """Statistics of both models at every token of a text that has a label.

    Args:
        student: the student.
        teacher: the teacher; None: only ``nll`` is meaningful.
        text: sequences and what is scored of them.

    Returns:
        Statistics in the memory of the CPU.
    """
    chunks: list[tuple[Tensor, ...]] = []
    text = text.to(student.device)
    for tokens, target in zip(text.tokens.split(16), text.labels.split(16), strict=True):
        stats = row_stats(student, teacher, tokens[:, :-1], target)
        ambiguity = stats.entropy_t / math.log(max(2, stats.vocab))
        soft = torch.ones_like(stats.valid) if stats.matched is None else stats.matched
        chunks.append((stats.nll, stats.kl_ts, -stats.logp_t, ambiguity, stats.valid, soft))
    return Tokens(*(torch.cat(parts).cpu() for parts in zip(*chunks, strict=True)))


def own_cost(model: CausalLM, text: Batch) -> float:
    """The cross-entropy of a text for a model alone, in nats a token of the student."""
    if isinstance(model, TranslatedLM):
        return model.cost(text.tokens.to(model.device), text.labels)
    tokens = score(model, None, text)
    return float(tokens.nll[tokens.valid].mean())


def row_stats(
    student: CausalLM,
    teacher: CausalLM | None,
    inputs: Tensor,
    target: Tensor,
    policy: bg.routing.Policy | None = None,
) -> bg.RowStats:
    """What :func:`bgkernels.linear_row_stats` says of a pair on ``(sequences, length)`` tokens.

    Args:
        student, teacher: the pair; without a teacher, the student alone.
        inputs: tokens that are read.
        target: those that follow.
        policy: whose statistics are wanted too.
    """
    head = student.head
    return whole(
        (student, teacher),
        lambda: bg.linear_row_stats(
            student.hidden(inputs),
            head.weight,
            teacher.as_teacher(inputs) if teacher else None,
            target,
            extras=policy.extras if policy else (),
            linear_bias=head.bias,
            logit_scale=student.logit_scale,
            logit_softcap=student.logit_softcap,
        ),
    )


@dataclass(frozen=True)
class Examination:
    """The held-out windows on which all models of a demo are compared.

    Args:
        windows: ``(sequences, length + 1)`` tokens; the beginning of each is the prompt.
        learnt: of the same shape, which of them count on the files: of conversations, as in
            training, the answers. Of what models say themselves, all that follows the prompt does.
        config: prompt and threshold.
        seed: of the samples.
        stop: the token that ends what a model says; None: it goes on for the whole window.
    """

    windows: Tensor
    learnt: Tensor
    config: EvalConfig
    seed: int
    stop: int | None = None

    @property
    def start(self) -> int:
        """Tokens of a prompt."""
        return self.config.given(self.windows.shape[1] - 1)

    @property
    def files(self) -> Batch:
        """The windows and what is scored of them."""
        return Batch.of(self.windows, self.learnt).after(self.start)

    def speak(self, model: CausalLM, vocab: int) -> Tensor:
        """The windows, with what follows each prompt replaced by the model's own words."""
        prompts = self.windows[:, : self.start]
        length = self.windows.shape[1] - self.start
        return continue_text(model, prompts, length, vocab, self.seed, stop=self.stop)

    @property
    def few(self) -> Batch:
        """Some of those windows, for validation curves."""
        return self.files[:: math.ceil(len(self.windows) / self.config.curve_windows)]

    def curve(self, student: CausalLM, teacher: CausalLM | None) -> dict[str, float]:
        """A point of each validation curve, on a few of the windows; without a teacher, of one."""
        tokens = score(student, teacher, self.few)
        point = {"cross_entropy": float(tokens.nll[tokens.valid].mean())}
        return point | (
            {"kl": float(tokens.kl[tokens.valid & tokens.soft].mean())} if teacher else {}
        )

    def read(self, student: CausalLM, teacher: CausalLM, teacher_text: Tensor) -> Readings:
        """Score the three texts that follow the prompts.

        Args:
            student, teacher: the pair.
            teacher_text: the windows as the teacher continues them: ``speak(teacher)``.
        """
        own_text = self.speak(student, min(student.vocab, teacher.vocab))
        texts = (teacher_text, own_text)
        spoken = (Batch.of(text).after(self.start).until(self.stop) for text in texts)
        return Readings(*(score(student, teacher, text) for text in (self.files, *spoken)))


@dataclass(frozen=True)
class Readings:
    """Scores of a pair on three continuations of the same prompts.

    Args:
        file: what the file says.
        taught: what the teacher says.
        own: what the student says.
    """

    file: Tokens
    taught: Tokens
    own: Tokens

    def measures(self, threshold: float) -> Measures:
        """Every measure of a student, by part of the tokens.

        Args:
            threshold: of ``H / log V``, between bridges and gardens.

        Returns:
            On the files: ``cross_entropy``, ``kl``. On the teacher's text: ``teacher_text_kl``. On
            the student's own: ``own_text_kl``, ``own_text_teacher_nll``; ``exposure_bias``, by how
            much the divergence on its own text exceeds that on the teacher's; and
            ``excess_error``, the same as a share of it: ExAccErr (Arora et al. 2022) over the
            whole continuation.
        """
        file, taught, own = self.file, self.taught, self.own
        own_kl = own.estimates(own.kl, threshold)
        taught_kl = taught.estimates(taught.kl, threshold)
        return {
            "cross_entropy": file.estimates(file.nll, threshold, hard=True),
            "kl": file.estimates(file.kl, threshold),
            "teacher_text_kl": taught_kl,
            "own_text_kl": own_kl,
            "own_text_teacher_nll": own.estimates(own.teacher_nll, threshold),
            "exposure_bias": {part: own_kl[part] - taught_kl[part] for part in own_kl},
            "excess_error": {part: own_kl[part].excess_over(taught_kl[part]) for part in own_kl},
        }

    def until(self, length: int) -> Readings:
        """Only the first ``length`` tokens of each continuation."""
        return Readings(*(x.until(length) for x in (self.file, self.taught, self.own)))

    def accumulation(self, lengths: Sequence[int], threshold: float) -> dict[int, Parts]:
        """ExAccErr up to each length.

        The curve is flat where errors do not feed on errors, and rises where they do.
        """
        return {n: self.until(n).measures(threshold)["excess_error"] for n in lengths}
