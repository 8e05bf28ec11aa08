"""A step with two vocabularies beside TRL's GOLD loss on the same tensors.

``python -m benchmarks.gold --output gold.json``: two tokenizers are trained on Python's sources,
both cut one text, and hidden states and heads are random. Each entry computes cross-entropy and a
Jensen–Shannon divergence forward and backward, in a process of its own. GOLD needs ``trl``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import textwrap
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import bgkernels as bg
from benchmarks import machine
from benchmarks.measure import resident, settle
from bgkernels.training.tokens import train_tokenizer
from bgkernels.vocabularies import Coverage, VocabularyMatch, align, match

VOCABULARIES, WIDTHS, TOKENS, RUNS = (4096, 8192), (256, 384), 1024, 3
MIB = 2**20


def problem() -> dict[str, Any]:
    """Tokenizers, tokens and random states, the same in every process."""
    texts = [Path(m.__file__).read_text() for m in (argparse, textwrap, multiprocessing, torch)]
    tokenizers = [train_tokenizer(texts, size) for size in VOCABULARIES]
    ids = [torch.tensor([t.encode(texts[0])[:TOKENS]]) for t in tokenizers]
    g = torch.Generator().manual_seed(0)
    hidden = [torch.randn(x.shape[1], w, generator=g) for x, w in zip(ids, WIDTHS, strict=True)]
    heads = [
        torch.randn(len(t), w, generator=g) * w**-0.5
        for t, w in zip(tokenizers, WIDTHS, strict=True)
    ]
    return {"tokenizers": tokenizers, "ids": ids, "hidden": hidden, "heads": heads}


def ours(given: dict[str, Any], found: VocabularyMatch, budget: int) -> Tensor:
    """Both heads a tile at a time."""
    positions = align(found, *given["ids"]).positions[:, :-1].reshape(-1)
    teacher = bg.LinearTeacher(given["hidden"][1], given["heads"][1])
    loss = bg.linear_hybrid_distillation(
        given["hidden"][0][:-1], given["heads"][0],
        bg.MatchedTeacher(teacher, found.pairs, positions=positions), given["ids"][0][0, 1:],
        divergence=bg.divergences.generalized_jsd(0.5), routing="static", memory_budget=budget,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    return loss


def gold(given: dict[str, Any], found: VocabularyMatch, merge: str) -> Tensor:
    """TRL's loss on whole logits; its hybrid form pairs tokens as well."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    config = SimpleNamespace(
        uld_crossentropy_weight=1.0, uld_distillation_weight=1.0, uld_student_temperature=1.0,
        uld_teacher_temperature=1.0, uld_skip_student_eos=False, uld_skip_teacher_eos=False,
        use_extended_uld=True, uld_token_merge_strategy=merge, uld_use_hybrid_loss=True,
        uld_hybrid_matched_weight=None, uld_hybrid_unmatched_weight=None, beta=0.5,
    )  # fmt: skip
    loss = ULDLoss(config, *given["tokenizers"])
    logits = [h @ w.T for h, w in zip(given["hidden"], given["heads"], strict=True)]
    offsets = []
    for ids, vocabulary in zip(given["ids"], (found.student, found.teacher), strict=True):
        ends = torch.tensor([len(vocabulary[i]) for i in ids[0].tolist()]).cumsum(0)
        starts = torch.nn.functional.pad(ends[:-1], (1, 0))
        offsets.append(torch.stack([starts, ends], -1)[None])
    made: Tensor = loss(
        logits[0][None], logits[1][None], *given["ids"], *given["ids"],
        student_byte_offsets=offsets[0], teacher_byte_offsets=offsets[1],
    )  # fmt: skip
    return made


ENTRIES = {
    "bgkernels, 64 MiB": lambda given, found: ours(given, found, 64 * MIB),
    "bgkernels, 16 MiB": lambda given, found: ours(given, found, 16 * MIB),
    "TRL GOLD, hybrid": lambda given, found: gold(given, found, "observed"),
}


def measured(name: str) -> dict[str, Any]:
    """CPU seconds of a step, and bytes above what was there before it."""
    torch.set_num_threads(1)
    given = problem()
    found = match(*given["tokenizers"])
    leaves = [given["hidden"][0].requires_grad_(), given["heads"][0].requires_grad_()]
    seconds, peak = [], 0
    for _ in range(RUNS):
        for leaf in leaves:
            leaf.grad = None
        before, started = settle(), time.process_time()
        ENTRIES[name](given, found).backward()
        seconds.append(time.process_time() - started)
        peak = resident("VmHWM") - before
    return {"entry": name, "seconds": min(seconds), "all": seconds, "peak_bytes": peak}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gold")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    context = multiprocessing.get_context("spawn")
    rows = []
    for name in ENTRIES:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            rows.append(pool.submit(measured, name).result())
    given = problem()
    found = match(*given["tokenizers"])
    ids = [x.tolist() for x in given["ids"]]
    started = time.process_time()
    many = [x.repeat(500, 1) for x in given["ids"]]
    align(found, *many)
    speed = many[0].numel() / (time.process_time() - started)
    record = {
        "machine": machine.stamp(1), "vocabularies": VOCABULARIES, "widths": WIDTHS,
        "tokens": TOKENS, "coverage": vars(Coverage.of(found, *ids)), "entries": rows,
        "aligned_tokens_per_second": speed,
    }  # fmt: skip
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
