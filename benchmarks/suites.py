"""Which cases are run, and by whom."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.cases import Case

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
DENSE = ("dense", "compiled")
PEERS = (*DENSE, "paper", "liger", "trl", "orda", "liger-jsd", "liger-kl")
HARD_PEERS = (*DENSE, "torch-lce", "cce", "quack")
SMALL = replace(REDUCED, rows=128, vocab=8192, dtype="bfloat16")


def _form(form: str, *entries: str) -> Field:
    return Field(replace(REDUCED, form=form), entries, seconds=4.0)


SUITES: dict[str, tuple[Field, ...]] = {
    # The peers' 16-bit products would take minutes a step at the whole vocabulary on a processor
    # without instructions for them, so the whole field meets at a reduced one.
    "cpu": (
        Field(
            replace(TARGET, dtype="bfloat16"),
            (*LIMITS, "wide", "fused-1024", "fused-512", "fused-128", "widened", *DENSE),
            rounds=3,
            seconds=20.0,
        ),
        Field(SMALL, (*LIMITS, "fused-128", "fused-128-eager", *PEERS), rounds=3, seconds=4.0),
        Field(REDUCED, (*LIMITS, "fused-128", "fused-32", "recompute-32", *PEERS), seconds=5.0),
        _form("hard", *LIMITS, "fused-128", "recompute-32", *HARD_PEERS),
        _form("top-k", *LIMITS, "fused-128", *DENSE),
        _form("matched", *LIMITS, "fused-128", *DENSE),
        _form("logits", "copy", "fused-128", "fused-128-eager", *DENSE),
        _form("evaluation", *LIMITS, "fused-128", "fused-32", *DENSE),
    ),
    "whole": (Field(TARGET, (*LIMITS, "fused-1536", "fused-128", *DENSE), rounds=3, seconds=20.0),),
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
            ("limit", "natural", "fused-128", "recompute-32", "dense", "paper"),
            rounds=2,
        ),
    ),
}
