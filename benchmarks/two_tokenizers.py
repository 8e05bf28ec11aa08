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
from bgkernels.training.demo import run_demo
from bgkernels.training.distill import train_teacher
from bgkernels.training.materials import Materials, prepare
from bgkernels.training.progress import Silent
from bgkernels.training.records import texts_of
from bgkernels.training.results import DemoResult
from bgkernels.training.tokens import train_tokenizer
from bgkernels.vocabularies import read

METHODS = ("hard", "static", "entropy")
STUDENT, TEACHER = 4096, 8192
SMALL = DemoConfig(
    data=DataConfig(max_bytes=4_000_000),
    teacher_shape=ModelShape(128, 3, 4),
    teacher_training=TrainConfig(600, 5e-3, validate_every=300),
    student_training=TrainConfig(400, 5e-3, validate_every=200),
    evaluation=EvalConfig(windows=80, curve_windows=16),
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
    return replace(
        base,
        teacher=str(runs / "teacher"),
        student=str(runs / "student"),
        output=runs / "students",
        methods=METHODS,
    )


def bytes_a_token(materials: Materials) -> float:
    """Of the tokens that are scored; the end of a text has none."""
    vocabulary, labels = read(materials.tokenizer), materials.exam.files.labels
    sizes = [len(vocabulary[i]) for i in labels[labels >= 0].tolist()]
    return sum(sizes) / len(sizes)


def record(result: DemoResult, materials: Materials) -> dict[str, Any]:
    """What was found, in bits a byte where it is a cost."""
    bits = 1 / (math.log(2) * bytes_a_token(materials))
    hard = result.students["hard"].measures["cross_entropy"]["all"]
    students = {}
    for method, student in result.students.items():
        cost, kl = (student.measures[name]["all"] for name in ("cross_entropy", "kl"))
        gain = hard - cost
        students[method] = {
            "bits_per_byte": cost.mean * bits,
            "error": cost.error * bits,
            "gain": gain.mean * bits,
            "gain_error": gain.error * bits,
            "kl": kl.mean,
            "seconds": student.history.seconds,
        }
    return {
        "machine": machine.stamp(1),
        "vocabularies": [len(materials.tokenizer), len(materials.teacher_tokenizer)],
        "coverage": vars(materials.coverage),
        "bytes_per_token": bytes_a_token(materials),
        "teacher_bits_per_byte": result.teacher.cross_entropy * bits,
        "steps": result.config.student_training.steps,
        "prompts": result.prompts,
        "students": students,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_tokenizers")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/two-tokenizers"))
    options = parser.parse_args(arguments)
    config = trained(options.runs, SMALL)
    result = run_demo(config)
    materials = prepare(config, load_corpus(config.data))
    options.output.write_text(json.dumps(record(result, materials), indent=1) + "\n")


if __name__ == "__main__":
    main()
