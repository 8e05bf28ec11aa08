"""A student of 4,096 tokens and its teacher of 8,192, trained by the reference loop.

``python -m benchmarks.two_tokenizers --output results.json`` trains a teacher on the demo's corpus,
and students of one start on the same batches: on the text alone, and with the teacher's soft
labels. Costs are in bits a byte, so that both vocabularies have one unit. It takes a few
minutes on one thread; the folder ``--runs`` keeps what was trained.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import machine
from bgkernels.training import models
from bgkernels.training.config import DataConfig, DemoConfig, EvalConfig, ModelShape, TrainConfig
from bgkernels.training.corpus import load_corpus
from bgkernels.training.distill import train_student, train_teacher
from bgkernels.training.evaluate import own_cost, score
from bgkernels.training.materials import Materials, prepare
from bgkernels.training.progress import Silent
from bgkernels.training.records import texts_of
from bgkernels.training.tokens import train_tokenizer
from bgkernels.vocabularies import read

METHODS = ("hard", "static", "entropy")
STUDENT, TEACHER = 4096, 8192
SMALL = DemoConfig(
    data=DataConfig(max_bytes=4_000_000),
    teacher_shape=ModelShape(128, 3, 4),
    teacher_training=TrainConfig(600, 5e-3, validate_every=300),
    student_training=TrainConfig(150, 5e-3, validate_every=150),
    evaluation=EvalConfig(windows=64, curve_windows=8),
)
"""The demo with less text, a smaller teacher and fewer steps."""


def trained(runs: Path, base: DemoConfig) -> DemoConfig:
    """The run of the students, whose teacher and first weights are in folders now."""
    config = replace(base, data=replace(base.data, vocab=TEACHER), output=runs)
    corpus = load_corpus(config.data)
    materials = prepare(config, corpus)
    teacher, _ = train_teacher(config, materials, Silent())
    models.export(teacher, materials.tokenizer, runs / "teacher")
    tokenizer = train_tokenizer(texts_of(corpus.train), STUDENT)
    shape, length = base.student_shape, base.data.sequence_length
    student = models.small_llama(shape, len(tokenizer), length, base.seed + 1)
    models.export(student, tokenizer, runs / "student")
    return students(runs, base)


def students(runs: Path, base: DemoConfig) -> DemoConfig:
    """The run of the students of those folders."""
    teacher, student = str(runs / "teacher"), str(runs / "student")
    return replace(base, teacher=teacher, student=student, output=runs / "students")


def measured(config: DemoConfig) -> dict[str, Any]:
    """Train the students and score them on the held-out files, in bits a byte."""
    materials = prepare(config, load_corpus(config.data))
    exam, teacher = materials.exam, materials.teacher
    assert teacher is not None and materials.coverage is not None
    bits = 1 / (math.log(2) * bytes_a_token(materials))
    costs, record = {}, {}
    for method in METHODS:
        student, history = train_student(config, materials, method, teacher, Silent())
        tokens = score(student, teacher, exam.files)
        costs[method] = tokens.estimates(tokens.nll, exam.config.threshold, hard=True)["all"]
        gain = costs[METHODS[0]] - costs[method]
        record[method] = {
            "bits_per_byte": costs[method].mean * bits,
            "error": costs[method].error * bits,
            "gain": gain.mean * bits,
            "gain_error": gain.error * bits,
            "kl": tokens.estimates(tokens.kl, exam.config.threshold)["all"].mean,
            "seconds": history.seconds,
        }
    return {
        "machine": machine.stamp(1),
        "vocabularies": [len(materials.tokenizer), len(materials.teacher_tokenizer)],
        "coverage": vars(materials.coverage),
        "bytes_per_token": bytes_a_token(materials),
        "teacher_bits_per_byte": own_cost(teacher, exam.files) * bits,
        "steps": config.student_training.steps,
        "windows": len(exam.windows),
        "students": record,
    }


def bytes_a_token(materials: Materials) -> float:
    """Of the tokens that are scored; the end of a text has none."""
    vocabulary, labels = read(materials.tokenizer), materials.exam.files.labels
    sizes = [len(vocabulary[i]) for i in labels[labels >= 0].tolist()]
    return sum(sizes) / len(sizes)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_tokenizers")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/two-tokenizers"))
    options = parser.parse_args(arguments)
    found = measured(trained(options.runs, SMALL))
    options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
